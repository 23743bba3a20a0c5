// Elements, without markup from strings: every value becomes text.

const SVG = "http://www.w3.org/2000/svg";

/** h("p", {class: "soft", onclick: f}, "text", child): an element. null and false children and attributes are left out. */
export function h(tag, attributes, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

export function svg(tag, attributes, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [key, one] of Object.entries(value)) element.style.setProperty(key, one);
    else if (name === "value") element.value = value;
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  put(element, ...children);
  return element;
}

/** Append children; strings and numbers as text. */
export function put(element, ...children) {
  for (const child of children.flat(Infinity)) {
    if (child !== null && child !== undefined && child !== false) {
      element.append(child instanceof Node ? child : String(child));
    }
  }
}

const CAN_FOCUS = "a[href], button:not(:disabled), input:not(:disabled), select, textarea, summary, [tabindex]";

/** Put these in the place of what is there. Who was at one of its links, buttons or fields is then at the one that stands for it, or near
 *  it: a list that is drawn again does not send the keyboard back to the top of the page. In a row `of` something that is its button in
 *  the row of the same thing, wherever that is now, and never another row's, which Enter would press. */
export function replace(element, ...children) {
  const at = document.activeElement;
  const held = element.contains(at) && element !== at;
  const row = held ? at.closest("[data-of]") : null;
  const of = element.contains(row) ? row.dataset.of : undefined;
  const within = () => (of === undefined ? element : [...element.querySelectorAll("[data-of]")].find((one) => one.dataset.of === of));
  const before = held ? [...within().querySelectorAll(CAN_FOCUS)] : [];
  element.replaceChildren();
  put(element, ...children);
  if (!held) return;
  const now = [...within()?.querySelectorAll(CAN_FOCUS) ?? []];
  const like = now.filter((one) => one.tagName === at.tagName && (at.href ? one.href === at.href : one.textContent === at.textContent));
  const index = Math.min(before.indexOf(at), now.length - 1);
  const near = of === undefined || now.length === before.length ? now[index] : null;
  const found = like.includes(now[index]) ? now[index] : like[0] ?? near ?? element.querySelector("[tabindex]") ?? document.querySelector("#main");
  found?.focus({preventScroll: true});
}

/** A text that is set only when it differs, so that readers of the screen are not told twice. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

let made = 0;

/** A name that somebody chose: what it does to the direction of writing stays within it. */
export function named(text) {
  return h("bdi", null, text);
}

/** A field with its label. */
export function field(label, input, hint) {
  input.id ||= `field-${++made}`;
  const about = hint ? h("small", {id: `${input.id}-hint`}, hint) : null;
  if (about) input.setAttribute("aria-describedby", about.id);
  return h("div", {class: "field"}, h("label", {for: input.id}, label), input, about);
}

export function select(options, value, attributes) {
  const all = options.map((one) => (Array.isArray(one) ? one : [one, one]));
  const element = h("select", attributes, all.map(([id, text]) => h("option", {value: id}, text)));
  element.value = value;
  return element;
}

export const ACTIONS = "actions"; // the head of a column of buttons, which is told and not shown

export function table(caption, heads, rows) {
  for (const one of rows) heads.forEach((head, i) => { if (head !== ACTIONS) one.children[i].dataset.label = head; }); // for narrow screens
  return h("div", {class: "scrolls", tabindex: "0", role: "region", "aria-label": caption}, h("table", {class: "stacked"},
    h("caption", {class: "unseen"}, caption),
    h("thead", null, h("tr", null, heads.map((head) => h("th", {scope: "col"}, head === ACTIONS ? h("span", {class: "unseen"}, head) : head)))),
    h("tbody", null, rows)));
}

export function row(...cells) {
  return rowOf(null, ...cells);
}

/** The row of something with an id: drawn again, it is known by that. */
export function rowOf(id, ...cells) {
  return h("tr", {"data-of": id}, cells.map((cell) => h("td", null, cell)));
}

/** What to do where there is nothing yet. */
export function empty(text, ...commands) {
  return h("div", {class: "empty"}, h("p", null, text), commands.map((one) => h("pre", null, h("code", null, one))));
}

/** Stands in a place until what is asked for comes; it is seen when that takes a while. */
export function loading() {
  return h("p", {class: "soft loading"}, "loading …");
}

export function badge(text, kind) {
  return h("span", {class: `badge ${kind ?? text}`}, text);
}
