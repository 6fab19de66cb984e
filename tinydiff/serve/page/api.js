// Requests to the server. URLs are relative, so the page also works below a path of another server.

import { recall, remember } from "./memory.js";

const KEY = "tinydiff-key";
let needKey = () => Promise.reject(new Error("this server requires an API key"));
let reportNoAnswer = () => {};

export const saveKey = (key) => remember(KEY, key, "sessionStorage");
export const onKeyNeeded = (ask) => { needKey = ask; };
export const onNoAnswer = (tell) => { reportNoAnswer = tell; };

/** An error answer of the server: its message, the field it names, and its code. */
export class Refused extends Error {
  constructor(error, status) {
    super(error?.message ?? `the server answered ${status}`);
    this.field = error?.param ?? null;
    this.code = error?.code ?? null;
    this.status = status;
  }
}

/** The error of a request without an answer. */
export class NoAnswer extends Error {
  constructor() {
    super("the server does not answer");
  }
}

/** What `part`, a step of talking to the server, returns; NoAnswer where the connection fails or breaks. */
async function reached(part, signal) {
  try {
    return await part();
  } catch (error) {
    if (signal?.aborted) throw error;
    reportNoAnswer();
    throw new NoAnswer();
  }
}

export const reach = (path, options = {}) => reached(() => fetch(path, options), options.signal);

/**
 * The answer to a request. Where the server wants a key, the user is asked for it, and where it has too much to do, the time is waited out
 * that it says: the request is then made again. busy(seconds) is told before each such wait.
 */
export async function ask(path, { method = "GET", json, form, signal, redirect, keepalive, busy = () => {} } = {}) {
  for (;;) {
    const headers = {};
    const key = recall(KEY, "sessionStorage");
    if (key) headers.Authorization = `Bearer ${key}`;
    if (json) headers["Content-Type"] = "application/json";
    const answer = await reach(path, { method, headers, signal, redirect, keepalive, body: json ? JSON.stringify(json) : form });
    if (answer.ok || answer.type === "opaqueredirect") return answer;
    const said = await answer.json().catch(() => ({}));
    const wait = Number(answer.headers.get("retry-after"));
    if (answer.status === 401) await needKey(key ? said.error?.message : "");
    else if (answer.status === 429 && wait > 0) {
      busy(wait);
      await rest(1000 * wait, signal);
    } else throw new Refused(said.error, answer.status);
  }
}

export const askJson = async (path, options) => (await ask(path, options)).json();

/** A file of this page: its bytes and a URL for them. */
export const local = (blob) => ({ blob, src: URL.createObjectURL(blob) });

/** A file of the server's; null where it has moved to another storage. */
export async function askFile(path) {
  const answer = await ask(path, { redirect: "manual" }); // scripts may not follow to another storage
  return answer.ok ? local(await reached(() => answer.blob())) : null;
}

/** The events of a streamed answer, as objects, as they come. An error among them is raised. */
export async function* events(answer, signal) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reached(() => reader.read(), signal);
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const lines = block.split("\n").filter((line) => line.startsWith("data:"));
      const data = lines.map((line) => line.slice(5).trim()).join("\n");
      if (!data || data === "[DONE]") continue; // a comment keeps the connection open
      const event = JSON.parse(data);
      if (event.error) throw new Refused(event.error, 200);
      yield event;
    }
  }
}

/** An image that came as base64. */
export function decoded(base64, format = "png") {
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  return local(new Blob([bytes], { type: `image/${format}` }));
}

/** Resolves after so many milliseconds, or at once with an error when `signal` aborts. */
export const rest = (ms, signal) => new Promise((resolve, reject) => {
  signal?.throwIfAborted();
  const timer = setTimeout(resolve, ms);
  signal?.addEventListener("abort", () => { clearTimeout(timer); reject(signal.reason); }, { once: true });
});
