// The request as somebody would write it: for a shell, and in Python.

import { find } from "./dom.js";
import { key, url } from "./http.js";

const inShell = (text) => `'${text.replaceAll("'", "'\\''")}'`;

function inPython(value) {
  if (Array.isArray(value)) return `[${value.map(inPython).join(", ")}]`;
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value === "object") {
    return `{${Object.entries(value).map(([name, each]) => `${inPython(name)}: ${inPython(each)}`).join(", ")}}`;
  }
  return JSON.stringify(value); // a string of JSON is one of Python
}

/** Without what is null: it is the same without. */
export function brief(body) {
  const kept = Object.entries(body).filter(([, value]) => value !== null);
  return Object.fromEntries(kept.map(([name, value]) => [name, name === "parameters" ? brief(value) : value]));
}

/** Show both. The key itself is not shown: it comes from a variable. */
export function showRequest(path, body) {
  find("curl").textContent = [
    `curl ${url(path)}`,
    "-H 'content-type: application/json'",
    ...(key() ? ['-H "authorization: Bearer $TPRAY_API_KEY"'] : []),
    `-d ${inShell(JSON.stringify(body))}`,
  ].join(" \\\n  ");
  const authorized = key() ? ', headers={"authorization": "Bearer " + os.environ["TPRAY_API_KEY"]}' : "";
  find("python").textContent = [
    ...(key() ? ["import os", ""] : []),
    "import requests",
    "",
    `answer = requests.post(${inPython(url(path))}, json=${inPython(body)}${authorized})`,
    "print(answer.json())",
  ].join("\n");
}

async function copy(text, element) {
  if (navigator.clipboard) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch {
      // Not allowed: below is the older way.
    }
  }
  getSelection().selectAllChildren(element);
  return document.execCommand("copy");
}

export function listenToCopies() {
  for (const button of document.querySelectorAll("[data-copies]")) {
    button.addEventListener("click", async () => {
      const element = find(button.dataset.copies);
      const copied = await copy(element.textContent, element);
      find("copied").textContent = copied ? "Copied." : "This browser does not let pages copy: it is selected now.";
    });
  }
}
