// The kinds of input: their fields, the request that they make, and how its answer is shown.

import { bar, find, make } from "./dom.js";

const ROLES = ["user", "assistant", "system"];

const labelled = (name, id, field) => [make("label", { for: id, text: name }), field];
const area = (id, rows = 3) => make("textarea", { id, rows, required: true, spellcheck: "false" });

function message(role, content) {
  const options = ROLES.map((name) => make("option", { text: name, selected: name === role }));
  const row = make("div", { class: "message" },
    make("select", { "aria-label": "Role" }, ...options),
    make("textarea", { rows: 2, required: true, "aria-label": "Message", spellcheck: "false" }),
    make("button", { type: "button", "aria-label": "Remove this message", text: "×", onclick: () => drop(row) }));
  row.querySelector("textarea").value = content;
  return row;
}

function drop(row) {
  const near = row.nextElementSibling ?? row.previousElementSibling;
  if (near === null) return; // a conversation has a message
  row.remove();
  near.querySelector("textarea").focus();
  find("ask").dispatchEvent(new Event("input"));
}

function addMessage() {
  const last = find("messages").lastElementChild?.querySelector("select").value;
  const row = message(last === "user" ? "assistant" : "user", "");
  find("messages").append(row);
  row.querySelector("textarea").focus();
}

/** A score with its name; one that is a probability has a bar. */
const scored = (name, score, probable) =>
  bar(name, probable ? score.toFixed(4) : score.toPrecision(5), probable ? score : null);

const SENTENCES = {
  path: "predict",
  body: (value, options) => ({ inputs: value, raw_scores: options.raw, truncate: options.truncate }),
  show: (answer, value, info, options) => {
    const probable = !options.raw && info.problem_type !== "regression";
    return make("ol", { class: "bars scores" }, ...answer.map(({ label, score }) => scored(label, score, probable)));
  },
};

export const KINDS = {
  text: {
    ...SENTENCES,
    name: "A text",
    fields: () => labelled("Text", "text", area("text")),
    read: () => find("text").value,
    write: (text) => { find("text").value = text; },
  },

  pair: {
    ...SENTENCES,
    name: "A pair",
    fields: () => [...labelled("First text", "first", area("first", 2)), ...labelled("Second text", "second", area("second", 2))],
    read: () => [find("first").value, find("second").value],
    write: ([first, second]) => { find("first").value = first; find("second").value = second; },
  },

  query: {
    name: "A query and documents",
    path: "rerank",
    fields: () => [
      ...labelled("Query", "query", make("input", { id: "query", required: true, autocomplete: "off" })),
      ...labelled("Documents, one a line", "documents", area("documents", 5)),
    ],
    read: () => ({
      query: find("query").value,
      documents: find("documents").value.split("\n").map((line) => line.trim()).filter(Boolean),
    }),
    write: ({ query, documents }) => { find("query").value = query; find("documents").value = documents.join("\n"); },
    body: ({ query, documents }, options) =>
      ({ query, texts: documents, raw_scores: options.raw, truncate: options.truncate }),
    show: (answer, { documents }, info, options) => {
      const probable = !options.raw && answer.every(({ score }) => score >= 0 && score <= 1);
      const rows = answer.map(({ index, score }) => scored(documents[index], score, probable));
      return make("ol", { class: "bars scores" }, ...rows);
    },
  },

  conversation: {
    ...SENTENCES,
    name: "A conversation",
    fields: () => [
      make("div", { id: "messages", role: "group", "aria-label": "Messages" }),
      make("button", { type: "button", text: "Add a message", onclick: addMessage }),
    ],
    read: () => [...find("messages").children].map((row) =>
      ({ role: row.querySelector("select").value, content: row.querySelector("textarea").value })),
    write: (messages) => find("messages").replaceChildren(...messages.map(({ role, content }) => message(role, content))),
  },

  tokens: {
    name: "A text",
    path: "token_classification",
    fields: () => labelled("Text", "text", area("text", 4)),
    read: () => find("text").value,
    write: (text) => { find("text").value = text; },
    body: (value, options) => ({ inputs: value, parameters: { aggregation_strategy: "simple", truncate: options.truncate } }),
    show: (answer, text) => {
      if (!answer.length) return make("p", { text: "There are no entities in this text." });
      const rows = answer.map(({ word, entity_group: group, score }) => scored(`${word} · ${group}`, score, true));
      return make("div", {}, marked(text, answer), make("ol", { class: "bars scores" }, ...rows));
    },
  },
};

/** The text with its entities marked, where the tokenizer says where they are. */
function marked(text, entities) {
  const letters = Array.from(text); // offsets count code points
  const parts = [];
  let at = 0;
  for (const { start, end, entity_group: group } of entities) {
    if (start === null || start < at) continue;
    parts.push(letters.slice(at, start).join(""));
    parts.push(make("mark", {}, letters.slice(start, end).join(""), make("small", { text: group })));
    at = end;
  }
  return make("p", { class: "marked" }, ...parts, letters.slice(at).join(""));
}
