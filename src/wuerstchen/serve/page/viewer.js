// The large view of an image with its settings. Arrow keys move through the images of the session.

import { fileName } from "./entry.js";
import { byId, icon, make, say } from "./dom.js";
import { brief, inWords } from "./settings.js";

export class Viewer {
  /** `all()` returns the images of the session, newest first. `actions`: see app.js. */
  constructor(all, actions) {
    this.all = all;
    this.actions = actions;
    this.dialog = byId("viewer");
    byId("viewer-close").addEventListener("click", () => this.dialog.close());
    byId("viewer-back").addEventListener("click", () => this.#go(-1));
    byId("viewer-on").addEventListener("click", () => this.#go(1));
    this.dialog.addEventListener("keydown", (event) => {
      if (event.key === "ArrowLeft") this.#go(-1);
      else if (event.key === "ArrowRight") this.#go(1);
    });
    // A click outside of the image closes the view.
    this.dialog.addEventListener("click", (event) => {
      if (event.target === this.dialog || event.target.classList.contains("stage")) this.dialog.close();
    });
  }

  open(image) {
    this.image = image;
    this.#show();
    this.dialog.showModal();
    byId("viewer-close").focus();
  }

  #go(by) {
    const images = this.all();
    const at = images.findIndex(({ url }) => url === this.image.url);
    this.image = images[Math.max(0, Math.min(images.length - 1, at + by))] ?? this.image;
    this.#show();
  }

  #show() {
    const { image } = this;
    const { settings } = image;
    const images = this.all();
    const at = images.findIndex(({ url }) => url === image.url);
    const element = byId("viewer-image");
    element.src = image.url;
    element.alt = brief(settings.prompt || "Reconstruction");
    element.style.setProperty("--natural", `${settings.width || 256}px`);
    element.style.setProperty("--aspect", (settings.width || 1) / (settings.height || 1));
    say(byId("viewer-prompt"), settings.kind === "reconstruct" ? "Reconstruction" : settings.prompt || "No prompt");
    byId("viewer-settings").replaceChildren(
      ...inWords(settings)
        .filter(([name]) => name !== "prompt" && name !== "kind" && name !== "count")
        .flatMap(([, label, value]) => [make("dt", {}, label), make("dd", { dir: "auto" }, value)]),
    );
    // Not "disabled", which would lose the focus.
    byId("viewer-back").setAttribute("aria-disabled", String(at <= 0));
    byId("viewer-on").setAttribute("aria-disabled", String(at < 0 || at >= images.length - 1));
    say(byId("viewer-place"), `${at + 1} of ${images.length}`);
    const closing = (act) => () => {
      this.dialog.close();
      act();
    };
    const { can } = this.actions.model() ?? { can: {} };
    const buttons = [
      make("a", { class: "button primary", href: image.url, download: fileName(image) }, icon("download"), "Download"),
      make("button", { type: "button", onclick: closing(() => this.actions.use({ settings, live: {} })) }, "Use settings"),
      make("button", { type: "button", onclick: () => this.actions.link(settings) }, "Copy link"),
      can.variation || can.reconstruct
        ? make("button", { type: "button", onclick: closing(() => this.actions.startFrom(image)) }, "Start from this image")
        : null,
      make("button", { type: "button", onclick: closing(() => this.actions.pick(image)) }, "Compare"),
    ];
    const focused = [...byId("viewer-actions").children].indexOf(document.activeElement);
    byId("viewer-actions").replaceChildren(...buttons.filter((button) => button !== null));
    byId("viewer-actions").children[focused]?.focus();
  }
}
