// Compares two selected images, or two settings with the same seed.

import { byId, hide, icon, make, say, sayOrHide } from "./dom.js";
import { brief, clean, inWords, newSeed } from "./settings.js";

const FIELDS = [
  ["prompt", "Prompt", "textarea", { rows: "3", dir: "auto" }],
  ["negative", "Negative prompt", "input", { dir: "auto", autocomplete: "off" }],
  ["guidance", "Guidance", "input", { inputmode: "decimal" }],
  ["prior_sampler", "Sampler", "select", {}],
  ["prior_steps", "Stage C steps", "input", { inputmode: "numeric" }],
  ["decoder_steps", "Stage B steps", "input", { inputmode: "numeric" }],
];
const OF_ADAPTERS = [
  ["lora", "Adapter", "select", {}],
  ["lora_strength", "Adapter strength", "input", { inputmode: "decimal" }],
];
const TEXTS = new Set(["prompt", "negative"]);

/** Shows two images and a table of their settings, with the differences marked. */
export function showBeside([a, b]) {
  const figure = (image, letter) => {
    const { settings } = image;
    const element = make("img", { src: image.url, alt: `${letter}: ${brief(settings.prompt || "Reconstruction")}` });
    element.style.setProperty("--natural", `${settings.width || 256}px`);
    element.style.setProperty("--aspect", (settings.width || 1) / (settings.height || 1));
    return make("figure", {}, element, make("figcaption", {}, make("b", { class: "letter" }, letter)));
  };
  byId("beside-images").replaceChildren(figure(a, "A"), figure(b, "B"));
  const [left, right] = [a, b].map(({ settings }) => new Map(inWords(settings).map(([name, label, value]) => [name, [label, value]])));
  const names = [...new Set([...left.keys(), ...right.keys()])].filter((name) => name !== "kind" && name !== "count");
  const rows = names.map((name) => {
    const [label] = left.get(name) ?? right.get(name);
    const values = [left, right].map((side) => side.get(name)?.[1] ?? "none");
    const differs = values[0] !== values[1];
    return make("tr", { class: differs ? "differs" : null },
      make("th", { scope: "row" }, label, differs ? make("span", { class: "sr" }, " (differs)") : null),
      ...values.map((value) => make("td", { dir: "auto" }, value)));
  });
  byId("beside-table").replaceChildren(
    make("thead", {}, make("tr", {}, make("td", {}), make("th", { scope: "col" }, "A"), make("th", { scope: "col" }, "B"))),
    make("tbody", {}, ...rows));
  byId("beside").showModal();
}

/** The dialog for two settings. `draw([a, b])` gets both, with the same seed. */
export class Sides {
  constructor(draw) {
    this.dialog = byId("sides");
    byId("beside-close").addEventListener("click", () => byId("beside").close());
    byId("sides-close").addEventListener("click", () => this.dialog.close());
    byId("sides-reroll").addEventListener("click", () => (byId("sides-seed").value = newSeed()));
    byId("sides-form").addEventListener("input", () => this.#mark());
    byId("sides-form").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("sides-form").requestSubmit();
    });
    byId("sides-form").addEventListener("submit", (event) => {
      event.preventDefault();
      const both = this.#read();
      if (!both) return;
      this.dialog.close();
      draw(both);
    });
  }

  open(settings, model) {
    this.model = model;
    this.base = settings;
    this.fields = model.loras?.length ? [...FIELDS, ...OF_ADAPTERS] : FIELDS;
    byId("sides-two").replaceChildren(...["A", "B"].map((letter) => this.#side(letter)));
    byId("sides-seed").value = settings.seed ?? newSeed();
    sayOrHide(byId("sides-error"), "");
    this.#mark();
    this.dialog.showModal();
    byId("B-prompt").focus();
  }

  #side(letter) {
    const { defaults, samplers, loras } = this.model;
    const fields = this.fields.map(([name, label, tag, properties]) => {
      const id = `${letter}-${name}`;
      const field = make(tag, { id, name: id, ...properties });
      if (name === "lora") {
        field.append(make("option", { value: "" }, "None"), ...loras.map(({ name: value }) => make("option", { value }, value)));
        field.value = this.base.lora ?? "";
      } else if (name === "lora_strength") {
        field.value = this.base.lora_strength ?? 1;
      } else if (tag === "select") {
        field.append(...samplers.map((value) => make("option", { value }, value)));
        field.value = this.base[name] ?? defaults[name] ?? samplers[0];
      } else {
        field.value = this.base[name] ?? (TEXTS.has(name) ? "" : (defaults[name] ?? ""));
      }
      return make("div", { class: `field${TEXTS.has(name) ? " wide" : ""}` }, make("label", { for: id }, label), field);
    });
    return make("fieldset", { class: "side" }, make("legend", {}, make("b", { class: "letter" }, letter), make("span", { class: "sr" }, " settings")), ...fields);
  }

  #mark() {
    for (const [name] of this.fields) {
      const differs = byId(`A-${name}`).value !== byId(`B-${name}`).value;
      byId(`B-${name}`).classList.toggle("differs", differs);
    }
  }

  #read() {
    const { width, height } = this.base;
    const both = [];
    for (const letter of ["A", "B"]) {
      const raw = { kind: "generate", width, height, count: 1, seed: byId("sides-seed").value.trim() };
      for (const [name] of this.fields) {
        const value = byId(`${letter}-${name}`).value.trim();
        if (value) raw[name] = value;
      }
      const { settings, refused } = clean(raw, this.model);
      if (refused.length || !settings.prompt || settings.seed === undefined) {
        const name = refused[0] ?? (settings.prompt ? "seed" : "prompt");
        const label = this.fields.find(([each]) => each === name)?.[1] ?? name;
        const text = name === "prompt" && !settings.prompt ? "is missing" : "is out of range or not a number";
        sayOrHide(byId("sides-error"), name === "seed" ? `The seed ${text}` : `${label} of ${letter} ${text}`);
        byId(name === "seed" ? "sides-seed" : `${letter}-${name}`)?.focus();
        return null;
      }
      both.push({ negative: "", ...settings });
    }
    return both;
  }
}

/** Images selected for comparison. One can be tried with other settings, two can be shown side by side. */
export class Picked {
  images = [];

  constructor({ changed, sides }) {
    this.changed = changed;
    byId("picked-go").addEventListener("click", () => {
      const { images } = this;
      this.clear(); // before the dialog opens, because closing it returns the focus
      if (images.length === 2) showBeside(images);
      else sides(images[0].settings);
    });
    byId("picked-clear").addEventListener("click", () => this.clear());
    byId("picked-go").append(icon("compare"), make("span", { id: "picked-go-words" }));
  }

  has = (image) => this.images.some(({ url }) => url === image?.url);

  toggle(image) {
    if (this.has(image)) this.images = this.images.filter(({ url }) => url !== image.url);
    else this.images = [...this.images.slice(-1), image];
    this.#show();
  }

  clear() {
    this.images = [];
    this.#show();
  }

  #show() {
    const [one, two] = this.images;
    if (!one) hide(byId("picked"));
    else {
      byId("picked").hidden = false;
      const drawable = two || one.canDraw;
      say(byId("picked-words"), two ? "2 images selected" : "1 image selected. Select another, or");
      say(byId("picked-go-words"), two ? "Compare side by side" : "Try other settings");
      byId("picked-go").hidden = !drawable;
      if (!drawable) say(byId("picked-words"), "1 image selected. Select another.");
    }
    this.changed();
  }
}
