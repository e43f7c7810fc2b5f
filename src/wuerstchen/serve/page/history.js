// Stores the entries of the session in sessionStorage: settings and image URLs, never the images themselves.

import { imageUrl } from "./api.js";
import { session } from "./dom.js";
import { clean, relevant } from "./settings.js";

const KEY = "wuerstchen.history";
const MAX_ENTRIES = 100;
const MAX_IMAGES = 1000; // of an entry
const STATES = new Set(["queued", "running", "done", "failed", "cancelled"]);

/** The stored entries, newest first. Invalid ones are skipped. */
export function load() {
  let stored;
  try {
    stored = JSON.parse(session.getItem(KEY) ?? "[]");
  } catch {
    return [];
  }
  if (!Array.isArray(stored)) return [];
  return stored.map(entry).filter((each) => each !== null);
}

function entry(raw) {
  if (!Array.isArray(raw?.parts)) return null;
  const parts = raw.parts.slice(0, 2).map(part).filter((each) => each !== null);
  return parts.length ? { parts } : null;
}

function part(raw) {
  if (typeof raw?.settings !== "object" || typeof raw.id !== "string" || !STATES.has(raw.state)) return null;
  const images = (Array.isArray(raw.images) ? raw.images : []).map(parseImage).filter((each) => each !== null);
  return {
    id: raw.id,
    state: raw.state,
    settings: relevant(clean(raw.settings, null).settings),
    total: total(raw.total) ?? images.length,
    error: typeof raw.error === "string" ? raw.error : null,
    notices: texts(raw.notices),
    images,
  };
}

export const texts = (raw) => (Array.isArray(raw) ? raw.filter((each) => typeof each === "string").slice(0, 10) : []);

/** The number of images to expect, or undefined if it is not a reasonable number. */
export const total = (raw) => (Number.isInteger(raw) && raw > 0 && raw <= MAX_IMAGES ? raw : undefined);

/** Validates an image object of the service. Returns null if it is invalid. */
export function parseImage(raw) {
  const url = imageUrl(raw?.url);
  if (url === null || !Number.isInteger(raw.index) || raw.index < 0 || raw.index >= MAX_IMAGES) return null;
  const { settings } = clean({ width: raw.width, height: raw.height, seed: raw.seed, prompt: raw.prompt }, null);
  return { index: raw.index, url, ...settings };
}

/** Stores as many of the newest entries as there is space for. */
export function save(entries) {
  let kept = entries
    .filter(({ parts }) => parts.every(({ id }) => id))
    .slice(0, MAX_ENTRIES)
    .map(({ parts }) => ({
      parts: parts.map(({ id, state, settings, total, error, notices, images }) => ({ id, state, settings, total, error, notices, images })),
    }));
  for (;;) {
    try {
      session.setItem(KEY, JSON.stringify(kept));
      return;
    } catch {
      if (kept.length === 0) return; // there is no storage; the page works without it
      kept = kept.slice(0, Math.floor(kept.length / 2));
    }
  }
}
