// Client for the service: errors, tokens, and event streams that resume after a lost connection.

import { keep, pause, session } from "./dom.js";
import { inPlainWords } from "./settings.js";

const TOKEN = "wuerstchen.token";
const ENDS = new Set(["done", "failed", "cancelled"]);
// A browser opens six connections per host for all tabs together, and some must stay free for other requests.
// Without TLS, pages cannot coordinate with other tabs.
const STREAMS = navigator.locks ? 3 : 2;
const STREAM_TIMEOUT_MS = 30_000; // the service sends a line every 10 s
const TIMEOUT_MS = { GET: 20_000, DELETE: 20_000, POST: 180_000 }; // uploads may be slow

/** URLs are relative to the page, so that it works under any path prefix of a proxy. */
export const address = (path) => new URL(path, new URL(".", document.baseURI)).href;

/** The URL of an image, or null if `url` is not one of the service. */
export function imageUrl(url) {
  const found = typeof url === "string" && /\/v1\/images\/([\w.-]+\.png)$/.exec(url);
  return found ? address(`v1/images/${found[1]}`) : null;
}

/** The service refused a request. `message` is for users; `param` is the setting that caused it. */
export class Refused extends Error {
  constructor(message, status, param = null) {
    super(message);
    this.status = status;
    this.param = param;
  }
}

/** The service did not answer, or only a proxy did. */
export class Unreachable extends Error {
  constructor() {
    super("The service is not responding.");
  }
}

let held = session.getItem(TOKEN);
let askForToken = async () => false;
let asking = null;
/** `ask(wrong)` asks the user for a token. Resolves to true once there is one, to false if the user cancels. */
export function onTokenNeeded(ask) {
  askForToken = ask;
}
export function setToken(token) {
  held = token;
  keep(session, TOKEN, token);
}

/** Sends a request. Returns a successful response, or raises `Refused`, `Unreachable`, or the abort reason of `signal`. */
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
        signal: signal ?? AbortSignal.timeout(TIMEOUT_MS[method]),
        cache: "no-store",
        credentials: "same-origin", // a proxy may need its cookies
      });
    } catch (error) {
      if (signal?.aborted) throw error;
      throw new Unreachable();
    }
    if (response.ok) return response;
    const said = await errorOf(response);
    if (response.status === 401) {
      // Another request may have asked for the token meanwhile.
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
    // not an answer of the service itself
  }
  if (typeof error?.message === "string") return new Refused(inPlainWords(error.message), response.status, error.param ?? null);
  if (response.status >= 502 && response.status <= 504) return new Unreachable();
  if (response.status === 413) return new Refused("The request is too large for the service. Use a smaller image.", 413);
  return new Refused(`The service answered with status ${response.status} and gave no reason.`, response.status);
}

/** The JSON object in a response. Raises `Unreachable` for the page of a proxy and for truncated responses. */
async function objectOf(response) {
  const found = await response.json().catch(() => null);
  if (typeof found !== "object" || found === null) throw new Unreachable();
  return found;
}

export const getJson = async (path) => objectOf(await request(path));
export const postJob = async (body) => objectOf(await request("v1/jobs", { method: "POST", body }));
export const cancelJob = (id) => request(`v1/jobs/${encodeURIComponent(id)}`, { method: "DELETE" });

/** Whether an error may go away when the request is repeated. */
const passes = (error) => error instanceof Unreachable || error.status === 429 || error.status >= 500;

let streams = 0;
/** Runs `watch` with one of the streams that all tabs share. Returns false if none is free. */
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
 * Follows a job to its end. Calls `on.job(job)` with the whole job at first and after a lost connection,
 * `on.event(name, data)` for each event, and `on.lost()` when the service does not respond. Only a few jobs use a
 * stream at a time; the others are polled until a stream is free. Raises `Refused` if the service does not know the
 * job.
 */
export async function follow(id, on) {
  const path = `v1/jobs/${encodeURIComponent(id)}`;
  let last = null;
  let wait = 500;
  for (;;) {
    try {
      const job = await getJson(path);
      wait = 500;
      on.job(job);
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
        on.job(await getJson(path)); // with the notices
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
    alarm = setTimeout(() => abort.abort(), STREAM_TIMEOUT_MS);
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
      // CR and LF may arrive in different pieces, so look at complete blocks only.
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
