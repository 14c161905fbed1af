// Fuse: adapters of one base, and where they contradict each other.
import { at, choose, fill, make, picture, reported, sentences, svg } from "./draw.js";
import { begin, ending, lists, offer, trying } from "./work.js";

lists.push(({ models, adapters, state }) => {
  offer("fuse-form", "fuse-none", adapters);
  const before = at("fuse-model").value;
  choose(at("fuse-model"), models);
  if (!before && models.includes(state.model?.name)) at("fuse-model").value = state.model.name;
  const chosen = new Set(picked());
  fill("fuse-adapters", adapters.map((path) => make("label", {},
    make("input", { type: "checkbox", name: "adapter", value: path, checked: chosen.has(path) }), ` ${path}`)));
});

const picked = () => [...document.querySelectorAll("[name=adapter]:checked")].map((box) => box.value);

ending("Comparing", (told, result) => {
  const report = result?.report;
  if (!report) return fill("fuse-told", told);
  return fill("fuse-told", told, sentences("good", [report.summary]), heat(report.numbers.weights), report.tables.flatMap(reported).filter(Boolean),
    make("p", { class: "soft" }, "To resolve what lies above chance: ", make("code", {}, "retouch fuse merge … --resolve cr-sign"), " or ",
      make("code", {}, "cr-subspace"), ". To drop an adapter, leave it out there."));
});

/** Blue where adapters contradict each other more than chance, orange where less. */
function heat(weights) {
  const cells = Object.entries(weights).map(([name, found]) => {
    const [, block, ...part] = name.split(".");
    return { name, block: Number(block), part: part.join("."), ...found };
  });
  if (!cells.length) return [];
  const parts = [...new Set(cells.map((cell) => cell.part))];
  const most = Math.max(...cells.map((cell) => Math.abs(cell.scaled)), 0.02), blocks = 1 + Math.max(...cells.map((cell) => cell.block));
  const left = 150, wide = Math.max(10, Math.min(34, 460 / blocks)), high = 22;
  const squares = cells.map((cell) => svg("rect", { x: left + wide * cell.block, y: high * parts.indexOf(cell.part), width: wide - 1, height: high - 1,
    class: cell.scaled >= 0 ? "more" : "less", "fill-opacity": Math.abs(cell.scaled) / most },
    svg("title", {}, `${cell.name}: conflict ${cell.conflict.toFixed(3)}, by chance ${cell.null.toFixed(3)}`)));
  const names = parts.map((part, i) => svg("text", { x: left - 8, y: high * i + 15, "text-anchor": "end" }, part));
  const every = Math.ceil(blocks / 16);
  const numbers = [...Array(blocks).keys()].filter((b) => b % every === 0).map((b) =>
    svg("text", { x: left + wide * (b + 0.5), y: high * parts.length + 14, "text-anchor": "middle" }, String(b)));
  const frame = svg("rect", { x: left - 0.5, y: 0.5, width: wide * blocks, height: high * parts.length - 1, class: "frame" });
  return [make("h3", {}, "Conflict above chance, by block"), make("div", { class: "scroll wide" },
    picture(left + wide * blocks + 12, high * parts.length + 20, "Conflict above chance by weight and block; the table below has the numbers.",
      squares, frame, names, numbers)),
    make("p", { class: "soft" }, `Blue: more than chance; orange: less; empty: as much as chance. Full colour: ${most.toPrecision(2)} of the largest possible excess.`)];
}

at("fuse-form").addEventListener("submit", trying(async () => {
  const adapters = picked();
  if (adapters.length < 2) throw new Error("Tick two or more adapters.");
  await begin("compare", { model: at("fuse-model").value, adapters, base_unverified: at("fuse-unverified").checked,
    targets_from_tensors: at("fuse-pattern").checked });
}));
