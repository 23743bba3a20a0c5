// The HTTP API, asked with the key that was typed in. The key is kept in this tab's session and sent as a header only.

const KEPT = "ratchet.key";
const TOLD_EVERY_S = 1; // of a job's events: its steps may take milliseconds, and each telling has its cost
const RECONNECT_MS = [500, 1000, 2000, 5000, 10000];

export const session = {
  key: sessionStorage.getItem(KEPT),
  self: null, // what GET /v1/keys/self says
  keep(key) {
    this.key = key;
    sessionStorage.setItem(KEPT, key);
  },
  /** Go on with the key that takes this one's place; who signed on by a proxy has none. */
  change({key, ...self}) {
    if (this.key !== null) this.keep(key);
    this.self = self;
  },
  forget() {
    this.key = this.self = null;
    sessionStorage.removeItem(KEPT);
  },
  may(scope) {
    return this.self?.scopes.includes(scope) ?? false;
  },
};

/** An answer that says what is wrong. */
export class Problem extends Error {
  constructor(status, body) {
    super(body?.detail ?? body?.error?.message ?? `the server answered ${status}`);
    this.status = status;
    this.code = body?.code ?? body?.error?.code;
    const places = (body?.errors ?? []).map((one) => [one.pointer, one.detail].filter(Boolean).join(": "));
    this.more = [...places, body?.hint].filter((one) => one && !this.message.includes(one));
  }
}

/** No answer at all. */
export class Away extends Error {
  message = "The server does not answer: it is down, or the connection is.";
}

function address(path, parameters) {
  const url = new URL(path.replace(/^\//, ""), document.baseURI);
  for (const [name, value] of Object.entries(parameters ?? {})) {
    for (const one of Array.isArray(value) ? value : [value]) {
      if (one !== null && one !== undefined && one !== "") url.searchParams.append(name, one);
    }
  }
  return url;
}

let asked = null; // by the dialog that is open: a request -> its Idempotency-Key

/** While a dialog is open, an equal request is the same request: sent again after its answer was lost, it is done once. Later, or from
 *  another dialog, it is a new one: what it changed may have been changed back meanwhile. */
export function sameWhile(open) {
  asked = open ? new Map() : null;
}

export const CONNECTION = {};

/** Tell the frame whether what is asked for again by itself is answered. `who` asks: a loop, or CONNECTION, which stands for every
 *  request. `error` is what it got; null: an answer. */
export function answered(who, error = null) {
  dispatchEvent(new CustomEvent("answered", {detail: {who, error}}));
}

/** fetch with the key; raises Problem, or Away. A key that is not known any more ends the session. */
export async function request(method, path, {parameters, body, headers, signal, key} = {}) {
  const used = key ?? session.key; // null: the sign-on proxy says who asks, by its cookie
  const sent = used === null ? {...headers} : {Authorization: `Bearer ${used}`, ...headers};
  if (body !== undefined) sent["Content-Type"] ??= "application/json";
  const text = body === undefined || typeof body === "string" ? body : JSON.stringify(body);
  if (method === "POST") {
    const question = `${path} ${text}`;
    sent["Idempotency-Key"] = asked?.get(question) ?? random();
    asked?.set(question, sent["Idempotency-Key"]);
  }
  let answer;
  try {
    answer = await fetch(address(path, parameters), {method, headers: sent, body: text, signal, cache: "no-store", credentials: used === null ? "same-origin" : "omit"});
  } catch (error) {
    if (signal?.aborted) throw error;
    const away = new Away();
    answered(CONNECTION, away);
    throw away;
  }
  if (answer.status < 500) answered(CONNECTION);
  if (answer.ok) return answer;
  let said = null;
  try {
    said = await answer.json();
  } catch { /* an answer of a proxy */ }
  const problem = new Problem(answer.status, said);
  if (answer.status === 401 && key === undefined) dispatchEvent(new CustomEvent("signed-out", {detail: problem}));
  throw problem;
}

/** Parse JSON so that JSON.stringify gives every whole number back as it was, also those that a double cannot hold, such as seeds. */
export function exactly(text) {
  const kept = (_, value, token) => (Number.isInteger(value) && !Number.isSafeInteger(value) && token?.source && JSON.rawJSON ? JSON.rawJSON(token.source) : value);
  return JSON.parse(text, kept);
}

export async function getExactly(path, signal) {
  return exactly(await (await request("GET", path, {signal})).text());
}

export async function get(path, parameters, signal) {
  return (await request("GET", path, {parameters, signal})).json();
}

export async function send(method, path, body, signal) {
  const answer = await request(method, path, {body, signal});
  return answer.status === 204 ? null : answer.json();
}

function random() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** The server-sent events of an answer, as {id, event, data}. */
export async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const {done, value} = await reader.read();
    if (done) return;
    rest += value.replaceAll("\r", "");
    const parts = rest.split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const found = {id: null, event: "message", data: ""};
      for (const line of part.split("\n")) {
        const at = line.indexOf(":");
        if (at > 0) found[line.slice(0, at)] = (line[at + 1] === " " ? line.slice(at + 2) : line.slice(at + 1));
      }
      if (found.data) yield found;
    }
  }
}

/** Follow the events of a job after number `last`, until it has ended or the signal says so; broken connections are made again
 *  from the last event that came. `tell` gets each event, `state` "live", "away" or "ended". */
export async function follow(jobId, last, {tell, state, signal}) {
  let tries = 0;
  while (!signal.aborted) {
    try {
      const headers = {Accept: "text/event-stream", "Last-Event-ID": String(last)};
      const answer = await request("GET", `/v1/jobs/${jobId}/events`, {parameters: {every_s: TOLD_EVERY_S}, headers, signal});
      state("live");
      for await (const {id, data} of events(answer)) {
        tries = 0;
        if (id !== null) last = Number(id);
        tell(JSON.parse(data));
      }
      const {data: [job]} = await get("/v1/jobs:overview", {id: jobId, curves: "none"}, signal);
      if (!job || (["succeeded", "failed", "cancelled"].includes(job.status) && job.last_event <= last)) return state("ended");
    } catch (error) {
      if (signal.aborted) return;
      if (error instanceof Problem && error.status < 500 && error.status !== 429) throw error;
    }
    state("away");
    await wait(RECONNECT_MS[Math.min(tries++, RECONNECT_MS.length - 1)], signal);
  }
}

/** Sleep, at most until the signal. */
export function wait(milliseconds, signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, milliseconds);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      resolve();
    }, {once: true});
  });
}

/** Do something now and again every so often while the page is looked at. Faults of one round wait for the next. */
export async function poll(work, milliseconds, signal) {
  while (!signal.aborted) {
    try {
      if (!document.hidden) {
        await work();
        if (!signal.aborted) answered(work);
      }
    } catch (error) {
      if (signal.aborted) return;
      if (error.status) answered(work, error.status >= 500 ? error : null);
      if (error instanceof Problem && [401, 403, 404].includes(error.status)) throw error;
    }
    await wait(milliseconds, signal);
  }
}
