// Small helpers for elements. Nothing here parses HTML.

export const byId = (id) => document.getElementById(id);

/** Creates an element with attributes, listeners (names such as "onclick") and children. Skips null ones. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** Sets the text if it differs: screen readers repeat a text that is set again. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Shows a text, or hides the element if there is none. */
export function sayOrHide(element, text) {
  say(element, text ?? "");
  element.hidden = !text;
}

/** Hides an element. If it has the focus, moves the focus to the images, not to the top of the page. */
export function hide(element) {
  if (element.contains(document.activeElement)) byId("images").focus({ preventScroll: true });
  element.hidden = true;
}

const PATHS = {
  back: "M15 5l-7 7 7 7",
  on: "M9 5l7 7-7 7",
  close: "M6 6l12 12M18 6L6 18",
  download: "M12 4v11M7 11l5 5 5-5M5 20h14",
  link: "M10 14a4 4 0 0 0 5.7 0l3-3a4 4 0 0 0-5.7-5.7l-1 1M14 10a4 4 0 0 0-5.7 0l-3 3a4 4 0 0 0 5.7 5.7l1-1",
  compare: "M4 5h6v14H4zM14 5h6v14h-6z",
  image: "M4 5h16v14H4zM4 16l5-5 4 4 3-3 4 4M15.5 9h.01",
  theme: "M12 4a8 8 0 1 0 0 16zM12 4a8 8 0 0 1 0 16",
  dice: "M20 12a8 8 0 1 1-2.5-5.8M20 3v4.5h-4.5",
};

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  path.setAttribute("d", PATHS[name]);
  svg.append(path);
  return svg;
}

export function iconButton(name, label, onclick) {
  return make("button", { type: "button", class: "icon", "aria-label": label, title: label, onclick }, icon(name));
}

/** A storage of the browser, or a replacement in memory if it is blocked. */
function storage(name) {
  try {
    return window[name];
  } catch {
    const held = new Map();
    return { getItem: (key) => held.get(key) ?? null, setItem: (key, value) => held.set(key, value) };
  }
}
export const session = storage("sessionStorage");
export const local = storage("localStorage");

/** Writes to a storage. Does nothing if it is full or blocked. */
export function keep(storage, key, value) {
  try {
    storage.setItem(key, value);
  } catch {
    // the page works without it; only a reload loses the value
  }
}

export const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

let live;
/** Lets screen readers read a text, once they are idle. */
export function announce(text) {
  live ??= byId("live");
  live.textContent = text;
}
