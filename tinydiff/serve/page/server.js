// The state of the server in the header: polled regularly, and at once when a request got no answer.

import { onNoAnswer } from "./api.js";

const byId = (id) => document.getElementById(id);
const PATIENCE = 10_000, WHEN_READY = 5000, ELSE = 1500; // milliseconds: for an answer, and from one question to the next

let answers = true, wake = () => {};
const waiting = new Set();

/** Announce a text to screen readers. */
export const announce = (text) => { byId("news").textContent = text; };

/** Resolves when the server answers again, with an error when `signal` aborts. */
export function back(signal) {
  return new Promise((resolve, reject) => {
    if (answers) { resolve(); return; }
    waiting.add(resolve);
    signal?.addEventListener("abort", () => { waiting.delete(resolve); reject(signal.reason); }, { once: true });
  });
}

function say(state, text) {
  const pill = byId("state");
  if (pill.dataset.state !== state && ["failed", "ready"].includes(state)) announce(state === "failed" ? text : `the server is ${text}`);
  pill.dataset.state = state;
  pill.textContent = text;
  byId("again").hidden = state !== "failed";
}

async function look() {
  const answer = await fetch("ready", { signal: AbortSignal.timeout(PATIENCE), cache: "no-store" });
  const { phase, done, total, eta_s: eta } = await answer.json();
  const text = [phase, total > 1 && !answer.ok && `${done} of ${total}`, eta && `${Math.ceil(eta)} s`].filter(Boolean).join(", ");
  say(answer.ok ? "ready" : phase, text);
  return answer.ok;
}

/** Show the server's state while the page is open. onBack() is called when the server first answers, and when it answers again. */
export async function watch(onBack) {
  answers = false;
  for (;;) {
    let ready = false;
    const asleep = new Promise((resolve) => { wake = resolve; }); // what happens while the answer is awaited counts too
    try {
      ready = await look();
      if (!answers) {
        answers = true;
        for (const resolve of waiting) resolve();
        waiting.clear();
        onBack();
      }
    } catch {
      answers = false;
      say("failed", "the server does not answer");
    }
    await Promise.race([asleep, later(ready ? WHEN_READY : ELSE)]);
  }
}

/** Resolves after so many milliseconds, if the page is then seen; else when it is. */
const later = (ms) => new Promise((resolve) => {
  setTimeout(() => {
    if (!document.hidden) resolve();
    else document.addEventListener("visibilitychange", resolve, { once: true });
  }, ms);
});

onNoAnswer(() => {
  answers = false;
  say("failed", "the server does not answer");
  wake();
});
byId("again").onclick = () => wake();
