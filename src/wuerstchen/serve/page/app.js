// The page: one form, the session's entries, and what happens between them and the service.

import { Refused, Unreachable, cancelJob, follow, getJson, onTokenNeeded, postJob, setToken } from "./api.js";
import { Picked, Sides } from "./compare.js";
import { announce, byId, hide, icon, keep, local, say, sayOrHide } from "./dom.js";
import { EntryView, isOver, pictureOf } from "./entry.js";
import { Form } from "./form.js";
import * as history from "./history.js";
import { duration, fromHash, inPlainWords, resolved, toBody, toHash, wordOf } from "./settings.js";
import { Viewer } from "./viewer.js";

const TITLE = document.title;
const FADES = 8000; // ms that a note stays

let model = null;
let entries = [];
const views = new Map();

for (const element of document.querySelectorAll("[data-icon]")) element.append(icon(element.dataset.icon));

// ---- the service's state

const waiting = new Set(); // what is to be tried again once the service is back
let away = null; // the timer of the next try
let tries = 0;

function lost(text = "The service does not answer; trying again") {
  byId("banner").hidden = false;
  say(byId("banner-text"), text[0].toUpperCase() + text.slice(1));
  if (away === null) {
    tries += 1;
    away = setTimeout(look, Math.min(500 * 1.6 ** tries, 6000));
  }
}

async function look() {
  clearTimeout(away);
  away = null;
  try {
    const told = await getJson("v1/model");
    const first = model === null;
    model = told;
    tries = 0;
    if (!byId("banner").hidden) announce("The service answers");
    hide(byId("banner"));
    byId("model").textContent = [model.name, model.device].filter((part) => part).join(" · ");
    form.setModel(model);
    for (const element of document.querySelectorAll(".kept-for")) say(element, actions.kept());
    if (first) begin();
    for (const again of waiting) again();
    waiting.clear();
  } catch (error) {
    if (error instanceof Refused && error.status === 401) {
      say(byId("banner-text"), "Without a token this service draws nothing.");
      byId("banner").hidden = false;
    } else if (error instanceof Refused) {
      lost(error.message);
    } else if (error instanceof Unreachable) {
      lost();
    } else {
      throw error;
    }
  }
}

byId("banner-retry").addEventListener("click", look);

// ---- the token

onTokenNeeded((wrong) => new Promise((resolve) => {
  const dialog = byId("token");
  let given = false;
  sayOrHide(byId("token-error"), wrong ? "The service does not know this token; give another" : "");
  byId("token-value").value = "";
  const submit = (event) => {
    event.preventDefault();
    const token = byId("token-value").value.trim();
    // A header holds visible ASCII alone; anything else would fail before it is sent.
    if (!/^[\x21-\x7e]+$/.test(token)) {
      sayOrHide(byId("token-error"), token ? "A token has letters, digits and signs of ASCII alone" : "There is no token yet");
      return;
    }
    setToken(token);
    given = true;
    dialog.close();
  };
  byId("token-form").addEventListener("submit", submit);
  dialog.addEventListener("close", () => {
    byId("token-form").removeEventListener("submit", submit);
    resolve(given);
  }, { once: true });
  dialog.showModal();
  byId("token-value").focus();
}));
byId("token-cancel").addEventListener("click", () => byId("token").close());

// ---- notes

let fading = null;
function note(text, { act, called = "Undo", link } = {}) {
  clearTimeout(fading);
  say(byId("toast-words"), text);
  byId("toast-act").hidden = !act;
  say(byId("toast-act"), called);
  byId("toast-act").onclick = () => {
    hide(byId("toast"));
    act();
  };
  byId("toast-link").hidden = !link;
  byId("toast-link").value = link ?? "";
  byId("toast").hidden = false;
  if (link) byId("toast-link").select();
  else fading = setTimeout(fade, FADES);
}
function fade() {
  // Not below somebody's hand.
  if (byId("toast").matches(":hover, :focus-within")) fading = setTimeout(fade, FADES);
  else byId("toast").hidden = true;
}
byId("toast-link").addEventListener("blur", () => (byId("toast").hidden = true));

// ---- drawing

const newPart = (settings, original) => ({
  id: null, state: "sending", settings, total: settings.count ?? 1, images: [], error: null, notices: [], live: { original, previews: new Map() },
});

function show(entry, at = 0) {
  const view = new EntryView(entry, actions);
  views.set(entry, view);
  entries.splice(at, 0, entry);
  byId("entries").insertBefore(view.element, byId("entries").children[at] ?? null);
  arrange();
}

