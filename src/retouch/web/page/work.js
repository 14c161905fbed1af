// The API, and the one piece of long work that runs at a time.
import { at, button, duration, fill, make, sentences } from "./draw.js";

const key = "retouch-token";
if (/^#[\w-]{20,}$/.test(location.hash)) {
  sessionStorage.setItem(key, location.hash.slice(1));
  history.replaceState(null, "", location.pathname); // the token leaves the address bar
}

let seen = 0; // the last job whose end was shown
const endings = []; // who shows the end of which work
export const lists = []; // who shows what the folder holds

/** Let the end of work whose name begins so be shown: (what went wrong, the result). */
export const ending = (beginning, show) => endings.push([beginning, show]);

// ---------------------------------------------------------------- the API

export async function call(name, body = null) {
  const headers = { Authorization: `Bearer ${sessionStorage.getItem(key) ?? ""}` };
  if (body !== null) headers["Content-Type"] = "application/json";
  const how = body === null ? { headers } : { method: "POST", headers, body: JSON.stringify(body) };
  let answer;
  try {
    answer = await fetch(`api/${name}`, how);
  } catch {
    throw new Error("The server does not answer. Is retouch web still running?");
  }
  if (answer.status === 401) {
    throw new Error("This page was opened without its key. Open the whole address that retouch web printed, from # on too.");
  }
  const told = await answer.json();
  if (!answer.ok) throw new Error(told.error ?? `The server answered ${answer.status}.`);
  return told;
}

export function tell(problem) {
  at("problem").hidden = !problem;
  at("problem").textContent = problem;
  if (problem) at("problem").scrollIntoView({ block: "nearest" });
}

/** Do something and show what went wrong with it. */
export const trying = (work) => async (event) => {
  event?.preventDefault?.();
  tell("");
  try {
    await work(event);
  } catch (error) {
    tell(error.message);
  }
};

export const begin = async (name, body) => watch(await call(name, body));
export const act = (text, work) => button(text, trying(work), { class: "act" });

// ---------------------------------------------------------------- long work

export function watch(job) {
  const running = job?.state === "running";
  for (const node of document.querySelectorAll("form button:not([type]), button.act")) node.disabled = running;
  if (!job || (!running && job.number === seen)) return;
  at("job").hidden = false;
  at("job").classList.toggle("running", running);
  at("job-cancel").hidden = !running;
  at("job-bar").hidden = !running;
  at("job-what").textContent = job.what;
  const now = job.progress.at(-1);
  const left = job.progress.map((part) => part.left_s).filter((s) => s != null).at(-1);
  const words = running ? now?.what : { done: "done", failed: "failed", refused: "refused", stopped: "stopped" }[job.state];
  at("job-left").textContent = [words, `${duration(job.seconds)} so far`.replace(running ? "" : " so far", ""),
    running && left != null && `about ${duration(left)} left`].filter(Boolean).join(" · ");
  if (now?.total) { at("job-bar").max = now.total; at("job-bar").value = now.done; }
  else at("job-bar").removeAttribute("value");
  if (running) {
    fill("job-told", sentences("note", job.warnings));
    setTimeout(trying(async () => watch(await call("job"))), 300);
    return;
  }
  seen = job.number;
  ended(job).catch((error) => tell(error.message));
}

async function ended(job) {
  const { result } = job;
  const bad = job.state === "stopped" ? "note" : "error";
  const told = [...sentences(bad, job.error ? [job.error] : []), ...sentences("note", [...job.warnings, ...(result?.notes ?? [])])];
  fill("job-told", told.map((node) => node.cloneNode(true)), sentences("good", result?.says ?? []), result?.model && job.what.startsWith("Writing")
    ? make("p", {}, act(`Open ${result.model}`, () => begin("open", { model: result.model }))) : []);
  for (const [beginning, show] of endings) if (job.what.startsWith(beginning)) show(told, result);
  await refresh();
}

// ---------------------------------------------------------------- what the folder holds

const NAMES = ["state", "models", "changes", "reports", "slims", "bundles", "bundle", "adapters"];

export async function refresh() {
  const found = await Promise.all(NAMES.map((name) => call(name)));
  const held = Object.fromEntries(NAMES.map((name, i) => [name, found[i]]));
  for (const show of lists) show(held);
  watch(held.state.job);
}

/** Show a form, or where there is nothing to choose the sentence that says what makes one. */
export function offer(form, nothing, names) {
  at(form).hidden = names.length === 0;
  at(nothing).hidden = names.length > 0;
}
