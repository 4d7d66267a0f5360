// Small helpers. All text becomes text nodes: what checkpoints and users wrote is never read as HTML.

export const find = (id) => document.getElementById(id);

/** An element with attributes and children; `text` and event handlers (`onclick`) are properties. */
export function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "text") element.textContent = value;
    else if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value === true) element.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}

/** A row of a list of bars: a name, a figure, and a bar where the share (0 to 1) is known. */
export function bar(name, figure, share, note) {
  const filled = make("span", { class: "fill" });
  if (share !== null) filled.style.width = `${Math.max(0, Math.min(1, share)) * 100}%`;
  const parts = [make("span", { class: "name", text: name }), make("span", { class: "figure", text: figure })];
  if (share !== null) parts.push(make("span", { class: "track", "aria-hidden": "true" }, filled));
  if (note) parts.push(make("span", { class: "note", text: note }));
  return make("li", {}, ...parts);
}

/** Pairs of a term and what it says, for a `dl`. */
export const terms = (pairs) =>
  pairs.map(([term, said]) => make("div", {}, make("dt", { text: term }), make("dd", { text: said })));

/** A number with about three digits that matter. */
export function digits(value) {
  if (value === 0 || Math.abs(value) >= 100) return Math.round(value).toLocaleString("en");
  return Math.abs(value) >= 10 ? value.toFixed(1) : value.toFixed(2);
}
