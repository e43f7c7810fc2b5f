// A picture of the user's, read for sending.

const CHUNKS = 100; // of a PNG that are looked at
const LONGEST = 1 << 20; // bytes of a text
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
  const longer = Math.max(bitmap.width, bitmap.height);
  // Far more pixels than can be drawn are of no use, and the service bounds them.
  if (SENT_AS_IT_IS.has(file.type) && file.size <= limits.upload_bytes && longer <= 2 * size.max_side) {
    bitmap.close();
    return toDataUrl(file);
  }
  const shrunk = Math.min(1, size.max_side / longer);
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * shrunk));
  canvas.height = Math.max(1, Math.round(bitmap.height * shrunk));
  const context = canvas.getContext("2d");
  context.fillStyle = "white"; // below what is transparent, as in the service
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
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
  const read = async (at, length) => new DataView(await file.slice(at, at + length).arrayBuffer());
  const start = await read(0, 8);
  if (start.byteLength < 8 || start.getUint32(0) !== 0x89504e47) return null;
  for (let at = 8, seen = 0; seen < CHUNKS; seen += 1) {
    const head = await read(at, 8);
    if (head.byteLength < 8) return null;
    const length = head.getUint32(0);
    const kind = latin(head).slice(4);
    if (kind === "IDAT") return null;
    if (kind === "tEXt" && length <= LONGEST) {
      const chunk = latin(await read(at + 8, length));
      if (chunk.startsWith("wuerstchen\0")) return parsed(chunk.slice("wuerstchen\0".length));
    }
    at += 12 + length;
  }
  return null;
}

const latin = (view) => new TextDecoder("latin1").decode(view);

function parsed(text) {
  try {
    const settings = JSON.parse(text);
    if (typeof settings !== "object" || settings === null || Array.isArray(settings)) return null;
    return Array.isArray(settings.prompts) ? { ...settings, prompt: settings.prompts[0] } : settings;
  } catch {
    return null;
  }
}
