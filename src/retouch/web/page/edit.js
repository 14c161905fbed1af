// Edit: a model and its ledger, what it says, a change, apply and undo.
import { at, button, choose, fill, listed, make, sentences, table } from "./draw.js";
import { act, begin, call, ending, lists, trying } from "./work.js";

let methods = [];

const apply = (change) => begin("apply", { change, dtype: at("apply-dtype").value || null });

const planned = (result) => [
  measured(result.facts),
  ...sentences("good", result.says),
  make("p", { class: "row" }, act("Write a model that carries it", () => apply(result.change)),
    act("Ask before and after", () => { at("ask-change").value = result.change; at("ask-text").focus(); })),
];

function measured(facts) {
  const known = facts.some((fact) => fact.after != null);
  const heads = ["Prompt", "New answer", ...(known ? ["Probability before", "After"] : ["Old answer"])];
  return table(heads, facts.map((f) => [f.prompt, f.target, ...(known ? [f.before, f.after] : [f.truth])]));
}

// ---------------------------------------------------------------- model

function showModel(model) {
  if (!model) return;
  const parts = { model: model.name, family: model.family, ...model.numbers, "before any change": model.base.slice(0, 12) };
  const list = listed(parts);
  const heads = ["Number", "Id", "Method", "Facts", "Status", "When", ""];
  const rows = model.changes.map((line) => [String(line.number), line.id, line.method, about(line), line.status,
    line.when.replace("T", " ").slice(0, 16),
    make("div", { class: "row" }, line.active ? act("Undo", () => begin("undo", { number: line.number })) : "")]);
  fill("model-told", list, rows.length ? table(heads, rows) : make("p", { class: "soft" }, "It carries no changes."));
}

const about = (line) => make("details", {}, make("summary", {}, line.facts), sentences("soft", [...line.prompts, ...line.certified]));

// ---------------------------------------------------------------- changes

function showChanges(changes) {
  const usable = changes.filter((change) => !change.error).map((change) => change.path);
  choose(at("ask-change"), usable, "no change");
  if (!changes.length) return fill("changes-told", make("p", { class: "soft" }, "None yet: plan one above."));
  const rows = changes.map((c) => c.error ? [c.path, make("span", { class: "error" }, c.error), "", "", "", ""] : [
    c.path, c.method, first(c.facts), `${c.kib.toLocaleString("en")} KiB`, c.certified.length ? "yes" : "no",
    make("div", { class: "row" }, button("Show", trying(() => showChange(c.path))), act("Apply", () => apply(c.path)))]);
  return fill("changes-told", table(["Change", "Method", "Facts", "Size", "Certified", ""], rows));
}

const first = (facts) => facts.length === 0 ? "none"
  : `${facts[0].prompt} ${facts[0].target ?? ""}${facts.length > 1 ? ` and ${facts.length - 1} more` : ""}`;

async function showChange(path) {
  const change = await call(`change?path=${encodeURIComponent(path)}`);
  const norms = Object.entries(change.weights).map(([name, w]) => [name, w.rank, w.frobenius, w.spectral]);
  const settings = Object.entries(change.settings).map(([name, value]) => [name, JSON.stringify(value)]);
  fill("change-told", make("h3", {}, `${change.path} · ${change.id} · ${change.method}`), measured(change.facts),
    sentences("good", change.certified), table(["Weight", "Rank", "Frobenius norm", "Spectral norm"], norms),
    make("details", {}, make("summary", {}, "Settings"), table(["Setting", "Value"], settings)));
  at("change-told").scrollIntoView({ block: "nearest" });
}

// ---------------------------------------------------------------- the form of a method

function showMethod() {
  const method = methods.find((m) => m.name === at("edit-method").value);
  if (!method) return;
  fill("edit-about", `${method.summary} ${method.source}`.split("``").map((part, i) => i % 2 ? make("code", {}, part) : part));
  fill("edit-settings", method.settings.flatMap((s) => [
    make("label", { for: `set-${s.name}` }, s.name.replaceAll("_", " ")),
    make("div", {}, input(s), make("p", { class: "soft" }, `${s.doc} (${[s.type, s.allowed].filter(Boolean).join(" ")})`))]));
}

function input(s) {
  const common = { id: `set-${s.name}`, "data-setting": s.name, "data-default": s.default };
  const choices = s.type === "bool" ? ["true", "false"] : s.choices;
  if (!choices.length) return make("input", { ...common, value: s.default });
  return make("select", common, choices.map((c) => make("option", { value: c, selected: c === s.default }, c)));
}

function changedSettings() {
  const fields = [...document.querySelectorAll("[data-setting]")];
  return Object.fromEntries(fields.filter((f) => f.value.trim() !== f.dataset.default).map((f) => [f.dataset.setting, f.value.trim()]));
}

function asked() {
  const many = document.querySelector("[name=facts]:checked").value === "many";
  const fact = many ? { facts: at("edit-facts").value }
    : { prompt: at("edit-prompt").value, subject: at("edit-subject").value, target: at("edit-target").value };
  const harm = at("edit-harm").value.trim();
  if (Number.isNaN(Number(harm))) throw new Error(`The largest harm is a number between 0 and 1, such as 0.05; got ${harm}.`);
  return { ...fact, method: at("edit-method").value, settings: changedSettings(), max_harm: harm ? Number(harm) : null };
}

// ---------------------------------------------------------------- beginning

lists.push(({ state, models, changes }) => {
  choose(at("open-model"), models);
  if (models.includes(state.model?.name)) at("open-model").value = state.model.name;
  showModel(state.model);
  showChanges(changes);
});
ending("Editing", (told, result) => fill("edit-told", told, result ? planned(result) : []));

at("open-form").addEventListener("submit", trying(() => begin("open", { model: at("open-model").value })));
at("edit-form").addEventListener("submit", trying(() => begin("edit", asked())));
at("edit-method").addEventListener("change", showMethod);
at("ask-form").addEventListener("submit", trying(async () => {
  fill("ask-told", make("p", { class: "soft" }, "Thinking …"));
  const body = { text: at("ask-text").value, change: at("ask-change").value || null, n_tokens: Number(at("ask-tokens").value) };
  const told = await call("ask", body).catch((error) => { fill("ask-told"); throw error; });
  fill("ask-told", make("div", { class: "sides" }, Object.entries(told.said).map(([name, said]) =>
    make("div", {}, make("h3", {}, name), make("p", { class: "said" }, said || "(nothing)")))));
}));
for (const radio of document.querySelectorAll("[name=facts]")) {
  radio.addEventListener("change", () => {
    at("edit-one").hidden = radio.value !== "one";
    at("edit-many").hidden = radio.value !== "many";
  });
}

export async function showMethods() {
  methods = await call("methods");
  choose(at("edit-method"), methods.map((m) => m.name));
  at("edit-method").value = "rome";
  showMethod();
}
