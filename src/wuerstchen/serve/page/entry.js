// An entry of the session: one drawing, or two beside each other, from the first word of the service to pictures.

import { announce, icon, iconButton, make, pause, say, sayOrHide } from "./dom.js";
import { brief, inShort, shared } from "./settings.js";

export const isOver = (part) => part.state === "done" || part.state === "failed" || part.state === "cancelled";

/** A picture with settings that draw it alone. */
export function pictureOf(part, image) {
  const { kind, prompt, seed, width, height } = part.settings;
  return {
    url: image.url,
    settings: {
      ...part.settings,
      kind,
      prompt: image.prompt ?? prompt,
      seed: image.seed ?? seed,
      width: image.width ?? width,
      height: image.height ?? height,
      count: 1,
    },
    canDraw: kind !== "reconstruct" && part.settings.strength === undefined,
  };
}

export const fileName = ({ settings }) => {
  const words = (settings.prompt ?? "").toLowerCase().match(/[\p{L}\p{N}]+/gu) ?? [];
  const name = settings.kind === "reconstruct" ? "reconstruction" : words.join("-").slice(0, 60) || "picture";
  return `${name}-${settings.seed ?? 0}.png`;
};

const titleOf = (settings) =>
  settings.kind === "reconstruct" ? "Reconstruction" : settings.prompt || "No prompt";

const nameOf = (settings) => brief(titleOf(settings));

/** What a running part waits for, in words. */
function words(part) {
  const { live } = part;
  if (live.cancelling) return "Cancelling…";
  if (live.lost) return "Connection lost, trying again…";
  if (part.state === "sending") return "Sending…";
  if (part.state === "queued") return live.position > 0 ? `Waiting, place ${live.position} in the queue` : "Waiting for its turn";
  if (!live.stage) return "Starting…";
  return `${live.stage}, step ${live.step} of ${live.steps}`;
}

export class EntryView {
  /** `actions`: use, again, link, remove, pick, isPicked, open, cancel, retry (see app.js). */
  constructor(entry, actions) {
    this.entry = entry;
    this.actions = actions;
    const [first] = entry.parts;
    const two = entry.parts.length > 1;
    this.parts = entry.parts.map((part, i) => new PartView(part, entry, actions, two ? "AB"[i] : null));
    this.heading = make("h3", { class: "prompt", dir: "auto" });
    this.meta = make("p", { class: "meta" });
    this.removing = iconButton("close", "Remove from the session", () => actions.remove(entry));
    const small = !two && first.total === 1 && first.settings.kind !== "reconstruct" && (first.settings.width ?? 0) <= 512;
    this.element = make("li", { class: `entry${two ? " both" : small ? " small" : ""}` },
      make("article", {}, make("header", {}, this.heading, this.removing), this.meta,
        make("div", { class: two ? "two" : "one" }, ...this.parts.map(({ element }) => element))));
    this.update();
  }

  update() {
    const [first, second] = this.entry.parts;
    if (second) {
      // What both have in common stands above them, what differs above each.
      const [both, ...own] = shared(first.settings, second.settings);
      say(this.heading, both.prompt ?? "Two prompts");
      say(this.meta, `Comparison · ${inShort(both)}`);
      this.parts.forEach((part, i) => part.update(own[i]));
    } else {
      say(this.heading, titleOf(first.settings));
      say(this.meta, inShort(first.settings));
      this.parts[0].update();
    }
    this.removing.classList.toggle("out", !this.entry.parts.every(isOver)); // its place stays: nothing jumps
    this.element.dataset.state = this.entry.parts.find((part) => !isOver(part))?.state ?? this.entry.parts.at(-1).state;
  }
}

class PartView {
  #said = "";
  #slots = new Map();

