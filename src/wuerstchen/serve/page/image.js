// A picture of the user's, read for sending.

const SENT_AS_IT_IS = new Set(["image/png", "image/jpeg", "image/webp"]);

/** A data URL of `file`: as it is where the service can read it, else drawn anew and smaller. Raises `Error` in words. */
export async function readPicture(file, { limits, size }) {
  if (!file.type.startsWith("image/")) throw new Error(`${file.name} is no picture; choose a PNG, JPEG or WebP file`);
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    throw new Error(`${file.name} cannot be read as a picture; choose a PNG, JPEG or WebP file`);
  }
  if (SENT_AS_IT_IS.has(file.type) && file.size <= limits.upload_bytes) return toDataUrl(file);
  const shrunk = Math.min(1, size.max_side / Math.max(bitmap.width, bitmap.height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * shrunk));
  canvas.height = Math.max(1, Math.round(bitmap.height * shrunk));
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.95));
  if (!blob || blob.size > limits.upload_bytes) {
    throw new Error(`${file.name} is larger than the service takes (${megabytes(limits.upload_bytes)}); choose a smaller picture`);
  }
  return toDataUrl(blob);
}

const megabytes = (bytes) => `${(bytes / 2 ** 20).toFixed(1)} MiB`;

function toDataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(reader.result));
    reader.addEventListener("error", () => reject(new Error("The file could not be read; choose it again")));
    reader.readAsDataURL(blob);
  });
}

/** The settings in a PNG that wuerstchen saved, or null. They lie in a text chunk named "wuerstchen". */
export async function settingsInPng(file) {
  const view = new DataView(await file.slice(0, 1 << 16).arrayBuffer());
  if (view.byteLength < 8 || view.getUint32(0) !== 0x89504e47) return null;
  for (let at = 8; at + 8 <= view.byteLength; ) {
    const length = view.getUint32(at);
    const kind = latin(view, at + 4, 4);
    if (kind === "IDAT" || at + 8 + length > view.byteLength) return null;
    if (kind === "tEXt") {
      const chunk = latin(view, at + 8, length);
      if (chunk.startsWith("wuerstchen\0")) return parsed(chunk.slice("wuerstchen\0".length));
    }
    at += 12 + length;
  }
  return null;
}

const latin = (view, at, length) => new TextDecoder("latin1").decode(new Uint8Array(view.buffer, at, length));

function parsed(text) {
  try {
    const settings = JSON.parse(text);
    if (typeof settings !== "object" || settings === null || Array.isArray(settings)) return null;
    return Array.isArray(settings.prompts) ? { ...settings, prompt: settings.prompts[0] } : settings;
  } catch {
    return null;
  }
}
