// The session's entries in sessionStorage: settings and addresses of pictures, never the pictures themselves.

import { pictureAddress } from "./api.js";
import { session } from "./dom.js";
import { clean, relevant } from "./settings.js";

const KEY = "wuerstchen.history";
const KEPT = 100; // entries
const MOST = 1000; // pictures of an entry
const STATES = new Set(["queued", "running", "done", "failed", "cancelled"]);

/** Entries as they were stored, newest first; what is not of their form is left out. */
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
  const images = (Array.isArray(raw.images) ? raw.images : []).map(picture).filter((each) => each !== null);
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

/** How many pictures there will be, or undefined where that is no number to make room for. */
export const total = (raw) => (Number.isInteger(raw) && raw > 0 && raw <= MOST ? raw : undefined);

/** A picture as the service tells of it, or null of what is none. */
export function picture(raw) {
  const url = pictureAddress(raw?.url);
  if (url === null || !Number.isInteger(raw.index) || raw.index < 0 || raw.index >= MOST) return null;
  const { settings } = clean({ width: raw.width, height: raw.height, seed: raw.seed, prompt: raw.prompt }, null);
  return { index: raw.index, url, ...settings };
}

/** Writes as many of the newest entries as there is room for. */
export function save(entries) {
  let kept = entries
    .filter(({ parts }) => parts.every(({ id }) => id))
    .slice(0, KEPT)
    .map(({ parts }) => ({
      parts: parts.map(({ id, state, settings, total, error, notices, images }) => ({ id, state, settings, total, error, notices, images })),
    }));
  for (;;) {
    try {
      session.setItem(KEY, JSON.stringify(kept));
      return;
    } catch {
      if (kept.length === 0) return; // no storage at all: the page works on without
      kept = kept.slice(0, Math.floor(kept.length / 2));
    }
  }
}
