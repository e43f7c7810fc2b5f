// Talks to the service: errors in its words, tokens, and events that go on after a lost connection.

import { keep, pause, session } from "./dom.js";
import { inPlainWords } from "./settings.js";

const TOKEN = "wuerstchen.token";
const ENDS = new Set(["done", "failed", "cancelled"]);
// A browser opens six connections to a host, for all tabs together: some must stay free for all else. Pages
// without TLS do not hear of other tabs.
const STREAMS = navigator.locks ? 3 : 2;
const SILENCE = 30_000; // ms; the service sends a line every 10 s
const PATIENCE = { GET: 20_000, DELETE: 20_000, POST: 180_000 }; // ms; an upload may take long

/** Addresses are relative to the page, so that it works below any path of a proxy. */
export const address = (path) => new URL(path, new URL(".", document.baseURI)).href;

/** The address of a picture as the page may load it, or null of what is none. */
export function pictureAddress(url) {
  const found = typeof url === "string" && /\/v1\/images\/([\w.-]+\.png)$/.exec(url);
  return found ? address(`v1/images/${found[1]}`) : null;
}

/** The service said no: `message` is its own in plain words, `param` the setting that caused it. */
export class Refused extends Error {
  constructor(message, status, param = null) {
    super(message);
    this.status = status;
    this.param = param;
  }
}

/** Nobody answered, or only a proxy did. */
export class Unreachable extends Error {
  constructor() {
    super("The service does not answer.");
  }
}

let held = session.getItem(TOKEN);
let askForToken = async () => false;
let asking = null;
/** `ask(wrong)` gets a token from the user: true once there is one, false if they will not. */
export function onTokenNeeded(ask) {
  askForToken = ask;
}
export function setToken(token) {
  held = token;
  keep(session, TOKEN, token);
}

/** A response of the service that is no error. Raises `Refused`, `Unreachable`, or what the signal aborted with. */
export async function request(path, { method = "GET", body, headers = {}, signal } = {}) {
  for (;;) {
    const token = held;
    const sent = { ...headers };
    if (token) sent.Authorization = `Bearer ${token}`;
    if (body !== undefined) sent["Content-Type"] = "application/json";
    let response;
    try {
      response = await fetch(address(path), {
        method,
        headers: sent,
        body: body === undefined ? undefined : JSON.stringify(body),
        signal: signal ?? AbortSignal.timeout(PATIENCE[method]),
        cache: "no-store",
        credentials: "same-origin", // a proxy in front may have its own
      });
    } catch (error) {
      if (signal?.aborted) throw error;
      throw new Unreachable();
    }
    if (response.ok) return response;
    const said = await errorOf(response);
    if (response.status === 401) {
      // Another request may have brought the token by now.
      if (held !== token) continue;
      asking ??= askForToken(token !== null).finally(() => (asking = null));
      if (await asking) continue;
    }
    throw said;
  }
}

async function errorOf(response) {
  let error = null;
  try {
    ({ error } = await response.json());
  } catch {
    // not the service's own answer
  }
  if (typeof error?.message === "string") return new Refused(inPlainWords(error.message), response.status, error.param ?? null);
  if (response.status >= 502 && response.status <= 504) return new Unreachable();
  if (response.status === 413) return new Refused("This is too large for the service; make it smaller", 413);
  return new Refused(`The service answered ${response.status} without a reason`, response.status);
}

/** The object in an answer; a proxy's own page, or an answer that was cut off, is none. */
async function objectOf(response) {
  const found = await response.json().catch(() => null);
  if (typeof found !== "object" || found === null) throw new Unreachable();
  return found;
}

export const getJson = async (path) => objectOf(await request(path));
export const postJob = async (body) => objectOf(await request("v1/jobs", { method: "POST", body }));
export const cancelJob = (id) => request(`v1/jobs/${encodeURIComponent(id)}`, { method: "DELETE" });

/** Of a question about a job: asked again, it may have an answer. */
const passes = (error) => error instanceof Unreachable || error.status === 429 || error.status >= 500;

let streams = 0;
/** Runs `watch` with one of the streams that tabs share, or is false where none is free. */
async function withStream(watch) {
  if (!navigator.locks) {
    if (streams === STREAMS) return false;
    streams += 1;
    await watch().finally(() => (streams -= 1));
    return true;
  }
  for (let i = 0; i < STREAMS; i += 1) {
    const free = await navigator.locks.request(`wuerstchen.stream.${i}`, { ifAvailable: true }, async (lock) => {
      if (lock) await watch();
      return lock !== null;
    });
    if (free) return true;
  }
  return false;
}

/**
 * Follows a job to its end. `on.snapshot(job)` gets the job as a whole, first and whenever the connection was
 * lost; `on.event(name, data)` each event; `on.lost()` says that nobody answers. Only some jobs stream at a
 * time; others are asked for now and then until their turn comes. Raises `Refused` where the service does not
 * know the job.
 */
export async function follow(id, on) {
  const path = `v1/jobs/${encodeURIComponent(id)}`;
  let last = null;
  let wait = 500;
  for (;;) {
    try {
      const job = await getJson(path);
      wait = 500;
      on.snapshot(job);
      if (ENDS.has(job.state)) return;
      let ended = false;
      const streamed = await withStream(async () => {
        for await (const { id: at, name, data } of events(`${path}/events`, last)) {
          last = at ?? last;
          on.event(name, data);
          ended = ENDS.has(name);
          if (ended) return;
        }
      });
      if (ended) {
        on.snapshot(await getJson(path)); // with the notices
        return;
      }
      if (!streamed) wait = 1000;
    } catch (error) {
      if (!passes(error)) throw error;
      on.lost();
      wait = Math.min(wait * 1.6, 6000);
    }
    await pause(wait);
  }
}

async function* events(path, last) {
  const abort = new AbortController();
  let alarm;
  const heard = () => {
    clearTimeout(alarm);
    alarm = setTimeout(() => abort.abort(), SILENCE);
  };
  try {
    heard();
    const response = await request(path, {
      headers: last === null ? {} : { "Last-Event-ID": last },
      signal: abort.signal,
    });
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      heard();
      text += value;
      // A pair of CR and LF may be cut between two pieces: only whole lines are looked at.
      const blocks = text.replace(/\r\n/g, "\n").split("\n\n");
      text = blocks.pop();
      for (const block of blocks) {
        const event = parse(block);
        if (event) yield event;
      }
    }
  } catch (error) {
    if (error instanceof Refused) throw error;
    throw new Unreachable();
  } finally {
    clearTimeout(alarm);
    abort.abort();
  }
}

function parse(block) {
  let id = null;
  let name = null;
  const data = [];
  for (const line of block.split("\n")) {
    const [, field, value] = /^([^:]*):? ?(.*)$/s.exec(line);
    if (field === "id") id = value;
    else if (field === "event") name = value;
    else if (field === "data") data.push(value);
  }
  return name === null ? null : { id, name, data: data.length ? JSON.parse(data.join("\n")) : {} };
}
