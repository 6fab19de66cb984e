// What the server is asked. Addresses are relative, so that the page also works below a path of another server.

const KEY = "tinydiff-key";
let needKey = () => Promise.reject(new Error("this server asks for a key"));

export const saveKey = (key) => sessionStorage.setItem(KEY, key);
export const onKeyNeeded = (ask) => { needKey = ask; };

/** A request that the server refused: its sentence, the field it names, and why in one word. */
export class Refused extends Error {
  constructor(error, status) {
    super(error?.message ?? `the server answered ${status}`);
    this.field = error?.param ?? null;
    this.code = error?.code ?? null;
    this.status = status;
  }
}

/** The answer to a request; where the server wants a key, the user is asked for it and the request made again. */
export async function ask(path, { method = "GET", json, form, signal, redirect } = {}) {
  for (;;) {
    const headers = {};
    const key = sessionStorage.getItem(KEY);
    if (key) headers.Authorization = `Bearer ${key}`;
    if (json) headers["Content-Type"] = "application/json";
    const answer = await fetch(path, { method, headers, signal, redirect, body: json ? JSON.stringify(json) : form });
    if (answer.ok || answer.type === "opaqueredirect") return answer;
    const said = await answer.json().catch(() => ({}));
    if (answer.status !== 401) throw new Refused(said.error, answer.status);
    await needKey(key ? said.error?.message : "");
  }
}

export const askJson = async (path, options) => (await ask(path, options)).json();

/** The address, within this page, of a file of the server's; null where it has moved to another storage. */
export async function askFile(path) {
  const answer = await ask(path, { redirect: "manual" }); // scripts may not follow to another storage
  return answer.ok ? URL.createObjectURL(await answer.blob()) : null;
}

/** The events of a streamed answer, as objects, as they come. An error among them is raised. */
export async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
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

/** The address, within this page, of a picture that came as base64. */
export function picture(base64, format = "png") {
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  return URL.createObjectURL(new Blob([bytes], { type: `image/${format}` }));
}

/** Resolves after so many milliseconds, or at once with an error when `signal` aborts. */
export const rest = (ms, signal) => new Promise((resolve, reject) => {
  const timer = setTimeout(resolve, ms);
  signal?.addEventListener("abort", () => { clearTimeout(timer); reject(signal.reason); }, { once: true });
});
