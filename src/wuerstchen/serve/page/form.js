// The form: reads and writes settings, holds the init image, and shows errors next to their fields.

import { byId, icon, keep, make, sayOrHide, session } from "./dom.js";
import { readImage, settingsInPng } from "./image.js";
import { clean, newSeed, relevant } from "./settings.js";

const DRAFT = "wuerstchen.draft";
const PLACE = {
  prompts: "prompt", prompt: "prompt", negative: "negative", count: "count", width: "size", height: "size", size: "size",
  seed: "seed", guidance: "guidance", prior_steps: "prior_steps", prior_sampler: "prior_sampler",
  decoder_steps: "decoder_steps", image: "image", strength: "strength", lora: "lora", lora_strength: "lora_strength",
};
const PLACES = new Set(Object.values(PLACE));
const IN_MORE = new Set(["guidance", "prior_steps", "prior_sampler", "decoder_steps"]);
const EXAMPLES = 3;
const MODES = {
  variation: "Generation starts from this image and follows the prompt.",
  reconstruct: "Encodes the image into the model’s semantic latents and decodes it again.",
};

export class Form {
  model = null;
  image = null;
  #example = 0;
  #choices = 0; // number of the last choice: a file that is read slowly must not replace a later one
  #choosing = null;

  /**
   * `onFound(settings)`: a chosen image contains settings. `onExample()`: an example is about to replace the prompt.
   * `onChange()`: the form has changed.
   */
  constructor({ onFound, onExample, onChange }) {
    this.onFound = onFound;
    this.onExample = onExample;
    this.onChange = onChange;
    this.form = byId("form");
    this.fields = this.form.elements;
    byId("size").addEventListener("change", () => this.#arrange());
    byId("reroll").addEventListener("click", () => this.setSeed(newSeed()));
    byId("seed").addEventListener("input", () => (this.fields.seeds.value = "keep"));
    byId("chosen-remove").addEventListener("click", () => {
      this.setImage(null);
      byId("file").focus();
    });
    byId("file").addEventListener("change", (event) => {
      const [file] = event.target.files;
      event.target.value = "";
      if (file) this.choose(file);
    });
    this.form.addEventListener("input", (event) => {
      this.clearError(event.target.name === "width" || event.target.name === "height" ? "size" : event.target.name);
      this.#changed();
    });
    this.form.addEventListener("change", ({ target }) => {
      if (target.tagName === "SELECT") this.clearError(target.name);
      this.#changed();
    });
    this.form.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.isComposing) return;
      const wanted = event.ctrlKey || event.metaKey;
      if (wanted || (event.target.matches("input[type=number], #seed, #negative") && !event.shiftKey)) {
        event.preventDefault();
        this.form.requestSubmit();
      }
    });
    this.#arrange();
  }

  setModel(model) {
    const first = this.model === null;
    const chosen = ["size", "prior_sampler", "lora"].map((name) => [this.fields[name], this.fields[name].value]);
    this.model = model;
    const { size, defaults, limits, samplers, loras = [], can, examples } = model;
    const sizes = [size.default, ...size.common];
    const seen = new Map(sizes.map(([width, height]) => [`${width}x${height}`, `${width} × ${height}`]));
    byId("size").replaceChildren(
      ...[...seen].map(([value, text]) => make("option", { value }, text)),
      make("option", { value: "custom" }, "Custom…"),
    );
    for (const [name, [low, high]] of Object.entries({
      count: [1, limits.count],
      prior_steps: [1, limits.steps],
      decoder_steps: [1, limits.steps],
      width: [size.min, size.max_side],
      height: [size.min, size.max_side],
    })) {
      this.fields[name].min = low;
      this.fields[name].max = high;
    }
    byId("width").step = byId("height").step = size.multiple;
    [byId("width").placeholder, byId("height").placeholder] = size.default;
    byId("prior_sampler").replaceChildren(
      make("option", { value: "" }),
      ...samplers.filter((name) => name !== defaults.prior_sampler).map((name) => make("option", { value: name }, name)),
    );
    byId("adapters").hidden = loras.length === 0;
    byId("lora").replaceChildren(
      make("option", { value: "" }, "None"),
      ...loras.map(({ name, title }) => make("option", { value: name }, title && title !== name ? `${title} (${name})` : name)),
    );
    // Keep the user's choices when the service comes back.
    for (const [field, value] of chosen) {
      if ([...field.options].some((option) => option.value === value)) field.value = value;
    }
    byId("start").hidden = !(can.reconstruct || can.variation);
    if (this.image && byId("start").hidden) this.setImage(null);
    const radios = this.form.querySelectorAll("input[name=mode]");
    for (const radio of radios) radio.closest("label").hidden = !can[radio.value];
    byId("examples").hidden = examples.length === 0;
    this.#showExamples();
    if (first) this.#restoreDraft();
    this.#arrange();
  }

  #showExamples() {
    const { examples } = this.model;
    const shown = Array.from({ length: Math.min(EXAMPLES, examples.length) }, (_, i) => examples[(this.#example + i) % examples.length]);
    const chips = shown.map((text) =>
      make("button", { type: "button", class: "chip", dir: "auto", title: text, onclick: () => {
        this.onExample();
        this.fields.prompt.value = text;
        this.clearError("prompt");
        this.#changed();
        this.fields.prompt.focus();
      } }, text));
    const more = make("button", { type: "button", class: "chip icon", "aria-label": "Other examples", title: "Other examples", onclick: () => {
      this.#example = (this.#example + EXAMPLES) % examples.length;
      this.#showExamples();
      byId("examples").lastElementChild.focus();
    } }, icon("dice"));
    byId("examples").replaceChildren(...chips, ...(examples.length > EXAMPLES ? [more] : []));
  }

  /**
   * Replaces the chosen image by a file. Offers its settings if wuerstchen saved it. If the file cannot be used, shows
   * the reason and removes the previous image. Resolves to whether the file is used.
   */
  async choose(file, offers = true) {
    this.#choices += 1;
    const choosing = this.#take(file, offers, this.#choices);
    this.#choosing = choosing;
    const used = await choosing;
    if (this.#choosing === choosing) this.#choosing = null;
    return used;
  }

  async #take(file, offers, choice) {
    let image = null;
    let found = null;
    let problem = "";
    try {
      if (!this.model) throw new Error("The service is not available yet. Choose the image again in a moment");
      const { can } = this.model;
      if (!can.reconstruct && !can.variation) throw new Error(`${file.name} cannot be used: this service does not accept images`);
      image = await readImage(file, this.model);
      if (offers) found = await settingsInPng(file);
    } catch (error) {
      problem = error.message;
    }
    if (choice !== this.#choices) return true; // meanwhile another file was chosen, or this one removed
    const before = this.image !== null;
    this.setImage(problem ? null : image);
    if (problem) this.showError("image", before ? `${problem}. The image chosen before was removed.` : problem);
    else if (found) this.onFound(clean(found, this.model).settings);
    return !problem;
  }

  /** Waits for a file that is still being read. Resolves to false if it cannot be used. */
  async settled() {
    let usable = true;
    while (this.#choosing) {
      usable = await this.#choosing;
    }
    return usable;
  }

  /** A data URL, or null for none. */
  setImage(image, mode) {
    this.#choices += 1;
    this.image = image;
    if (image) {
      const { can } = this.model;
      const wanted = mode ?? (this.fields.mode.value || "variation");
      this.fields.mode.value = can[wanted] ? wanted : can.variation ? "variation" : "reconstruct";
      byId("chosen-image").src = image;
    } else {
      byId("chosen-image").removeAttribute("src");
    }
    this.clearError("image");
    const chosen = document.activeElement === byId("file");
    this.#arrange();
    this.onChange();
    if (image && chosen) [...this.fields.mode].find(({ checked }) => checked).focus(); // the file field is hidden now
  }

  /** The defaults of the networks that sample: students only if the form sets nothing that they do not support. */
  get #defaults() {
    const { defaults, full } = this.model;
    const sets = ["guidance", "prior_steps", "prior_sampler"].some((name) => this.fields[name].value !== "");
    return sets || this.fields.negative.value.trim() || this.fields.lora.value || this.image ? full ?? defaults : defaults;
  }

  #showDefaults() {
    const defaults = this.#defaults;
    for (const name of ["guidance", "prior_steps", "decoder_steps"]) this.fields[name].placeholder = defaults[name] ?? "";
    const [first] = this.fields.prior_sampler.options;
    if (first) first.textContent = defaults.prior_sampler ? `${defaults.prior_sampler} (default)` : "default";
  }

  #arrange() {
    if (this.model) this.#showDefaults();
    const mode = this.image ? this.fields.mode.value : "generate";
    this.form.dataset.mode = mode;
    byId("chosen").hidden = !this.image;
    this.form.querySelector(".drop").hidden = Boolean(this.image);
    byId("file").hidden = Boolean(this.image);
    byId("mode-words").textContent = MODES[mode] ?? "";
    sayOrHide(byId("image-note"), this.image ? this.model?.image_note : "");
    byId("custom").hidden = byId("size").value !== "custom";
    this.#showAdapter();
    byId("strength-value").textContent = Number(this.fields.strength.value).toFixed(2);
    byId("draw-words").textContent = { variation: "Generate variation", reconstruct: "Reconstruct" }[mode] ?? "Generate";
  }

  /** The strength of the chosen adapter, and its trigger words, which a click adds to the prompt. */
  #showAdapter() {
    const { lora, lora_strength: strength, prompt } = this.fields;
    const words = this.model?.loras?.find(({ name }) => name === lora.value)?.trigger_words ?? [];
    byId("lora-scale").hidden = !lora.value;
    byId("lora_strength-value").textContent = Number(strength.value).toFixed(2);
    const shown = words.join("\n");
    const group = byId("lora-words");
    group.hidden = !shown;
    if (group.dataset.words === shown) return; // keep the focus
    group.dataset.words = shown;
    group.replaceChildren(...words.map((word) =>
      make("button", { type: "button", class: "chip", dir: "auto", title: `Add “${word}” to the prompt`, onclick: () => {
        if (!prompt.value.toLowerCase().includes(word.toLowerCase())) prompt.value = prompt.value.trim() ? `${prompt.value.trim()}, ${word}` : word;
        this.clearError("prompt");
        this.#changed();
        prompt.focus();
      } }, word)));
  }

  #changed() {
    this.#arrange();
    const { settings } = this.#raw();
    keep(session, DRAFT, JSON.stringify({ ...settings, keep: this.fields.seeds.value === "keep" }));
    this.onChange();
  }

  #restoreDraft() {
    let draft;
    try {
      draft = JSON.parse(session.getItem(DRAFT) ?? "{}");
    } catch {
      return;
    }
    if (typeof draft !== "object" || draft === null) return;
    const written = this.fields.prompt.value; // typed while the model was loading
    this.write({ ...clean(draft, this.model).settings, ...(written ? { prompt: written } : {}) }, draft.keep === true);
  }

  #raw() {
    const { fields } = this;
    const broken = [];
    const number = (name) => {
      const field = fields[name];
      const value = field.value.trim();
      if (field.validity.badInput || (value !== "" && !Number.isFinite(Number(value)))) broken.push(name);
      return value === "" ? null : Number(value);
    };
    const [width, height] = fields.size.value === "custom"
      ? [number("width"), number("height")]
      : fields.size.value.split("x").map(Number);
    const settings = {
      kind: this.form.dataset.mode === "reconstruct" ? "reconstruct" : "generate",
      prompt: fields.prompt.value,
      negative: fields.negative.value,
      count: number("count") ?? 1,
      width,
      height,
      seed: number("seed"),
      guidance: number("guidance"),
      prior_steps: number("prior_steps"),
      prior_sampler: fields.prior_sampler.value || null,
      decoder_steps: number("decoder_steps"),
      lora: fields.lora.value || null,
      lora_strength: fields.lora.value ? Number(fields.lora_strength.value) : null,
      strength: Number(fields.strength.value),
    };
    return { settings, broken };
  }

  /** The settings, or null if some are invalid. Then shows the errors next to their fields, unless `quiet`. */
  read({ quiet = false } = {}) {
    const showError = quiet ? () => {} : (name, text) => this.showError(name, text);
    if (!quiet) this.clearErrors();
    const { settings, broken } = this.#raw();
    const { mode } = this.form.dataset;
    const seen = broken.filter((name) => name in relevant(settings)); // ignore hidden fields
    for (const name of seen) showError(name, "Not a number. Use digits only.");
    if (seen.length) return null;
    if (mode === "generate" && !settings.prompt.trim()) {
      showError("prompt", "Enter a prompt, or choose an example.");
      return null;
    }
    if (settings.kind === "generate" && (settings.width === null || settings.height === null)) {
      showError("size", "A custom size needs a width and a height.");
      return null;
    }
    if (this.fields.seeds.value === "new") settings.seed = null;
    if (mode !== "variation") delete settings.strength;
    return relevant(settings);
  }

  /** Writes settings to the form. Missing ones are reset to the model's defaults. */
  write(settings, keep = settings.seed !== undefined) {
    const { fields } = this;
    const size = this.model.size.default;
    const [width, height] = settings.width ? [settings.width, settings.height] : size;
    fields.prompt.value = settings.prompt ?? "";
    fields.negative.value = settings.negative ?? "";
    fields.count.value = settings.count ?? 1;
    const value = `${width}x${height}`;
    const common = [...fields.size.options].some((option) => option.value === value);
    fields.size.value = common ? value : "custom";
    [fields.width.value, fields.height.value] = common ? ["", ""] : [width, height];
    fields.seed.value = settings.seed ?? "";
    fields.seeds.value = keep ? "keep" : "new";
    const { defaults, full } = this.model;
    // With empty fields a student samples. So the settings of the full network are written out.
    const { prior_sampler: sampler } = settings;
    const inFull = full && full.prior_sampler !== defaults.prior_sampler && ![undefined, defaults.prior_sampler].includes(sampler);
    for (const name of ["guidance", "prior_steps", "prior_sampler", "decoder_steps"]) {
      // Leave the model's defaults empty.
      const isDefault = settings[name] === defaults[name] && !(inFull && name !== "decoder_steps");
      fields[name].value = settings[name] === undefined || isDefault ? "" : settings[name];
    }
    const known = [...fields.lora.options].some((option) => option.value === settings.lora);
    fields.lora.value = known ? settings.lora : "";
    fields.lora_strength.value = known ? settings.lora_strength ?? 1 : 1;
    if (settings.strength !== undefined) fields.strength.value = settings.strength;
    byId("more").open ||= [...IN_MORE].some((name) => fields[name].value !== "");
    this.clearErrors();
    this.#changed();
  }

  /** A function that restores the current state of the form. */
  keep() {
    const { image } = this;
    const { mode } = this.form.dataset;
    const { settings } = clean(this.#raw().settings, null);
    const keep = this.fields.seeds.value === "keep";
    return () => {
      this.setImage(image, mode);
      this.write(settings, keep);
    };
  }

  texts = () => ({ prompt: this.fields.prompt.value, negative: this.fields.negative.value });

  /** Clears the seed of the last job while the service chooses a new one. Returns a function that restores it. */
  hideSeed() {
    const { seed, seeds } = this.fields;
    if (seeds.value !== "new") return () => {};
    const last = seed.value;
    seed.value = "";
    this.#changed();
    return () => this.showSeed(last);
  }

  /** Keeps the seed of the field, or a new one if it is empty. */
  keepSeed() {
    const { seed, seeds } = this.fields;
    if (seeds.value === "keep" && seed.value !== "") return;
    this.setSeed(seed.value === "" ? newSeed() : seed.value);
  }

  setSeed(value) {
    this.fields.seed.value = value;
    this.fields.seeds.value = "keep";
    this.clearError("seed");
    this.#changed();
  }

  /** Shows the seed that the service chose. */
  showSeed(value) {
    const { seed, seeds } = this.fields;
    if (seeds.value !== "new" && seed.value !== "") return; // the user has entered one meanwhile
    seed.value = value;
    this.#changed();
  }

  /** Shows an error next to the field `param`, or above the button if there is no such field. */
  showError(param, message) {
    const found = String(param ?? "").split(/[.[\]]+/).find((part) => Object.hasOwn(PLACE, part));
    const name = PLACE[found] ?? "form";
    if (IN_MORE.has(name)) byId("more").open = true;
    sayOrHide(byId(`${name}-error`), message);
    const field = name === "image" ? byId("file") : name === "form" ? null : this.fields[name];
    field?.setAttribute("aria-invalid", "true");
    // Make sure that the message is visible. If the field is hidden, show it above the button.
    if (!field || field.offsetParent === null) {
      if (name !== "form" && name !== "image") sayOrHide(byId("form-error"), message);
      byId(name === "image" ? "image-error" : "form-error").scrollIntoView({ block: "nearest" });
    } else {
      field.focus();
    }
  }

  clearError(name) {
    if (!PLACES.has(name)) return;
    sayOrHide(byId(`${name}-error`), "");
    (name === "image" ? byId("file") : this.fields[name]).removeAttribute("aria-invalid");
  }

  clearErrors() {
    for (const name of PLACES) this.clearError(name);
    sayOrHide(byId("form-error"), "");
  }
}