function drop(entry) {
  const at = entries.indexOf(entry);
  entries = entries.filter((each) => each !== entry);
  views.get(entry).element.remove();
  views.delete(entry);
  arrange();
  return at;
}

function arrange() {
  byId("empty").hidden = entries.length > 0;
  if (entries.some(({ parts }) => parts.every(isOver))) byId("clear").hidden = false;
  else hide(byId("clear"));
  byId("feed-head").hidden = entries.length === 0;
}

function changed(entry) {
  views.get(entry)?.update();
  arrange();
  const running = entries.flatMap(({ parts }) => parts).filter((part) => !isOver(part));
  const share = running.reduce((sum, { live }) => sum + (live.fraction ?? 0), 0) / (running.length || 1);
  document.title = running.length ? `${Math.round(100 * share)} % · ${TITLE}` : TITLE;
}

/** Sends an entry's parts and follows them. Raises what the service refused, after the entry is taken away again. */
async function draw(parts) {
  const entry = { parts };
  show(entry);
  try {
    for (const part of parts) {
      const job = await postJob(toBody(part.settings, part.live.original));
      Object.assign(part, { id: job.id, state: "queued", total: history.total(job.total) ?? part.total });
      part.settings = resolved(part.settings, job.settings);
      part.live.position = job.position;
      changed(entry);
      history.save(entries);
      track(entry, part);
    }
  } catch (error) {
    const sent = parts.filter(({ id }) => id);
    if (sent.length === 0) drop(entry);
    for (const part of parts.filter(({ id }) => !id)) Object.assign(part, { state: "failed", error: error.message });
    changed(entry);
    if (error instanceof Unreachable) lost();
    throw error;
  }
  return entry;
}

async function track(entry, part) {
  const { live } = part;
  const take = (raw) => {
    const image = history.picture(raw);
    if (!image) return;
    part.images = [...part.images.filter(({ index }) => index !== image.index), image].sort((a, b) => a.index - b.index);
  };
  const end = (state, message = null) => {
    part.state = state;
    part.error = state === "failed" ? inPlainWords(message ?? part.error ?? "The service gave no reason") : null;
    delete live.previews;
  };
  const on = {
    lost() {
      live.lost = true;
      changed(entry);
      lost();
    },
    snapshot(job) {
      live.lost = false;
      if (live.stage === undefined) live.fraction = share(job.progress);
      live.position = job.position;
      if (Array.isArray(job.images)) job.images.forEach(take);
      part.notices = history.texts(job.notices);
      if (["done", "failed", "cancelled"].includes(job.state)) end(job.state, messageOf(job.error));
      else part.state = job.state;
      on.seen();
    },
    event(name, data) {
      if (typeof data !== "object" || data === null) return;
      live.lost = false;
      if (name === "queued") live.position = data.position;
      else if (name === "running") part.state = "running";
      else if (name === "progress") {
        part.state = "running";
        Object.assign(live, { stage: data.stage, step: data.step, steps: data.steps, fraction: share(data.fraction) });
      } else if (name === "preview") live.previews?.set(data.index, previewAddress(data.image));
      else if (name === "image") take(data);
      else if (name === "done" || name === "failed" || name === "cancelled") end(name, messageOf(data.message));
      on.seen();
    },
    seen() {
      changed(entry);
      if (isOver(part)) history.save(entries);
    },
  };
  try {
    await follow(part.id, on);
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    end("failed", error.status === 404
      ? "The service no longer knows this drawing: it was restarted, or the drawing ended long ago"
      : error.message);
    on.seen();
  }
}

const share = (value) => (Number.isFinite(value) ? value : 0);
const messageOf = (error) => [error, error?.message].find((text) => typeof text === "string") ?? null;
const previewAddress = (data) => (/^data:image\/(webp|png|jpeg);base64,/.test(data) ? data : null);

/** Brings what was just asked for into view: below the form on narrow screens, else at the top. */
function toNewest() {
  if (window.matchMedia("(max-width: 60rem)").matches) byId("pictures").scrollIntoView({ block: "start" });
  else window.scrollTo({ top: 0 });
}

