// An entry of the session: one job, or two side by side, from its start to its images.

import { announce, icon, iconButton, make, pause, say, sayOrHide } from "./dom.js";
import { brief, inShort, shared } from "./settings.js";

export const isOver = (part) => part.state === "done" || part.state === "failed" || part.state === "cancelled";

/** An image of a part, with settings that reproduce this image. */
export function imageOf(part, image) {
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

/** The status of a running part, as text. */
function words(part) {
  const { live } = part;
  if (live.cancelling) return "Cancelling…";
  if (live.lost) return "Connection lost, trying again…";
  if (part.state === "sending") return "Sending…";
  if (part.state === "queued") return live.position > 0 ? `Waiting, position ${live.position} in the queue` : "Waiting in the queue";
  if (!live.stage) return "Starting…";
  return `${live.stage}, step ${live.step} of ${live.steps}`;
}

const isSmall = ({ total, settings }) => total === 1 && settings.kind !== "reconstruct" && (settings.width ?? 0) <= 512;

export class EntryView {
  /** `actions`: see app.js. */
  constructor(entry, actions) {
    this.entry = entry;
    this.actions = actions;
    const [first] = entry.parts;
    const two = entry.parts.length > 1;
    this.parts = entry.parts.map((part, i) => new PartView(part, entry, actions, two ? "AB"[i] : null));
    this.heading = make("h3", { class: "prompt", dir: "auto" });
    this.meta = make("p", { class: "meta" });
    this.removing = iconButton("close", "Remove from the session", () => actions.remove(entry));
    this.element = make("li", { class: `entry${two ? " both" : isSmall(first) ? " small" : ""}` },
      make("article", {}, make("header", {}, this.heading, this.removing), this.meta,
        make("div", { class: two ? "two" : "one" }, ...this.parts.map(({ element }) => element))));
    this.update();
  }

  /** Shows another job in place of the only one. The image stays until that of the new job has loaded. */
  replace(part) {
    this.entry.parts = [part];
    this.parts[0].replace(part);
    this.element.classList.toggle("small", isSmall(part));
    this.update();
  }

  update() {
    const [first, second] = this.entry.parts;
    if (second) {
      // Common settings are shown above both parts, the others above each part.
      const [both, ...own] = shared(first.settings, second.settings);
      say(this.heading, both.prompt ?? "Two prompts");
      say(this.meta, `Comparison · ${inShort(both)}`);
      this.parts.forEach((part, i) => part.update(own[i]));
    } else {
      say(this.heading, titleOf(first.settings));
      say(this.meta, inShort(first.settings));
      this.parts[0].update();
    }
    this.removing.classList.toggle("out", !this.entry.parts.every(isOver)); // keeps its space, so that nothing moves
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
    this.cancel = make("button", { type: "button", class: "plain", onclick: () => actions.cancel(this.part) }, "Cancel");
    this.running = make("div", { class: "running" }, this.bar, this.words, this.cancel);
    this.error = make("p", { class: "error" });
    this.notice = make("p", { class: "error calm" });
    this.retry = make("button", { type: "button", class: "plain", onclick: () => actions.again(this.part, this.part.settings.seed) });
    this.newSeed = letter ? null : make("button", { type: "button", class: "plain", onclick: () => actions.again(this.part, null) }, "New seed");
    this.doing = make("div", { class: "actions" },
      this.retry,
      make("button", { type: "button", class: "plain", onclick: () => actions.use(this.part) }, "Use settings"),
      this.newSeed,
      make("button", { type: "button", class: "plain", onclick: () => actions.link(this.part.settings) }, "Copy link"));
    this.images = make("div", { class: "images" });
    this.element = make("section", { class: "part", "aria-label": letter ? `${letter}: ${title}` : title },
      letter && make("h4", {}, make("b", { class: "letter" }, letter), this.own),
      this.images, this.error, this.notice, make("footer", {}, this.running, this.doing));
  }

  replace(part) {
    this.part = part;
    for (const slot of this.#slots.values()) slot.part = part;
    const title = nameOf(part.settings);
    this.element.setAttribute("aria-label", title);
    this.bar.setAttribute("aria-label", `Progress of ${title}`);
  }

  /** `own`: for one of two parts, the settings that differ from the other one. */
  update(own = null) {
    const { part } = this;
    const { settings, live, images } = part;
    const over = isOver(part);
    if (own) say(this.own, [own.prompt, own.negative && `negative: ${own.negative}`, inShort(own)].filter((text) => text).join(" · ") || "the same settings");
    const hadFocus = this.running.contains(document.activeElement);
    this.running.hidden = over;
    this.doing.hidden = !over;
    this.retry.hidden = (part.state === "done" && !part.live.gone) || !this.actions.canSend(part);
    say(this.retry, part.state === "done" ? "Generate again" : "Try again");
    if (this.newSeed) this.newSeed.hidden = settings.kind === "reconstruct" || !this.actions.canSend(part);
    if (over && hadFocus) [...this.doing.children].find((button) => !button.hidden)?.focus();
    this.#showImages(over);
    const failed = part.error ?? (part.state === "cancelled" ? (images.length ? "Cancelled. These images were finished." : "Cancelled") : "");
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
      // Announce each stage once, not each step. The progress bar has the steps.
      if (stage !== this.#said && !live.quiet) announce(`${live.stage ?? told}: ${nameOf(settings)}`);
    }
    this.#said = over ? part.state : live.lost ? "lost" : (live.stage ?? part.state);
  }

  #showImages(over) {
    const { part } = this;
    const { settings, live } = part;
    const finished = new Map(part.images.map((image) => [image.index, image]));
    const count = Math.max(part.total, ...[...finished.keys()].map((index) => index + 1));
    // After the end of a job, show only finished images.
    const shown = Array.from({ length: count }, (_, index) => index).filter((index) => !over || finished.has(index));
    for (const [index, slot] of this.#slots) {
      if (!shown.includes(index)) {
        slot.element.remove();
        this.#slots.delete(index);
      }
    }
    const original = live.original && settings.kind === "reconstruct";
    if (original && !this.original && shown.length) {
      const words = make("span", {}, "Original");
      const given = make("img", { class: "final there", alt: "The original image", src: live.original });
      // The service crops it to the middle square. The page shows the same square.
      given.addEventListener("load", () => {
        if (given.naturalWidth !== given.naturalHeight) say(words, "Original, cropped to a square");
      });
      this.original = make("figure", { class: "image given" },
        make("div", { class: "frame" }, given), make("figcaption", {}, words));
      this.images.append(this.original);
    }
    for (const index of shown) {
      let slot = this.#slots.get(index);
      if (!slot) {
        slot = new Slot(part, this.actions);
        // A single image has its seed in the header of the entry, and its buttons next to those of the entry.
        if (part.total === 1) {
          slot.caption.replaceChildren();
          this.doing.append(slot.tools);
        }
        this.#slots.set(index, slot);
        this.images.append(slot.element);
      }
      slot.update(finished.get(index), live.previews?.get(index), settings);
    }
    this.images.classList.toggle("many", this.images.childElementCount > 3);
    this.images.classList.toggle("single", this.images.childElementCount === 1);
    const size = part.images[0] ?? settings;
    this.images.style.setProperty("--aspect", (size.width || 1) / (size.height || 1));
    this.images.style.setProperty("--natural", `${size.width || 256}px`);
  }
}

class Slot {
  constructor(part, actions) {
    this.part = part;
    this.actions = actions;
    this.tries = 0;
    this.button = make("button", { type: "button", class: "frame", disabled: true, "aria-label": "Generating", onclick: () => actions.open(this.image) });
    this.seed = make("span", { class: "quiet" }, "\u00a0");
    this.tools = make("span", { class: "tools" });
    this.caption = make("figcaption", {}, this.seed, this.tools);
    this.element = make("figure", { class: "image" }, this.button, this.caption);
  }

  update(image, preview, settings) {
    if (image && this.image?.url !== image.url) this.#finish(image, settings);
    else if (!image && preview && preview !== this.shown) {
      this.shown = preview;
      this.preview ??= this.button.appendChild(make("img", { class: "preview", alt: "" }));
      this.preview.src = preview;
    }
    if (this.picking) {
      const picked = this.actions.isPicked(this.image);
      this.picking.setAttribute("aria-pressed", String(picked));
      this.element.classList.toggle("picked", picked);
    }
  }

  #finish(image) {
    this.image = imageOf(this.part, image);
    const { settings } = this.image;
    const title = nameOf(settings);
    const before = this.final;
    this.final = make("img", { class: "final", alt: settings.seed === undefined ? title : `${title}, seed ${settings.seed}` });
    this.final.addEventListener("load", () => {
      this.element.classList.remove("gone");
      this.final.classList.add("there");
      before?.remove();
      this.button.disabled = false;
      this.button.removeAttribute("aria-label");
    });
    this.final.addEventListener("error", () => this.#missing());
    this.final.src = image.url;
    this.button.append(this.final);
    const download = make("a", { class: "icon", href: image.url, download: fileName(this.image), "aria-label": `Download ${title}, seed ${settings.seed}`, title: "Download (the file contains the settings)" }, icon("download"));
    this.picking = iconButton("compare", "Select to compare", () => this.actions.pick(this.image));
    this.picking.setAttribute("aria-pressed", "false");
    say(this.seed, settings.seed === undefined ? "" : `seed ${settings.seed}`);
    this.tools.replaceChildren(download, this.picking);
  }

  /** The image did not load. Shows that it has expired, or tries again if the service is not responding. */
  async #missing() {
    this.button.disabled = true;
    this.button.setAttribute("aria-label", "Image not available");
    const again = () => (this.final.src = `${this.image.url}#${(this.tries += 1)}`);
    let status = null;
    try {
      const response = await fetch(this.image.url, { cache: "no-store" });
      ({ status } = response);
      await response.body?.cancel();
    } catch {
      // no answer
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
    this.button.replaceChildren(make("span", {}, "No longer available: images are kept for ",
      make("span", { class: "kept-for" }, this.actions.kept()), ". Use the same settings and seed to generate it again."));
    this.tools.replaceChildren();
    this.actions.update();
  }
}

