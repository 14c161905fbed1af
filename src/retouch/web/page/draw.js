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

export const fill = (id, ...inside) => at(id).replaceChildren(...inside.flat().filter((part) => part != null));

export function table(heads, rows) {
  const number = heads.map((_, i) => rows.length > 0 && rows.every((row) => typeof row[i] === "number" || row[i] === "–"));
  const cell = (name, i, inside) => make(name, { class: number[i] ? "number" : null }, inside);
  const shown = (value) => (typeof value === "number" ? probability(value) : value ?? "–");
  return make("div", { class: "scroll" }, make("table", {},
    make("thead", {}, make("tr", {}, heads.map((head, i) => cell("th", i, head)))),
    make("tbody", {}, rows.map((row) => make("tr", {}, row.map((value, i) => cell("td", i, shown(value))))))));
}

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
