// Slim: a saved classifier, what it answers, and what a threshold costs.
import { at, choose, fill, lines, listed, make, percent, picture, reported, sentences, svg, table } from "./draw.js";
import { call, lists, offer, trying } from "./work.js";

let model = null; // what was measured of the one that is chosen
let points = []; // its thresholds that differ, from the slowest to the fastest

lists.push(({ slims }) => {
  offer("slim-form", "slim-none", slims);
  choose(at("slim-model"), slims);
  if (slims.length && model?.path !== at("slim-model").value) trying(showSlim)();
});

async function showSlim() {
  const path = at("slim-model").value;
  [model, points] = [null, []]; // what is shown and asked is the one that is chosen, or none
  for (const id of ["slim-facts", "slim-told", "slim-trade", "slim-picture"]) fill(id);
  const told = await call(`slim?path=${encodeURIComponent(path)}`);
  if (path !== at("slim-model").value) return; // another one was chosen meanwhile
  model = told;
  const known = model.curve.some((point) => point.certified);
  points = model.curve.filter((p, i, all) => i === 0 || p.flops_ratio !== all[i - 1].flops_ratio || p.quality !== all[i - 1].quality
    || p.threshold === model.threshold);
  at("slim-pairs").hidden = !model.pairs;
  at("slim-point").max = points.length - 1;
  fill("slim-facts", listed({ task: model.task, answers: model.labels?.join(", ") ?? "a number", ...model.numbers }),
    sentences("good", model.says),
    make("details", {}, make("summary", {}, "Who leaves where"), reported(model.exits).slice(1)),
    known ? make("p", { class: "soft" }, "Thresholds whose harm is certified are filled in the picture.") : null);
  at("slim-threshold").value = round(model.threshold);
  showPoint();
}

const round = (threshold) => Number(threshold.toPrecision(6));

/** The threshold in the field; a measured one was shown rounded, and is meant whole. */
function threshold() {
  const given = Number(at("slim-threshold").value);
  return [model.threshold, ...points.map((p) => p.threshold)].find((whole) => round(whole) === given) ?? given;
}

/** The measured point of the threshold in the field: the last one that is not above it. */
const place = () => Math.max(0, points.findLastIndex((p) => round(p.threshold) <= Number(at("slim-threshold").value)));

function showPoint() {
  const i = place(), point = points[i];
  at("slim-point").value = i;
  const words = point ? `Measured at ${round(point.threshold)}: ${model.metric} ${point.quality.toFixed(3)} at ${percent(point.flops_ratio)} of the original's FLOPs, `
    + `${point.exit_layer.toFixed(2)} blocks on average (the original: ${model.quality_base.toFixed(3)})` : "";
  at("slim-trade").textContent = words;
  at("slim-point").setAttribute("aria-valuetext", words);
  fill("slim-picture", points.length > 1 ? tradeoff(point) : []);
}

function tradeoff(chosen) {
  const [width, height, left, bottom] = [440, 170, 46, 34];
  const qualities = [...points.map((p) => p.quality), model.quality_base];
  const low = Math.min(...qualities), high = Math.max(...qualities), most = Math.max(...points.map((p) => p.flops_ratio));
  const x = (p) => left + (width - left - 12) * p.flops_ratio / most;
  const y = (quality) => 12 + (height - bottom - 20) * (high > low ? (high - quality) / (high - low) : 0.5);
  const dot = (p) => svg("circle", { cx: x(p), cy: y(p.quality), r: p === chosen ? 7 : 3.5,
    class: p === chosen ? "chosen" : p.certified ? "dot" : "dot open" });
  const word = (text, px, py, anchor = "middle") => svg("text", { x: px, y: py, "text-anchor": anchor }, text);
  return picture(width, height, `${model.metric} against FLOPs; ${at("slim-trade").textContent}`,
    svg("line", { x1: left, x2: width - 12, y1: y(model.quality_base), y2: y(model.quality_base), class: "level" }),
    svg("path", { d: `M${left} 4V${height - bottom}H${width - 4}`, class: "axis" }),
    svg("polyline", { points: points.map((p) => `${x(p)},${y(p.quality)}`).join(" "), class: "curve" }),
    points.map(dot), word(high.toFixed(2), left - 6, y(high) + 4, "end"), high > low ? word(low.toFixed(2), left - 6, y(low) + 4, "end") : [],
    word("0", left, height - bottom + 15), word(percent(most), width - 24, height - bottom + 15),
    word(`${model.metric} against FLOPs, as a share of the original's`, (width + left) / 2, height - 4));
}

// ---------------------------------------------------------------- answers

async function answer() {
  if (!model) throw new Error("No model is shown. Choose one.");
  const texts = lines(at("slim-texts").value), second = model.pairs ? lines(at("slim-second").value) : [];
  if (!texts.length) throw new Error("There is no text. Write one a line.");
  const found = await call("classify", { slim: model.path, texts, second, threshold: threshold() });
  const named = Boolean(model.labels);
  const heads = ["Text", ...(named ? ["Label", "Probability"] : ["Value"]), "Left after", "FLOPs", ...(named ? ["Exits"] : [])];
  const rows = found.said.map((said) => [text(said), ...(named ? [said.label] : []), score(said), `block ${said.exit_block}`,
    percent(said.flops), ...(named ? [strip(said)] : [])]);
  fill("slim-told", table(heads, rows, "narrow"), make("p", { class: "soft" }, "FLOPs are a share of what the original spends on the same text. ",
    named ? "A bar is an exit: its height the probability, blue where it says what was answered; the framed one answered." : ""));
}

const score = (said) => model.labels ? said.score.toFixed(3) : String(Number(said.score.toPrecision(5)));

const text = (said) => make("details", {}, make("summary", {}, said.second == null ? said.text : `${said.text} | ${said.second}`),
  table(["Exit", ...(model.labels ? ["Says", "Probability"] : ["Value"]), "Unsure"], said.exits.map((exit) => [
    `block ${exit.block}${exit.block === said.exit_block ? ", answered" : ""}`, ...(model.labels ? [exit.label] : []),
    score(exit), exit.unsure == null ? "not asked" : exit.unsure.toFixed(3)])));

function strip(said) {
  const words = said.exits.map((e) => `block ${e.block}: ${e.label} ${score(e)}`).join("; ");
  return picture(12 * said.exits.length + 2, 30, words, said.exits.flatMap((exit, i) => [
    svg("rect", { x: 12 * i + 3, y: 28 - 26 * exit.score, width: 8, height: 26 * exit.score, class: exit.label === said.label ? "same" : "other" }),
    ...(exit.block === said.exit_block ? [svg("rect", { x: 12 * i + 1, y: 1, width: 12, height: 28, class: "frame" })] : [])]));
}

at("slim-model").addEventListener("change", trying(showSlim));
at("slim-form").addEventListener("submit", trying(answer));
at("slim-threshold").addEventListener("input", showPoint);
at("slim-point").addEventListener("input", () => {
  at("slim-threshold").value = round(points[Number(at("slim-point").value)]?.threshold ?? 0);
  showPoint();
});
at("slim-point").addEventListener("change", trying(async () => {
  if (at("slim-told").childElementCount) await answer();
}));
