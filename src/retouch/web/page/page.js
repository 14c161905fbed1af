// The page: tabs, reports, and the beginning. Each verb has a file of its own.
import { at, button, fill, make, table } from "./draw.js";
import { showMethods } from "./edit.js";
import "./fuse.js";
import "./recommend.js";
import "./slim.js";
import { call, lists, refresh, tell, trying } from "./work.js";

// ---------------------------------------------------------------- tabs

const tabs = [...document.querySelectorAll("[role=tab]")];

function choose(tab) {
  for (const one of tabs) {
    const chosen = one === tab;
    one.setAttribute("aria-selected", chosen);
    one.tabIndex = chosen ? 0 : -1;
    at(one.getAttribute("aria-controls")).hidden = !chosen;
  }
  sessionStorage.setItem("retouch-tab", tab.id);
  tell("");
  if (!at("job").classList.contains("running")) at("job").hidden = true;
}

for (const [i, tab] of tabs.entries()) {
  tab.addEventListener("click", () => choose(tab));
  tab.addEventListener("keydown", (event) => {
    const to = { ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: -1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    const next = tabs.at(to % tabs.length);
    choose(next);
    next.focus();
  });
}
choose(tabs.find((tab) => tab.id === sessionStorage.getItem("retouch-tab")) ?? tabs[0]);

// ---------------------------------------------------------------- reports

function showReports(reports) {
  if (!reports.length) return fill("reports-told", make("p", { class: "soft" }, "None in this folder: retouch demo, bench and --html write some."));
  const show = (report) => { at("report").hidden = false; at("report").src = report.url; };
  return fill("reports-told", table(["Report", ""], reports.map((r) => [r.path, make("div", { class: "row" }, button("Show", () => show(r)))])));
}

lists.push(({ state, reports }) => {
  at("folder").textContent = state.folder;
  at("version").textContent = state.version;
  showReports(reports);
});

// ---------------------------------------------------------------- beginning

at("job-cancel").addEventListener("click", trying(() => call("cancel", {})));

await trying(async () => {
  await refresh();
  await showMethods();
})();
