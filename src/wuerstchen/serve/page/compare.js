// Two settings against each other: pictures that were picked, or two forms drawn with one seed.

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
const TEXTS = new Set(["prompt", "negative"]);

/** Shows two pictures and a table of their settings; what differs is marked. */
export function showBeside([a, b]) {
  const figure = (picture, letter) => {
    const { settings } = picture;
    const image = make("img", { src: picture.url, alt: `${letter}: ${brief(settings.prompt || "Reconstruction")}` });
    image.style.setProperty("--natural", `${settings.width || 256}px`);
    image.style.setProperty("--aspect", (settings.width || 1) / (settings.height || 1));
    return make("figure", {}, image, make("figcaption", {}, make("b", { class: "letter" }, letter)));
  };
  byId("beside-pictures").replaceChildren(figure(a, "A"), figure(b, "B"));
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

/** The two forms. `draw([a, b])` gets both settings, with one seed. */
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
    byId("sides-two").replaceChildren(...["A", "B"].map((letter) => this.#side(letter)));
    byId("sides-seed").value = settings.seed ?? newSeed();
    sayOrHide(byId("sides-error"), "");
    this.#mark();
    this.dialog.showModal();
    byId("B-prompt").focus();
  }

  #side(letter) {
    const { defaults, samplers } = this.model;
    const fields = FIELDS.map(([name, label, tag, properties]) => {
      const id = `${letter}-${name}`;
      const field = make(tag, { id, name: id, ...properties });
      if (tag === "select") {
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
    for (const [name] of FIELDS) {
      const differs = byId(`A-${name}`).value !== byId(`B-${name}`).value;
      byId(`B-${name}`).classList.toggle("differs", differs);
    }
  }

  #read() {
    const { width, height } = this.base;
    const both = [];
    for (const letter of ["A", "B"]) {
      const raw = { kind: "generate", width, height, count: 1, seed: byId("sides-seed").value.trim() };
      for (const [name] of FIELDS) {
        const value = byId(`${letter}-${name}`).value.trim();
        if (value) raw[name] = value;
      }
      const { settings, refused } = clean(raw, this.model);
      if (refused.length || !settings.prompt || settings.seed === undefined) {
        const name = refused[0] ?? (settings.prompt ? "seed" : "prompt");
        const label = FIELDS.find(([each]) => each === name)?.[1] ?? name;
        const text = name === "prompt" && !settings.prompt ? "is missing" : "is out of range or no number";
        sayOrHide(byId("sides-error"), name === "seed" ? `The seed ${text}` : `${label} of ${letter} ${text}`);
        byId(name === "seed" ? "sides-seed" : `${letter}-${name}`)?.focus();
        return null;
      }
      both.push({ negative: "", ...settings });
    }
    return both;
  }
}

/** Pictures picked for comparison: one goes on to the two forms, two stand beside each other. */
export class Picked {
  pictures = [];

  constructor({ changed, sides }) {
    this.changed = changed;
    byId("picked-go").addEventListener("click", () => {
      const { pictures } = this;
      this.clear(); // before a dialog opens, which gives the focus back to where it was
      if (pictures.length === 2) showBeside(pictures);
      else sides(pictures[0].settings);
    });
    byId("picked-clear").addEventListener("click", () => this.clear());
    byId("picked-go").append(icon("compare"), make("span", { id: "picked-go-words" }));
  }

  has = (picture) => this.pictures.some(({ url }) => url === picture?.url);

  toggle(picture) {
    if (this.has(picture)) this.pictures = this.pictures.filter(({ url }) => url !== picture.url);
    else this.pictures = [...this.pictures.slice(-1), picture];
    this.#show();
  }

  clear() {
    this.pictures = [];
    this.#show();
  }

  #show() {
    const [one, two] = this.pictures;
    if (!one) hide(byId("picked"));
    else {
      byId("picked").hidden = false;
      const drawable = two || one.canDraw;
      say(byId("picked-words"), two ? "Two pictures picked" : "One picture picked; pick another, or");
      say(byId("picked-go-words"), two ? "Show side by side" : "Try other settings");
      byId("picked-go").hidden = !drawable;
      if (!drawable) say(byId("picked-words"), "One picture picked; pick another");
    }
    this.changed();
  }
}