let sending = false;
async function submit(settings, original, { fromForm = false } = {}) {
  if (sending) return; // a double click; the button itself stays as it is, or the focus would be lost
  sending = true;
  const seedBack = fromForm ? form.hideSeed() : () => {};
  try {
    const drawn = draw([newPart(settings, original)]);
    toNewest();
    const entry = await drawn;
    const { seed } = entry.parts[0].settings;
    if (fromForm && seed !== undefined && seed !== null) form.showSeed(seed);
  } catch (error) {
    seedBack();
    if (!(error instanceof Refused || error instanceof Unreachable)) throw error;
    form.showError(error.param, error instanceof Unreachable ? "The service does not answer; your settings are kept, try again" : error.message);
  } finally {
    sending = false;
  }
}

// ---- what entries and pictures can do

const actions = {
  model: () => model,
  /** For how long the service keeps images, in words. */
  kept: () => (Number.isFinite(model?.limits?.result_seconds) ? `up to ${duration(model.limits.result_seconds)}` : "a limited time"),
  canSend: (part) => Boolean(part.live.original) || (part.settings.kind !== "reconstruct" && part.settings.strength === undefined),
  use(part) {
    if (!model) return;
    const undo = undoing(part.settings);
    form.setImage(part.live.original ?? null, part.settings.kind === "reconstruct" ? "reconstruct" : "variation");
    // A reconstruction has no prompt: what is written stays.
    const texts = part.settings.kind === "reconstruct" ? form.texts() : {};
    form.write({ ...part.settings, ...texts });
    const missing = !actions.canSend(part);
    note(missing ? "Settings restored; the picture that was given is not kept, choose it again" : "Settings restored", undo);
    byId("prompt").focus({ preventScroll: true });
    byId("form").scrollIntoView({ block: "start" });
  },
  again(part, seed) {
    submit({ ...part.settings, seed }, part.live.original);
  },
  async link(settings) {
    const link = new URL(toHash(settings), location.href).href;
    try {
      await navigator.clipboard.writeText(link);
      note("Link copied");
    } catch {
      note("Copy this link:", { link }); // a page without TLS may not write to the clipboard
    }
  },
  remove(entry) {
    const at = drop(entry);
    byId("pictures").focus({ preventScroll: true });
    history.save(entries);
    note("Removed", { act: () => putBack([[at, entry]]) });
  },
  pick: (picture) => picked.toggle(picture),
  isPicked: (picture) => picked.has(picture),
  open: (picture) => viewer.open(picture),
  onceBack(again) {
    waiting.add(again);
    lost();
  },
  update: () => { for (const view of views.values()) view.update(); },
  async begin({ url }) {
    form.setImage(null);
    try {
      const response = await fetch(url);
      if (!response.ok) throw new Error(`status ${response.status}`);
      const blob = await response.blob();
      await form.choose(new File([blob], "picture.png", { type: blob.type }), false);
      byId("form").scrollIntoView({ block: "start" });
    } catch {
      note("The picture is no longer there");
    }
  },
  async cancel(part) {
    if (part.id === null || part.live.cancelling) return;
    part.live.cancelling = true;
    actions.update();
    try {
      await cancelJob(part.id);
    } catch (error) {
      part.live.cancelling = false;
      actions.update();
      note(error instanceof Refused ? error.message : "The service does not answer; try again");
    }
  },
};

function putBack(removed) {
  for (const [at, entry] of removed) show(entry, at);
  history.save(entries);
}

byId("clear").addEventListener("click", () => {
  // The first to go back is the one that stood first.
  const removed = entries.map((entry, at) => [at, entry]).filter(([, { parts }]) => parts.every(isOver));
  for (const [, entry] of removed) drop(entry);
  history.save(entries);
  note(removed.length === 1 ? "One entry removed" : `${removed.length} entries removed`, { act: () => putBack(removed) });
});

function allPictures() {
  const parts = entries.flatMap((entry) => entry.parts).filter(({ live }) => !live.gone);
  return parts.flatMap((part) => part.images.map((image) => pictureOf(part, image)));
}

// ---- the form

const form = new Form({
  onFound(settings) {
    if (settings.prompt) note("This picture holds its settings", { act: () => useFound(settings), called: "Use them" });
  },
  onExample() {
    const undo = model.examples.includes(form.texts().prompt) ? {} : undoing();
    if (undo.act) note("An example in place of your prompt", undo);
  },
});
/** For a note: brings back the words of the form, where `settings` are about to come in place of others. */
function undoing(settings = {}) {
  const { prompt } = form.texts();
  return prompt.trim() && prompt !== settings.prompt ? { act: form.keep() } : {};
}
function useFound(settings) {
  const undo = undoing(settings);
  form.write(settings);
  if (undo.act) note("Settings restored", undo);
  byId("prompt").focus();
}
const viewer = new Viewer(allPictures, actions);
const picked = new Picked({
  changed: actions.update,
  sides: (settings) => sides.open(settings, model),
});
const sides = new Sides(async (both) => {
  try {
    const drawn = draw(both.map((settings) => newPart(settings)));
    toNewest();
    await drawn;
  } catch (error) {
    if (!(error instanceof Refused || error instanceof Unreachable)) throw error;
    form.showError(null, error.message);
  }
});

