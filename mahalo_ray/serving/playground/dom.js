// Making and changing elements. Every text goes in through textContent: what a model writes is never read as HTML.

const SVG = "http://www.w3.org/2000/svg";

export const $ = (id) => document.getElementById(id);

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat(Infinity)) {
    if (child !== undefined && child !== null && child !== false) node.append(child);
  }
  return node;
}

/** An HTML element: `html("p", {class: "hint"}, "text", other)`; attributes that begin with `on` are listeners. */
export const html = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);

/** An SVG element. */
export const svg = (tag, attributes = {}, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

/** Replace what is in a box, and keep the focus on the element of the same `data-key` or id if there is one. */
export function refill(box, ...children) {
  const active = box.contains(document.activeElement) ? document.activeElement : null;
  const key = active && (active.dataset.key || active.id);
  box.replaceChildren(...children.flat(Infinity).filter(Boolean));
  if (!key) return;
  const again = [...box.querySelectorAll("[data-key], [id]")].find((node) => (node.dataset.key || node.id) === key);
  if (again) again.focus({preventScroll: true});
}

/** 0.4567 -> "0.457", without minus zero. */
export function decimals(value, digits = 3) {
  const text = value.toFixed(digits);
  return Number(text) === 0 ? (0).toFixed(digits) : text.replace("-", "\u2212");
}

/** "1 answer", "2 answers". */
export const count = (number, word) => number + " " + word + (number === 1 ? "" : "s");

/** ["a", "b", "c"] -> "a, b and c". */
export function listed(words) {
  return words.length < 2 ? words.join("") : words.slice(0, -1).join(", ") + " and " + words.at(-1);
}
