// Reads an image file of the user.

const MAX_CHUNKS = 100; // chunks of a PNG to search
const MAX_TEXT = 1 << 20; // bytes of a text chunk
const SENT_AS_IT_IS = new Set(["image/png", "image/jpeg", "image/webp"]);

/** A data URL of `file`: unchanged if the service can read it, else converted and shrunk. Raises `Error` with a message for users. */
export async function readImage(file, { limits, size }) {
  if (!file.type.startsWith("image/")) throw new Error(`${file.name} is not an image. Choose a PNG, JPEG or WebP file`);
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    throw new Error(`${file.name} cannot be read as an image. Choose a PNG, JPEG or WebP file`);
  }
  const longer = Math.max(bitmap.width, bitmap.height);
  // More pixels than the model can generate are of no use, and the service limits them.
  if (SENT_AS_IT_IS.has(file.type) && file.size <= limits.upload_bytes && longer <= 2 * size.max_side) {
    bitmap.close();
    return toDataUrl(file);
  }
  const shrunk = Math.min(1, size.max_side / longer);
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * shrunk));
  canvas.height = Math.max(1, Math.round(bitmap.height * shrunk));
  const context = canvas.getContext("2d");
  context.fillStyle = "white"; // background of transparent images, as in the service
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.95));
  if (!blob || blob.size > limits.upload_bytes) {
    throw new Error(`${file.name} is larger than the service accepts (${megabytes(limits.upload_bytes)}). Choose a smaller image`);
  }
  return toDataUrl(blob);
}

const megabytes = (bytes) => `${(bytes / 2 ** 20).toFixed(1)} MiB`;

function toDataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(reader.result));
    reader.addEventListener("error", () => reject(new Error("The file could not be read. Choose it again")));
    reader.readAsDataURL(blob);
  });
}

/** The settings in a PNG that wuerstchen saved, or null. They are in a text chunk named "wuerstchen". */
export async function settingsInPng(file) {
  const read = async (at, length) => new DataView(await file.slice(at, at + length).arrayBuffer());
  const start = await read(0, 8);
  if (start.byteLength < 8 || start.getUint32(0) !== 0x89504e47) return null;
  for (let at = 8, seen = 0; seen < MAX_CHUNKS; seen += 1) {
    const head = await read(at, 8);
    if (head.byteLength < 8) return null;
    const length = head.getUint32(0);
    const kind = latin(head).slice(4);
    if (kind === "IDAT") return null;
    if (kind === "tEXt" && length <= MAX_TEXT) {
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
