// One picture large, with its settings; arrow keys go through the session's pictures.

import { fileName } from "./entry.js";
import { byId, icon, make, say } from "./dom.js";
import { brief, inWords } from "./settings.js";

export class Viewer {
  /** `all()` gives the session's pictures, newest first; `actions` as in app.js. */
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
    // A click beside the picture closes, as people expect.
    this.dialog.addEventListener("click", (event) => {
      if (event.target === this.dialog || event.target.classList.contains("stage")) this.dialog.close();
    });
  }

  open(picture) {
    this.picture = picture;
    this.#show();
    this.dialog.showModal();
    byId("viewer-close").focus();
  }

  #go(by) {
    const pictures = this.all();
    const at = pictures.findIndex(({ url }) => url === this.picture.url);
    this.picture = pictures[Math.max(0, Math.min(pictures.length - 1, at + by))] ?? this.picture;
    this.#show();
  }

  #show() {
    const { picture } = this;
    const { settings } = picture;
    const pictures = this.all();
    const at = pictures.findIndex(({ url }) => url === picture.url);
    const image = byId("viewer-picture");
    image.src = picture.url;
    image.alt = brief(settings.prompt || "Reconstruction");
    image.style.setProperty("--natural", `${settings.width || 256}px`);
    image.style.setProperty("--aspect", (settings.width || 1) / (settings.height || 1));
    say(byId("viewer-prompt"), settings.kind === "reconstruct" ? "Reconstruction" : settings.prompt || "No prompt");
    byId("viewer-settings").replaceChildren(
      ...inWords(settings)
        .filter(([name]) => name !== "prompt" && name !== "kind" && name !== "count")
        .flatMap(([, label, value]) => [make("dt", {}, label), make("dd", { dir: "auto" }, value)]),
    );
    // Not "disabled", which would lose the focus.
    byId("viewer-back").setAttribute("aria-disabled", String(at <= 0));
    byId("viewer-on").setAttribute("aria-disabled", String(at < 0 || at >= pictures.length - 1));
    say(byId("viewer-place"), `${at + 1} of ${pictures.length}`);
    const closing = (act) => () => {
      this.dialog.close();
      act();
    };
    const { can } = this.actions.model() ?? { can: {} };
    const buttons = [
      make("a", { class: "button primary", href: picture.url, download: fileName(picture) }, icon("download"), "Download"),
      make("button", { type: "button", onclick: closing(() => this.actions.use({ settings, live: {} })) }, "Use settings"),
      make("button", { type: "button", onclick: () => this.actions.link(settings) }, "Copy link"),
      can.variation || can.reconstruct
        ? make("button", { type: "button", onclick: closing(() => this.actions.begin(picture)) }, "Begin with it")
        : null,
      make("button", { type: "button", onclick: closing(() => this.actions.pick(picture)) }, "Compare"),
    ];
    const focused = [...byId("viewer-actions").children].indexOf(document.activeElement);
    byId("viewer-actions").replaceChildren(...buttons.filter((button) => button !== null));
    byId("viewer-actions").children[focused]?.focus();
  }
}
