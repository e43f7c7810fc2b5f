// Settings of a job: validation, links, and texts for users. Links and stored entries are untrusted input.

export const MAX_SEED = 2 ** 32 - 1;
const CONTROLS = /[\u0000-\u0009\u000b-\u001f\u007f]/g; // all except line breaks
const ANY = {
  size: { min: 1, max_side: 16384, multiple: 1, max_pixels: 2 ** 28 },
  limits: { count: 1000, prompt_chars: 10000, steps: 1000 },
  loras: { some: () => true },
  samplers: { includes: (value) => typeof value === "string" && /^[a-z0-9_]{1,40}$/.test(value) }, // checked by the service
};

/** Names of settings, in display order. */
export const NAMES = [
  "kind", "prompt", "negative", "width", "height", "seed", "count", "guidance", "prior_sampler", "prior_steps",
  "decoder_steps", "lora", "lora_strength", "strength",
];

// A reconstruction uses only these.
const OF_RECONSTRUCTION = new Set(["kind", "width", "height", "seed", "decoder_steps"]);

/** Removes the settings that their kind of job does not use. */
export function relevant(settings) {
  if (settings.kind !== "reconstruct") return settings;
  return Object.fromEntries(Object.entries(settings).filter(([name]) => OF_RECONSTRUCTION.has(name)));
}

function whole(value, low, high) {
  const number = typeof value === "string" && /^\d{1,10}$/.test(value) ? Number(value) : value;
  return Number.isInteger(number) && number >= low && number <= high ? number : undefined;
}

function real(value, low, high) {
  const number = typeof value === "string" && /^\d{1,6}(\.\d{1,6})?$/.test(value) ? Number(value) : value;
  return Number.isFinite(number) && number >= low && number <= high ? number : undefined;
}

function text(value, longest) {
  if (typeof value !== "string") return undefined;
  const cleaned = value.replace(CONTROLS, " ");
  return [...cleaned].length <= longest ? cleaned : undefined;
}

function side(value, size) {
  const number = whole(value, size.min, size.max_side);
  return number !== undefined && number % size.multiple === 0 ? number : undefined;
}

/** Splits `raw` into the settings that are valid for the model and the names of invalid ones. Ignores unknown names. */
export function clean(raw, model) {
  const { size, limits, samplers, loras = [] } = model ?? ANY;
  const checks = {
    kind: (value) => (value === "generate" || value === "reconstruct" ? value : undefined),
    prompt: (value) => text(value, limits.prompt_chars),
    negative: (value) => text(value, limits.prompt_chars),
    width: (value) => side(value, size),
    height: (value) => side(value, size),
    seed: (value) => whole(value, 0, MAX_SEED),
    count: (value) => whole(value, 1, limits.count),
    guidance: (value) => real(value, 0, 100),
    prior_sampler: (value) => (samplers.includes(value) ? value : undefined),
    prior_steps: (value) => whole(value, 1, limits.steps),
    decoder_steps: (value) => whole(value, 1, limits.steps),
    lora: (value) => (loras.some(({ name }) => name === value) ? text(value, 100) || undefined : undefined),
    lora_strength: (value) => real(value, 0, 2),
    strength: (value) => (value === 0 || value === "0" ? undefined : real(value, 0, 1)),
  };
  const settings = {};
  const refused = [];
  for (const name of NAMES) {
    if (!Object.hasOwn(raw, name) || raw[name] === null || raw[name] === undefined) continue;
    const value = checks[name](raw[name]);
    if (value === undefined) refused.push(name);
    else settings[name] = value;
  }
  if (settings.lora === undefined) delete settings.lora_strength; // there is nothing to scale
  if ((settings.width === undefined) !== (settings.height === undefined) || settings.width * settings.height > size.max_pixels) {
    delete settings.width;
    delete settings.height;
    if (!refused.includes("width") && !refused.includes("height")) refused.push("width", "height");
  }
  return { settings, refused };
}

/** The settings in a link and the names of invalid ones, or null if the hash has no settings. */
export function fromHash(hash, model) {
  if (!hash.includes("=")) return null;
  if (hash.length > 100_000) return { settings: {}, refused: ["its length"] };
  return clean(Object.fromEntries(new URLSearchParams(hash.slice(1))), model);
}

export function toHash(settings) {
  const pairs = NAMES.filter((name) => settings[name] !== undefined && settings[name] !== "" && settings[name] !== null)
    .filter((name) => !(name === "kind" && settings.kind === "generate") && !(name === "count" && settings.count === 1))
    .map((name) => [name, String(settings[name])]);
  return `#${new URLSearchParams(pairs)}`;
}

