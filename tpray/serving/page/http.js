// Requests to this server, with the key that the user has given.

const KEPT = "tpray-key";

/** What the server said was wrong, in its own words. status 0: it did not answer. */
export class ServerError extends Error {
  constructor(status, sentence, retryAfter = 0) {
    super(sentence);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

export const url = (path) => new URL(path, document.baseURI).href;
export const key = () => sessionStorage.getItem(KEPT);
export const keepKey = (value) => sessionStorage.setItem(KEPT, value);

/** A response that is no error; else a ServerError. */
export async function send(path, options = {}) {
  const headers = { ...options.headers };
  if (key()) headers.authorization = `Bearer ${key()}`;
  let response;
  try {
    response = await fetch(url(path), { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(0, "The server does not answer. It may be stopping or starting: try again soon.");
  }
  if (response.ok) return response;
  throw new ServerError(response.status, await sentence(response), Number(response.headers.get("retry-after")) || 0);
}

/** The words of an error, in whatever form this server gives it. */
async function sentence(response) {
  const text = await response.text();
  try {
    const body = JSON.parse(text);
    const said = body.error?.message ?? body.error ?? body.message ?? body.detail;
    if (typeof said === "string") return said;
  } catch {
    // Not JSON.
  }
  return `The server answered ${response.status} ${response.statusText}`.trim();
}

/** Post JSON: the answer, its headers, and how long it took from here, in milliseconds. */
export async function post(path, body) {
  const began = performance.now();
  const response = await send(path, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(body),
  });
  const answer = await response.json();
  return { answer, headers: response.headers, took: performance.now() - began };
}

/** Server-sent events of a path, until the server ends them. (EventSource cannot send a key.) */
export async function* events(path, signal) {
  const response = await send(path, { signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const field = (name) => block.split("\n").find((line) => line.startsWith(`${name}: `))?.slice(name.length + 2);
      yield { name: field("event"), data: JSON.parse(field("data")) };
    }
  }
}