  constructor(part, entry, actions, letter) {
    this.part = part;
    this.actions = actions;
    const title = nameOf(part.settings);
    this.own = make("span", { class: "prompt", dir: "auto" });
    this.words = make("p", { class: "words" });
    this.bar = make("progress", { max: "1", "aria-label": `Progress of ${letter ?? title}` });
    this.cancel = make("button", { type: "button", class: "plain", onclick: () => actions.cancel(part) }, "Cancel");
    this.running = make("div", { class: "running" }, this.bar, this.words, this.cancel);
    this.error = make("p", { class: "error" });
    this.notice = make("p", { class: "error calm" });
    this.retry = make("button", { type: "button", class: "plain", onclick: () => actions.again(part, part.settings.seed) });
    this.newSeed = letter ? null : make("button", { type: "button", class: "plain", onclick: () => actions.again(part, null) }, "New seed");
    this.doing = make("div", { class: "actions" },
      this.retry,
      make("button", { type: "button", class: "plain", onclick: () => actions.use(part) }, "Use settings"),
      this.newSeed,
      make("button", { type: "button", class: "plain", onclick: () => actions.link(part.settings) }, "Copy link"));
    this.pictures = make("div", { class: "pictures" });
    this.element = make("section", { class: "part", "aria-label": letter ? `${letter}: ${title}` : title },
      letter && make("h4", {}, make("b", { class: "letter" }, letter), this.own),
      this.pictures, this.error, this.notice, make("footer", {}, this.running, this.doing));
  }

  /** `own`: of one of two parts, what differs from the other. */
  update(own = null) {
    const { part } = this;
    const { settings, live, images } = part;
    const over = isOver(part);
    if (own) say(this.own, [own.prompt, own.negative && `without ${own.negative}`, inShort(own)].filter((text) => text).join(" · ") || "the same settings");
    const hadFocus = this.running.contains(document.activeElement);
    this.running.hidden = over;
    this.doing.hidden = !over;
    this.retry.hidden = (part.state === "done" && !part.live.gone) || !this.actions.canSend(part);
    say(this.retry, part.state === "done" ? "Draw again" : "Try again");
    if (this.newSeed) this.newSeed.hidden = settings.kind === "reconstruct" || !this.actions.canSend(part);
    if (over && hadFocus) [...this.doing.children].find((button) => !button.hidden)?.focus();
    this.#showPictures(over);
    const failed = part.error ?? (part.state === "cancelled" ? (images.length ? "Cancelled; these were done" : "Cancelled") : "");
    this.error.hidden = !failed;
    this.error.classList.toggle("calm", part.state === "cancelled");
    say(this.error, failed);
    sayOrHide(this.notice, part.notices.join(" · "));
    if (over) {
      if (this.#said && this.#said !== part.state) announce(`${{ done: "Done", failed: "Failed", cancelled: "Cancelled" }[part.state]}: ${nameOf(settings)}`);
    } else {
      const told = words(part);
      say(this.words, told);
      if (live.fraction > 0) this.bar.value = live.fraction;
      else this.bar.removeAttribute("value");
      this.bar.setAttribute("aria-valuetext", told);
      // Not "disabled", which would lose the focus.
      this.cancel.setAttribute("aria-disabled", String(part.state === "sending" || Boolean(live.cancelling)));
      const stage = live.lost ? "lost" : (live.stage ?? part.state);
      // A stage is told once; its steps are for the eye and for whoever asks the bar.
      if (stage !== this.#said) announce(`${live.stage ?? told}: ${nameOf(settings)}`);
    }
    this.#said = over ? part.state : live.lost ? "lost" : (live.stage ?? part.state);
  }

  #showPictures(over) {
    const { part } = this;
    const { settings, live } = part;
    const finished = new Map(part.images.map((image) => [image.index, image]));
    const count = Math.max(part.total, ...[...finished.keys()].map((index) => index + 1));
    // Of what has ended only the pictures that came are shown.
    const shown = Array.from({ length: count }, (_, index) => index).filter((index) => !over || finished.has(index));
    for (const [index, slot] of this.#slots) {
      if (!shown.includes(index)) {
        slot.element.remove();
        this.#slots.delete(index);
      }
    }
    const original = live.original && settings.kind === "reconstruct";
    if (original && !this.original && shown.length) {
      const words = make("span", {}, "Given");
      const given = make("img", { class: "final there", alt: "The picture that was given", src: live.original });
      // The service cuts the middle square out of it, so that is what stands beside the result.
      given.addEventListener("load", () => {
        if (given.naturalWidth !== given.naturalHeight) say(words, "Given, cropped to the square that was read");
      });
      this.original = make("figure", { class: "picture given" },
        make("div", { class: "frame" }, given), make("figcaption", {}, words));
      this.pictures.append(this.original);
    }
    for (const index of shown) {
      let slot = this.#slots.get(index);
      if (!slot) {
        slot = new Slot(part, this.actions);
        // Of one picture the seed stands above it, and what can be done with it beside what can be done with the entry.
        if (part.total === 1) {
          slot.caption.replaceChildren();
          this.doing.append(slot.tools);
        }
        this.#slots.set(index, slot);
        this.pictures.append(slot.element);
      }
      slot.update(finished.get(index), live.previews?.get(index), settings);
    }
    this.pictures.classList.toggle("many", this.pictures.childElementCount > 3);
    this.pictures.classList.toggle("single", this.pictures.childElementCount === 1);
    const size = part.images[0] ?? settings;
    this.pictures.style.setProperty("--aspect", (size.width || 1) / (size.height || 1));
    this.pictures.style.setProperty("--natural", `${size.width || 256}px`);
  }
}

class Slot {
  constructor(part, actions) {
    this.part = part;
    this.actions = actions;
    this.tries = 0;
    this.button = make("button", { type: "button", class: "frame", disabled: true, "aria-label": "Being drawn", onclick: () => actions.open(this.picture) });
    this.seed = make("span", { class: "quiet" }, "\u00a0");
    this.tools = make("span", { class: "tools" });
    this.caption = make("figcaption", {}, this.seed, this.tools);
    this.element = make("figure", { class: "picture" }, this.button, this.caption);
  }

