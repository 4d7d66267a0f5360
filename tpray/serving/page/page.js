// The page: asks the server what its model is, makes the form that suits it, and shows answers.

import { brief, listenToCopies, showRequest } from "./copies.js";
import { digits, find, make } from "./dom.js";
import { examples, likeliest } from "./examples.js";
import { keepKey, post, send, ServerError } from "./http.js";
import { KINDS } from "./kinds.js";
import { follow } from "./live.js";

let info = null;
let kind = null;
let asked = 0; // the latest request: an answer to one before it comes too late

/** What the form says; null: what the server does of its own accord. */
function options() {
  const [raw, truncate] = ["raw", "truncate"].map((id) => find(id).checked);
  return { raw: raw || null, truncate: truncate === info.auto_truncate ? null : truncate };
}

const body = () => brief(KINDS[kind].body(KINDS[kind].read(), options()));

async function begin() {
  try {
    info = await (await send("info")).json();
  } catch (error) {
    showError(error);
    if (error.status !== 401) setTimeout(begin, 2000);
    return;
  }
  find("key-form").hidden = true;
  const name = nameOf(info.model_id);
  find("model").textContent = name;
  find("model").title = info.model_id;
  document.title = `${name} – tpray`;
  find("truncate").checked = info.auto_truncate;
  const choices = info.inputs.filter((each) => each in KINDS);
  find("kinds").hidden = choices.length < 2;
  find("kinds").append(...choices.map((each) =>
    make("label", {}, make("input", { type: "radio", name: "kind", value: each, onchange: () => choose(each) }), KINDS[each].name)));
  choose(likeliest(info));
  find("answer").replaceChildren();
  follow(askForKey);
}

/** Of a folder its last name; a Hub id is one already. */
function nameOf(source) {
  if (source.endsWith("/tpray/demo/model")) return "the embedded demo";
  return source.startsWith("/") ? source.split("/").filter(Boolean).at(-1) : source;
}

function choose(wanted) {
  kind = wanted;
  find("raw-option").hidden = kind === "tokens";
  find("kinds").querySelector(`[value="${kind}"]`).checked = true;
  find("fields").replaceChildren(...KINDS[kind].fields());
  const fitting = examples(kind, info.labels);
  find("examples").replaceChildren(...fitting.map(([name, value]) =>
    make("button", { type: "button", text: name, onclick: () => { write(value); ask(); } })));
  write(fitting[0][1]);
  find("answer").replaceChildren();
}

function write(value) {
  KINDS[kind].write(value);
  changed();
}

function changed() {
  if (kind !== null) showRequest(KINDS[kind].path, body());
}

async function ask() {
  if (kind === null) return;
  const number = ++asked;
  const [of, value, how] = [KINDS[kind], KINDS[kind].read(), options()];
  find("ask").setAttribute("aria-busy", "true");
  try {
    const { answer, headers, took } = await post(of.path, body());
    if (number !== asked) return;
    find("answer").replaceChildren(of.show(answer, value, info, how), timing(headers, took));
  } catch (error) {
    if (number === asked) showError(error);
  } finally {
    if (number === asked) find("ask").removeAttribute("aria-busy");
  }
}

/** What the server says of its time, by the headers of text-embeddings-inference. */
function timing(headers, took) {
  const ms = (name) => headers.get(`x-${name}-time`);
  const said = [`${digits(took)} ms with the way there and back`];
  if (ms("total") !== null) {
    const tokens = headers.get("x-compute-tokens");
    said.unshift(
      `${tokens} ${tokens === "1" ? "token" : "tokens"}`,
      `${ms("total")} ms in the server: tokenising ${ms("tokenization")}, queue ${ms("queue")}, computing ${ms("inference")}`,
    );
  }
  return make("p", { class: "quiet timing" }, ...said.map((part) => make("span", { text: part })));
}

function showError(error) {
  if (!(error instanceof ServerError)) throw error;
  if (error.status === 401) {
    askForKey(error);
    return;
  }
  const again = error.retryAfter ? make("span", { text: ` Try again in ${error.retryAfter} s.` }) : "";
  find("answer").replaceChildren(make("p", { class: "error", text: error.message }, again));
}

function askForKey(error) {
  find("key-said").textContent = error.message;
  find("key-form").hidden = false;
  find("key").focus();
}

find("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  keepKey(find("key").value.trim());
  find("key").value = "";
  find("key-form").hidden = true;
  if (info === null) begin();
  else { changed(); follow(askForKey); ask(); }
});
find("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
find("ask").addEventListener("input", changed);
find("ask").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    find("ask").requestSubmit();
  }
});
listenToCopies();
begin();