// A key that is held down is one press: else a queue is full of one drawing.
document.addEventListener("keydown", (event) => {
  const newLine = event.target.matches("textarea") && !event.ctrlKey && !event.metaKey;
  if (event.key !== "Enter" || !event.repeat || newLine) return;
  event.preventDefault();
  event.stopPropagation();
}, { capture: true });
byId("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (!model) {
    form.showError(null, "The service does not answer yet; your settings are kept");
    return;
  }
  if (!(await form.settled())) return; // why stands beside the image
  const settings = form.read();
  if (settings) submit(settings, form.image, { fromForm: true });
});
byId("compare").addEventListener("click", () => {
  if (!model) return;
  const settings = form.read();
  if (settings) sides.open(settings, model);
});
say(byId("draw-keys"), /Mac|iPhone|iPad/.test(navigator.platform) ? "⌘ ↵" : "Ctrl ↵");

// ---- pictures from elsewhere

const heldFile = (list) => [...(list ?? [])].find((file) => file.type.startsWith("image/")) ?? list?.[0];
document.addEventListener("paste", (event) => {
  // Office programs copy a picture of a text beside it.
  if (event.clipboardData?.types.includes("text/plain")) return;
  const file = heldFile(event.clipboardData?.files);
  if (file && !document.querySelector("dialog[open]")) {
    event.preventDefault();
    form.choose(file);
  }
});
for (const kind of ["dragenter", "dragover"]) {
  document.addEventListener(kind, (event) => {
    if (!event.dataTransfer?.types.includes("Files")) return;
    event.preventDefault();
    document.body.classList.add("dropping");
  });
}
document.addEventListener("dragleave", (event) => {
  if (event.relatedTarget === null) document.body.classList.remove("dropping");
});
document.addEventListener("drop", (event) => {
  document.body.classList.remove("dropping");
  if (!event.dataTransfer?.types.includes("Files")) return;
  event.preventDefault(); // the browser would leave the page for the file
  const file = heldFile(event.dataTransfer.files);
  if (file && !document.querySelector("dialog[open]")) form.choose(file);
});

// ---- links

function takeLink() {
  const link = fromHash(location.hash, model);
  if (link === null) return;
  // The link has been taken: a reload must not take it once more, over what was changed since.
  window.history.replaceState(null, "", location.pathname + location.search);
  const { kind, strength, ...settings } = link.settings;
  const undo = Object.keys(settings).length ? undoing(settings) : {};
  if (Object.keys(settings).length) {
    form.setImage(null);
    form.write(settings);
  }
  const refused = link.refused.map(wordOf).join(", ");
  const parts = [
    Object.keys(settings).length ? "Settings restored from the link" : "The link holds no settings that can be used",
    refused && `not usable here: ${refused}`,
    (kind === "reconstruct" || strength !== undefined) && "the picture to begin with is not in a link, choose it again",
  ];
  note(parts.filter((part) => part).join("; "), undo);
}
window.addEventListener("hashchange", () => model && takeLink());

// ---- the theme

const THEMES = ["auto", "light", "dark"];
const theme = () => document.documentElement.dataset.theme ?? "auto";
function showTheme() {
  byId("theme").replaceChildren(icon("theme"), { auto: "Auto", light: "Light", dark: "Dark" }[theme()]);
  byId("theme").setAttribute("aria-label", `Theme: ${theme()}; change it`);
}
byId("theme").addEventListener("click", () => {
  const next = THEMES[(THEMES.indexOf(theme()) + 1) % THEMES.length];
  if (next === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = next;
  keep(local, "wuerstchen.theme", next);
  showTheme();
});
showTheme();

// ---- start

for (const { parts } of history.load()) {
  show({ parts: parts.map((part) => ({ ...part, live: { previews: new Map() } })) }, entries.length);
}
arrange();

/** What needs the model, once it is known. */
function begin() {
  takeLink();
  for (const entry of entries) for (const part of entry.parts) if (!isOver(part) && part.id) track(entry, part);
}

look();
