// The page: connects the form, the entries of the session and the service.

import { Refused, Unreachable, cancelJob, follow, getJson, onTokenNeeded, postJob, setToken } from "./api.js";
import { Picked, Sides } from "./compare.js";
import { announce, byId, hide, icon, keep, local, say, sayOrHide } from "./dom.js";
import { EntryView, isOver, imageOf } from "./entry.js";
import { Form } from "./form.js";
import * as history from "./history.js";
import { Live } from "./live.js";
import { duration, fromHash, inPlainWords, resolved, toBody, toHash, wordOf } from "./settings.js";
import { Viewer } from "./viewer.js";

const TITLE = document.title;
const NOTE_MS = 8000;

let model = null;
let entries = [];
const views = new Map();

for (const element of document.querySelectorAll("[data-icon]")) element.append(icon(element.dataset.icon));

// ---- connection to the service

const waiting = new Set(); // functions to call once the service is back
let away = null; // timer of the next try
let tries = 0;

function lost(text = "The service is not responding. Trying again…") {
  byId("banner").hidden = false;
  say(byId("banner-text"), text);
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
    if (!byId("banner").hidden) announce("The service is back");
    hide(byId("banner"));
    byId("model").textContent = [model.name, model.device].filter((part) => part).join(" · ");
    form.setModel(model);
    for (const element of document.querySelectorAll(".kept-for")) say(element, actions.kept());
    if (first) start();
    for (const again of waiting) again();
    waiting.clear();
  } catch (error) {
    if (error instanceof Refused && error.status === 401) {
      say(byId("banner-text"), "This service needs a token to generate images.");
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
  sayOrHide(byId("token-error"), wrong ? "The service does not know this token. Enter another one." : "");
  byId("token-value").value = "";
  const submit = (event) => {
    event.preventDefault();
    const token = byId("token-value").value.trim();
    // Headers can contain only visible ASCII characters.
    if (!/^[\x21-\x7e]+$/.test(token)) {
      sayOrHide(byId("token-error"), token ? "A token has only ASCII letters, digits and symbols." : "Enter a token.");
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

// ---- notes to the user

let fading = null;
function note(text, { act, label = "Undo", link } = {}) {
  clearTimeout(fading);
  say(byId("toast-words"), text);
  byId("toast-act").hidden = !act;
  say(byId("toast-act"), label);
  byId("toast-act").onclick = () => {
    hide(byId("toast"));
    act();
  };
  byId("toast-link").hidden = !link;
  byId("toast-link").value = link ?? "";
  byId("toast").hidden = false;
  if (link) byId("toast-link").select();
  else fading = setTimeout(fade, NOTE_MS);
}
function fade() {
  // Do not hide it under the pointer.
  if (byId("toast").matches(":hover, :focus-within")) fading = setTimeout(fade, NOTE_MS);
  else byId("toast").hidden = true;
}
byId("toast-link").addEventListener("blur", () => (byId("toast").hidden = true));

// ---- jobs

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
  const done = running.reduce((sum, { live }) => sum + (live.fraction ?? 0), 0) / (running.length || 1);
  document.title = running.length ? `${Math.round(100 * done)} % · ${TITLE}` : TITLE;
}

/** Sends the parts of a new entry and tracks them. If the service refuses all of them, removes the entry and raises `Refused`. */
async function draw(parts) {
  const entry = { parts };
  show(entry);
  try {
    for (const part of parts) await send(entry, part);
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

async function send(entry, part) {
  const job = await postJob(toBody(part.settings, part.live.original));
  Object.assign(part, { id: job.id, state: "queued", total: history.total(job.total) ?? part.total });
  part.settings = resolved(part.settings, job.settings);
  part.live.position = job.position;
  changed(entry);
  history.save(entries);
  track(entry, part);
}

async function track(entry, part) {
  const { live } = part;
  const take = (raw) => {
    const image = history.parseImage(raw);
    if (!image) return;
    live.old = false;
    part.images = [...part.images.filter(({ index }) => index !== image.index), image].sort((a, b) => a.index - b.index);
  };
  const end = (state, message = null) => {
    part.state = state;
    part.error = state === "failed" ? inPlainWords(message ?? part.error ?? "The service gave no reason") : null;
    if (live.old) part.images = []; // of the job before
    delete live.previews;
  };
  const on = {
    lost() {
      live.lost = true;
      changed(entry);
      lost();
    },
    job(job) {
      live.lost = false;
      if (live.stage === undefined) live.fraction = fractionOf(job.progress);
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
        Object.assign(live, { stage: data.stage, step: data.step, steps: data.steps, fraction: fractionOf(data.fraction) });
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
      ? "The service no longer knows this job. It was restarted, or the job ended long ago."
      : error.message);
    on.seen();
  }
}

const fractionOf = (value) => (Number.isFinite(value) ? value : 0);
const messageOf = (error) => [error, error?.message].find((text) => typeof text === "string") ?? null;
const previewAddress = (data) => (/^data:image\/(webp|png|jpeg);base64,/.test(data) ? data : null);

/** Scrolls to the newest entry: below the form on narrow screens, else at the top. */
function toNewest() {
  if (window.matchMedia("(max-width: 60rem)").matches) byId("images").scrollIntoView({ block: "start" });
  else window.scrollTo({ top: 0 });
}

let sending = false;
async function submit(settings, original, { fromForm = false } = {}) {
  if (sending) return; // a double click; do not disable the button, or it would lose the focus
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
    form.showError(error.param, error instanceof Unreachable ? "The service is not responding. Your settings are kept. Try again." : error.message);
  } finally {
    sending = false;
  }
}

let liveEntry = null;
/** Replaces the job of the live entry, or starts one. The service cancels the job before if it still runs. */
async function drawLive(settings, original) {
  const part = newPart(settings, original);
  part.live.quiet = true; // the stages of every change would be too much to hear
  const [before] = entries.includes(liveEntry) ? liveEntry.parts : [];
  if (before) {
    if (!isOver(before) && before.id) cancelJob(before.id).catch(() => {}); // it may be over by now
    Object.assign(part, { images: before.images });
    part.live.old = true;
    views.get(liveEntry).replace(part);
  } else {
    liveEntry = { parts: [part] };
    show(liveEntry);
  }
  try {
    form.clearErrors();
    await send(liveEntry, part);
  } catch (error) {
    if (before) views.get(liveEntry)?.replace(before);
    else drop(liveEntry);
    if (!(error instanceof Refused || error instanceof Unreachable)) throw error;
    if (error instanceof Unreachable) lost();
    form.showError(error.param, error.message);
  }
}

// ---- actions of entries and images

const actions = {
  model: () => model,
  /** How long the service keeps images, as text. */
  kept: () => (Number.isFinite(model?.limits?.result_seconds) ? `up to ${duration(model.limits.result_seconds)}` : "a limited time"),
  canSend: (part) => Boolean(part.live.original) || (part.settings.kind !== "reconstruct" && part.settings.strength === undefined),
  use(part) {
    if (!model) return;
    const undo = undoing(part.settings);
    form.setImage(part.live.original ?? null, part.settings.kind === "reconstruct" ? "reconstruct" : "variation");
    // A reconstruction has no prompt. Keep the text in the form.
    const texts = part.settings.kind === "reconstruct" ? form.texts() : {};
    form.write({ ...part.settings, ...texts });
    const missing = !actions.canSend(part);
    note(missing ? "Settings restored. Choose the image again: it was not kept." : "Settings restored", undo);
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
      note("Copy this link:", { link }); // without TLS, pages have no access to the clipboard
    }
  },
  remove(entry) {
    const at = drop(entry);
    byId("images").focus({ preventScroll: true });
    history.save(entries);
    note("Removed", { act: () => putBack([[at, entry]]) });
  },
  pick: (image) => picked.toggle(image),
  isPicked: (image) => picked.has(image),
  open: (image) => viewer.open(image),
  onceBack(again) {
    waiting.add(again);
    lost();
  },
  update: () => { for (const view of views.values()) view.update(); },
  async startFrom({ url }) {
    form.setImage(null);
    try {
      const response = await fetch(url);
      if (!response.ok) throw new Error(`status ${response.status}`);
      const blob = await response.blob();
      await form.choose(new File([blob], "image.png", { type: blob.type }), false);
      byId("form").scrollIntoView({ block: "start" });
    } catch {
      note("The image is no longer available");
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
      note(error instanceof Refused ? error.message : "The service is not responding. Try again.");
    }
  },
};

function putBack(removed) {
  for (const [at, entry] of removed) show(entry, at);
  history.save(entries);
}

byId("clear").addEventListener("click", () => {
  // Keep the order: entries are put back from the first one on.
  const removed = entries.map((entry, at) => [at, entry]).filter(([, { parts }]) => parts.every(isOver));
  for (const [, entry] of removed) drop(entry);
  history.save(entries);
  note(removed.length === 1 ? "One entry removed" : `${removed.length} entries removed`, { act: () => putBack(removed) });
});

function allImages() {
  const parts = entries.flatMap((entry) => entry.parts).filter(({ live }) => !live.gone);
  return parts.flatMap((part) => part.images.map((image) => imageOf(part, image)));
}

// ---- the form

const form = new Form({
  onChange: () => live.changed(),
  onFound(settings) {
    if (settings.prompt) note("This image contains its settings", { act: () => useFound(settings), label: "Use them" });
  },
  onExample() {
    const undo = model.examples.includes(form.texts().prompt) ? {} : undoing();
    if (undo.act) note("Prompt replaced by an example", undo);
  },
});
const live = new Live({
  read() {
    form.keepSeed();
    const settings = model && form.read({ quiet: true });
    return settings && { settings: { ...settings, count: 1 }, image: form.image };
  },
  draw: drawLive,
});
byId("live-mode").addEventListener("change", ({ target }) => {
  if (!target.checked) liveEntry = null;
  byId("live-settings").hidden = !target.checked;
  live.set(target.checked);
});
byId("seed-slider").addEventListener("input", ({ target }) => form.setSeed(Number(target.value)));

/** The undo action of a note, if applying `settings` would replace a prompt that the user wrote. */
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
const viewer = new Viewer(allImages, actions);
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

// Ignore repeats of a key that is held down. They would fill the queue.
document.addEventListener("keydown", (event) => {
  const newLine = event.target.matches("textarea") && !event.ctrlKey && !event.metaKey;
  if (event.key !== "Enter" || !event.repeat || newLine) return;
  event.preventDefault();
  event.stopPropagation();
}, { capture: true });
byId("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (!model) {
    form.showError(null, "The service is not available yet. Your settings are kept.");
    return;
  }
  if (!(await form.settled())) return; // the reason is shown next to the image
  const settings = form.read();
  if (settings) submit(settings, form.image, { fromForm: true });
});
byId("compare").addEventListener("click", () => {
  if (!model) return;
  const settings = form.read();
  if (settings) sides.open(settings, model);
});
say(byId("draw-keys"), /Mac|iPhone|iPad/.test(navigator.platform) ? "⌘ ↵" : "Ctrl ↵");

// ---- dropped and pasted images

const heldFile = (list) => [...(list ?? [])].find((file) => file.type.startsWith("image/")) ?? list?.[0];
document.addEventListener("paste", (event) => {
  // Office programs copy an image of the text along with the text.
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
  event.preventDefault(); // otherwise the browser opens the file instead of the page
  const file = heldFile(event.dataTransfer.files);
  if (file && !document.querySelector("dialog[open]")) form.choose(file);
});

// ---- links

function takeLink() {
  const link = fromHash(location.hash, model);
  if (link === null) return;
  // Apply the link only once: a reload must not overwrite later changes.
  window.history.replaceState(null, "", location.pathname + location.search);
  const { kind, strength, ...settings } = link.settings;
  const undo = Object.keys(settings).length ? undoing(settings) : {};
  if (Object.keys(settings).length) {
    form.setImage(null);
    form.write(settings);
  }
  const refused = link.refused.map(wordOf).join(", ");
  const parts = [
    Object.keys(settings).length ? "Settings restored from the link." : "The link has no usable settings.",
    refused && `Ignored: ${refused}.`,
    (kind === "reconstruct" || strength !== undefined) && "Choose the image again: links do not contain it.",
  ];
  note(parts.filter((part) => part).join(" "), undo);
}
window.addEventListener("hashchange", () => model && takeLink());

// ---- the theme

const THEMES = ["auto", "light", "dark"];
const theme = () => document.documentElement.dataset.theme ?? "auto";
function showTheme() {
  byId("theme").replaceChildren(icon("theme"), { auto: "Auto", light: "Light", dark: "Dark" }[theme()]);
  byId("theme").setAttribute("aria-label", `Theme: ${theme()}. Change theme`);
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

/** Runs once the model is known. */
function start() {
  takeLink();
  for (const entry of entries) for (const part of entry.parts) if (!isOver(part) && part.id) track(entry, part);
}

look();