  update(image, preview, settings) {
    if (image && this.picture?.url !== image.url) this.#finish(image, settings);
    else if (!image && preview && preview !== this.shown) {
      this.shown = preview;
      this.preview ??= this.button.appendChild(make("img", { class: "preview", alt: "" }));
      this.preview.src = preview;
    }
    if (this.picking) {
      const picked = this.actions.isPicked(this.picture);
      this.picking.setAttribute("aria-pressed", String(picked));
      this.element.classList.toggle("picked", picked);
    }
  }

  #finish(image) {
    this.picture = pictureOf(this.part, image);
    const { settings } = this.picture;
    const title = nameOf(settings);
    this.final = make("img", { class: "final", alt: settings.seed === undefined ? title : `${title}, seed ${settings.seed}` });
    this.final.addEventListener("load", () => {
      this.element.classList.remove("gone");
      this.final.classList.add("there");
      this.button.disabled = false;
      this.button.removeAttribute("aria-label");
    });
    this.final.addEventListener("error", () => this.#missing());
    this.final.src = image.url;
    this.button.append(this.final);
    const download = make("a", { class: "icon", href: image.url, download: fileName(this.picture), "aria-label": `Download ${title}, seed ${settings.seed}`, title: "Download; the file holds the settings" }, icon("download"));
    this.picking = iconButton("compare", "Compare with another", () => this.actions.pick(this.picture));
    this.picking.setAttribute("aria-pressed", "false");
    say(this.seed, settings.seed === undefined ? "" : `seed ${settings.seed}`);
    this.tools.replaceChildren(download, this.picking);
  }

  /** Gone for good, or nobody there to ask: the first is said, the second tried again. */
  async #missing() {
    this.button.disabled = true;
    this.button.setAttribute("aria-label", "Picture not there");
    const again = () => (this.final.src = `${this.picture.url}#${(this.tries += 1)}`);
    let status = null;
    try {
      const response = await fetch(this.picture.url, { cache: "no-store" });
      ({ status } = response);
      await response.body?.cancel();
    } catch {
      // nobody answers
    }
    if (status === 200 && this.tries === 0) {
      again();
      return;
    }
    if (status !== 200 && status !== 404) {
      await pause(Math.min(250 * 2 ** this.tries, 30_000));
      this.actions.onceBack(again);
      return;
    }
    this.part.live.gone = true;
    this.element.classList.add("gone");
    this.preview?.remove();
    this.final.remove();
    this.button.replaceChildren(make("span", {}, "No longer there: images are kept for ",
      make("span", { class: "kept-for" }, this.actions.kept()), ". The same settings and seed draw it again."));
    this.tools.replaceChildren();
    this.actions.update();
  }
}

