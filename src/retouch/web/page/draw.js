// Elements and tables. Everything that is shown goes through text nodes, so no text is ever read as HTML.

export const at = (id) => document.getElementById(id);

export function make(name, attributes = {}, ...inside) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(key, value);
    else if (value === true) node.setAttribute(key, "");
    else if (value !== false && value != null) node.setAttribute(key, value);
  }
  node.append(...inside.flat().filter((part) => part != null && part !== ""));
  return node;
}

export function svg(name, attributes = {}, ...inside) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...inside.flat());
  return node;
}

/** A picture with words for those who do not see it. */
export const picture = (width, height, words, ...inside) =>
  svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": words }, ...inside);

export const fill = (id, ...inside) => at(id).replaceChildren(...inside.flat().filter((part) => part != null));

export function table(heads, rows, kind = null) {
  const number = heads.map((_, i) => rows.length > 0 && rows.every((row) => typeof row[i] === "number" || row[i] === "–"));
  const cell = (name, i, inside, more = {}) => make(name, { class: number[i] ? "number" : null, ...more }, inside);
  const shown = (value) => (typeof value === "number" ? probability(value) : value ?? "–");
  return make("div", { class: "scroll" }, make("table", { class: kind },
    make("thead", {}, make("tr", {}, heads.map((head, i) => cell("th", i, head, { scope: "col" })))),
    make("tbody", {}, rows.map((row) => make("tr", {}, row.map((value, i) => cell("td", i, shown(value))))))));
}

export const reported = (told) => [make("h3", {}, told.title), table(told.columns, told.rows, told.columns.length > 4 ? "told" : "told narrow"),
  told.caption ? make("p", { class: "soft" }, told.caption) : null];

export const listed = (parts) => make("dl", {}, Object.entries(parts).map(([name, value]) =>
  make("div", {}, make("dt", {}, name), make("dd", {}, value))));

export const lines = (text) => text.split("\n").map((line) => line.trim()).filter(Boolean);

export const percent = (share) => `${Number((100 * share).toPrecision(3))}\u202f%`;

export const probability = (value) => (Number.isInteger(value) ? value.toLocaleString("en") : value.toPrecision(2));

export const sentences = (kind, texts) => texts.map((text) => make("p", { class: kind }, text));

export const button = (text, click, more = {}) => make("button", { type: "button", click, ...more }, text);

export function choose(select, names, first = null) {
  const before = select.value;
  const rows = first == null ? names.map((name) => [name, name]) : [["", first], ...names.map((name) => [name, name])];
  select.replaceChildren(...rows.map(([value, text]) => make("option", { value }, text)));
  if (rows.some(([value]) => value === before)) select.value = before;
}

export function duration(seconds) {
  if (seconds < 90) return `${Math.ceil(seconds)} s`;
  return seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
}