/** The body of POST /v1/jobs. */
export function toBody(settings, image) {
  const { kind, prompt, strength, count, width, height, ...rest } = settings;
  if (kind === "reconstruct") {
    return { kind, image, seed: rest.seed ?? null, decoder_steps: rest.decoder_steps ?? null };
  }
  const body = { kind: "generate", prompts: [prompt ?? ""], count, width, height, ...rest, seed: rest.seed ?? null };
  return image ? { ...body, image, strength } : body;
}

/** The requested settings, updated with the ones that the service chose. */
export function resolved(asked, told) {
  if (typeof told !== "object" || told === null) return asked;
  const prompt = Array.isArray(told.prompts) && told.prompts.length ? told.prompts[0] : asked.prompt;
  const { kind, strength } = asked;
  return relevant({ ...asked, ...clean({ ...told, prompt }, null).settings, kind, ...(strength === undefined ? {} : { strength }) });
}

// Names of settings as they appear at the start of the service's messages, and their labels on the page.
const IN_MESSAGES = {
  kind: "Kind", prompt: "Prompt", prompts: "Prompt", negative: "Negative prompt", size: "Size", width: "Width", height: "Height",
  seed: "Seed", count: "Number of images", guidance: "Guidance", prior_sampler: "Sampler", prior_steps: "Stage C steps",
  decoder_steps: "Stage B steps", lora: "Adapter", lora_strength: "Adapter strength", strength: "Strength", image: "Image",
};

/** The name of a setting inside a sentence. */
export const wordOf = (name) => (IN_MESSAGES[name] ?? name).replace(/^[A-Z](?!tage)/, (letter) => letter.toLowerCase());

/** A message of the service, with labels of the page and without hints for programs. */
export function inPlainWords(message) {
  return message
    .replace(/^([a-z_]+)(\.\d+)?(?= )/, (whole, name) => (Object.hasOwn(IN_MESSAGES, name) ? IN_MESSAGES[name] : whole))
    .replace(/\b(prior_steps|prior_sampler|decoder_steps|lora_strength|lora)\b/g, (name) => wordOf(name))
    .replace(/ is invalid: Input should/, " should")
    .replace(/ See \/openapi\.json\.$/, "");
}

/** A duration as text, such as "1 hour". */
export function duration(seconds) {
  const [count, unit] = seconds >= 3600 && (seconds % 3600 === 0 || seconds > 10_800)
    ? [Math.round(seconds / 3600), "hour"]
    : seconds >= 60 ? [Math.round(seconds / 60), "minute"] : [Math.round(seconds), "second"];
  return `${count} ${unit}${count === 1 ? "" : "s"}`;
}

const LABELS = {
  kind: "Kind", prompt: "Prompt", negative: "Negative", size: "Size", seed: "Seed", count: "Images", guidance: "Guidance",
  prior_sampler: "Sampler", prior_steps: "Stage C steps", decoder_steps: "Stage B steps", lora: "Adapter",
  lora_strength: "Adapter strength", strength: "Strength",
};

/** Name, label and value of each setting that has a value. */
export function inWords(settings) {
  const size = settings.width ? `${settings.width} × ${settings.height}` : undefined;
  return Object.entries({ ...settings, size })
    .filter(([, value]) => value !== undefined && value !== null && value !== "")
    .filter(([name]) => name in LABELS)
    .map(([name, value]) => [name, LABELS[name], String(value)])
    .sort(([a], [b]) => Object.keys(LABELS).indexOf(a) - Object.keys(LABELS).indexOf(b));
}

/** Splits two sets of settings into the shared ones and the rest of each. */
export function shared(a, b) {
  const names = NAMES.filter((name) => a[name] === b[name]);
  const without = (settings) => Object.fromEntries(Object.entries(settings).filter(([name]) => !names.includes(name)));
  return [Object.fromEntries(names.map((name) => [name, a[name]])), without(a), without(b)];
}

/** A short version of a text, for labels that screen readers read often. */
export function brief(text) {
  const letters = [...text];
  return letters.length > 60 ? `${letters.slice(0, 60).join("")}…` : text;
}

/** The settings in one line. */
export function inShort(settings) {
  const steps = [settings.prior_steps, settings.decoder_steps].filter((value) => value).join(" + ");
  return [
    settings.width && `${settings.width} × ${settings.height}`,
    settings.seed !== undefined && `seed ${settings.seed}`,
    settings.guidance !== undefined && settings.kind !== "reconstruct" && `guidance ${settings.guidance}`,
    steps && `${steps} steps`,
    settings.kind !== "reconstruct" && settings.prior_sampler,
    settings.lora && settings.kind !== "reconstruct" && `adapter ${settings.lora}`,
    settings.lora_strength !== undefined && settings.kind !== "reconstruct" && `adapter strength ${settings.lora_strength}`,
    settings.strength !== undefined && settings.kind !== "reconstruct" && `strength ${settings.strength}`,
  ].filter((part) => part).join(" · ");
}

export const newSeed = () => crypto.getRandomValues(new Uint32Array(1))[0];
