// Recommend: a saved recommender, a history that is typed, what is recommended and why.
import { at, button, choose, fill, lines, listed, make, reported, sentences, table } from "./draw.js";
import { begin, call, ending, lists, offer, trying } from "./work.js";

lists.push(({ bundles, bundle, models }) => {
  offer("bundle-form", "bundle-none", bundles);
  choose(at("bundle-name"), bundles);
  choose(at("bundle-llm"), models, "none: what is stored");
  at("title-form").hidden = at("recommend-form").hidden = !bundle;
  if (!bundle) return fill("bundle-told");
  if (bundles.includes(bundle.path)) at("bundle-name").value = bundle.path;
  const [first, ...more] = bundle.says;
  return fill("bundle-told", listed({ recommender: bundle.path, ...bundle.numbers }), sentences(bundle.serves === "policy" ? "good" : "note", [first]), sentences("note", more),
    make("details", {}, make("summary", {}, "Certificate and health of the codes"), bundle.tables.flatMap(reported).filter(Boolean)));
});

// ---------------------------------------------------------------- titles

let waiting = null;
let offered = [];

at("title").addEventListener("input", () => {
  clearTimeout(waiting);
  if (offered.some((item) => item.title === at("title").value)) return; // chosen from the list
  if (at("title").value.trim().length > 2) waiting = setTimeout(trying(find), 300);
});

async function find() {
  offered = await call(`titles?text=${encodeURIComponent(at("title").value)}`);
  fill("titles", offered.map((item) => make("option", { value: item.title }, item.id)));
}

/** Put what was typed, or else the nearest title, at the end of the history. */
async function add() {
  const typed = at("title").value.trim();
  if (!typed) return;
  await find();
  if (!offered.length) throw new Error(`No title is near ${typed}.`);
  const exact = offered.filter((item) => item.title.toLowerCase() === typed.toLowerCase());
  if (!exact.length) return void fill("title-told", "Which one? ", offered.map((item) => button(item.title, () => put(item, offered))));
  if (exact.length > 1) return void fill("title-told", "Which one? ", exact.map((item) => button(`${item.title} (${item.id})`, () => put(item, exact))));
  put(exact[0], exact);
}

function put(item, among) {
  const alone = among.filter((other) => other.title === item.title).length === 1;
  at("history").value = [...lines(at("history").value), alone ? item.title : item.id].join("\n");
  at("title").value = "";
  fill("title-told");
  at("title").focus();
}

at("title-form").addEventListener("submit", trying(add));

// ---------------------------------------------------------------- what is recommended

const RUNGS = {
  fresh: "with what the language model says now",
  stale: "with knowledge that is a little old",
  prototype: "with the knowledge of people with the same instruction codes",
  reference: "by the recommender without knowledge",
  popular: "the most popular items",
};

ending("Recommending", (told, result) => {
  const found = result?.items;
  if (!found) return fill("recommend-told", told);
  const { answer } = found;
  const why = new Map(answer.reasons.map((reason) => [reason.id, reason]));
  return fill("recommend-told", told,
    make("p", { class: "good" }, `For ${found.history.map((item) => item.title).join("; ")}: ${RUNGS[answer.rung]} (${answer.rung})`
      + `${answer.exact ? "; no other item would score higher." : "."}`),
    found.codes.length ? make("p", { class: "soft" }, `Instruction codes of this history: ${found.codes.join("; ")}.`) : null,
    table(["", "Title", "Id", "Score"], answer.items.map((item, i) => [i + 1, why.has(item.id) ? reason(item, why.get(item.id)) : item.title,
      item.id, item.score]), "narrow"),
    make("p", { class: "soft" }, "Scores are log-likelihoods in nats; of the most popular items, how often each was taken."));
});

const nats = (drop) => `${drop > 0 ? "−" : "+"}${Math.abs(drop).toFixed(2)}`;
const standing = (place, beams) => place ?? `${beams + 1} or later`;

function reason(item, told) {
  const rows = told.history.map((without) => [`without ${without.title} in the history`, nats(without.drop), standing(without.place, told.beams)]);
  if (told.with_knowledge) {
    rows.push(["without the language model's knowledge", nats(told.served.score - told.without_knowledge.score),
      standing(told.without_knowledge.place, told.beams)]);
    rows.push(["by the recommender that was trained without knowledge", nats(told.served.score - told.reference.score),
      standing(told.reference.place, told.beams)]);
  }
  const parts = told.parts.map((part) => [`without the knowledge of ${part.group}`, nats(part.drop), "–"]);
  return make("details", {}, make("summary", {}, item.title), make("p", {}, told.sentence),
    table(["What if", "Score, nats", "Place"], [...rows, ...parts].map((row) => row.map(String))));
}

at("bundle-form").addEventListener("submit", trying(async () => {
  fill("recommend-told");
  await begin("open_bundle", { bundle: at("bundle-name").value, llm: at("bundle-llm").value || null });
}));
at("recommend-form").addEventListener("submit", trying(async () => {
  const history = lines(at("history").value);
  if (!history.length) throw new Error("The history is empty. Write titles, a line each.");
  await begin("recommend", { history, k: Number(at("recommend-k").value) });
}));
