// What the group does: a stream of one of the server's groups, once a second.

import { bar, digits, find, make, terms } from "./dom.js";
import { events, send, ServerError } from "./http.js";

const RECENT_S = 10; // what the figures are the mean of
const POLL_S = 2; // where there is no stream
const SMOOTH_S = 5; // and each point of the plot
const WIDTH = 600;
const HEIGHT = 120;

let seconds = new Map(); // number of a second -> [steps, texts, tokens, seconds computed]
let waits = []; // [number of a second, how long each rank has waited for others until then]
let shown = null; // the latest /info
let following = null; // what ends the stream that is read

/** Follow the group from now on, while somebody looks. `onKey` is told when the server asks for a key. */
export function follow(onKey) {
  following?.abort();
  following = null;
  if (!document.hidden) read(onKey);
  document.onvisibilitychange = () => follow(onKey);
}

async function read(onKey) {
  const { signal } = (following = new AbortController());
  let [hear, pause] = [listen, 1];
  while (!signal.aborted) {
    try {
      await hear(signal);
      pause = 1;
      await wait(hear === poll ? POLL_S : 0.2); // the server ends a stream now and then
    } catch (error) {
      if (signal.aborted) return;
      if (error.status === 401) {
        onKey(error);
        return;
      }
      if (error.status === 404 && hear === listen) {
        hear = poll; // something in between passes no streams on
        continue;
      }
      const known = error instanceof ServerError;
      find("connection").textContent = known ? error.message : "The connection was lost: trying again.";
      showState(null);
      await wait((known && error.retryAfter) || pause);
      pause = Math.min(10, pause * 2);
    }
  }
}

const wait = (s) => new Promise((resolve) => setTimeout(resolve, s * 1000));

async function listen(signal) {
  for await (const { name, data } of events("info/stream", signal)) {
    find("connection").textContent = "";
    if (name === "info") showInfo(data);
    else showLoad(data);
  }
}

async function poll(signal) {
  const info = await (await send("info", { signal })).json();
  find("connection").textContent = "";
  if (shown?.group.pid !== info.group.pid || shown.restarts !== info.restarts) showInfo(info);
  showLoad(info.load);
}

function showInfo(info) {
  const { host, pid, groups } = info.group;
  waits = [];
  if (shown?.group.host !== host || shown.group.pid !== pid) seconds = new Map();
  shown = info;
  const one = `of process ${pid} on ${host}`;
  find("whose").textContent =
    groups === 1
      ? `The group ${one} is this server's only one.`
      : `These are the figures of one group, ${one}. This server has ${groups ?? "a changing number of"} groups, and each connection is answered by one of them.`;

  const weights = ({ sharded_bytes, replicated_bytes }) => `${digits((sharded_bytes + replicated_bytes) / 1e6)} MB`;
  find("ranks").replaceChildren(
    make("thead", {}, make("tr", {}, ...["Rank", "Cores", "Threads", "Weights", "Process", "Waiting"].map((text) => make("th", { scope: "col", text })))),
    make("tbody", {}, ...info.ranks.map((rank) => make("tr", {}, ...[
      rank.rank, rank.cores.length ? ranges(rank.cores) : "not pinned", rank.threads, weights(rank), rank.pid, "",
    ].map((text) => make("td", { text }))))),
  );

  const total = info.startup.reduce((sum, { seconds: each }) => sum + each, 0);
  find("phases").replaceChildren(...info.startup.map(({ phase, seconds: each, note }) =>
    bar(phase, `${each.toFixed(2)} s`, total ? each / total : 0, note)));

  find("facts").replaceChildren(...terms([
    ["Architecture", info.architecture],
    ["Dtype", info.model_dtype],
    ["Ranks", `${info.tp_degree}, ${info.layout}`],
    ["Runtime", info.runtime],
    ["Labels", info.labels.length > 12 ? `${info.labels.slice(0, 12).join(", ")}, … (${info.labels.length})` : info.labels.join(", ")],
    ["Longest input", `${info.max_input_length} tokens`],
    ["Off the unsharded model by", info.parity.toExponential(1)],
    ["Version", info.version],
  ]));
}

function showLoad(load) {
  for (const [number, ...values] of load.seconds) seconds.set(number, values);
  for (const number of seconds.keys()) if (number < load.now - load.kept_s) seconds.delete(number);
  showState(load);
  const since = Math.min(RECENT_S, Math.max(1, Math.floor(load.up_s)));
  const [steps, texts, tokens, computed] = summed(load.now - since, load.now);
  find("figures").replaceChildren(...terms([
    ["Texts a second", digits(texts / since)],
    ["Tokens a second", digits(tokens / since)],
    ["Time of a step", steps ? `${digits((computed / steps) * 1000)} ms` : "–"],
    ["Texts a step", steps ? digits(texts / steps) : "–"],
    ["Computing", `${Math.min(100, Math.round((computed / since) * 100))} %`],
    ["Requests under way", String(load.under_way)],
    ["Tokens that wait", load.queued_tokens.toLocaleString("en")],
    ["Restarts", String(load.restarts)],
    ["Up", duration(load.up_s)],
  ]));
  showWaits(load);
  plot(load);
}

/** The share of the last seconds that each rank has waited in collectives. */
function showWaits({ now, waits_s: waited }) {
  waits = [...waits.filter(([number]) => number >= now - RECENT_S), [now, waited]];
  const [then, before] = waits[0];
  const rows = find("ranks").querySelectorAll("tbody tr");
  rows.forEach((row, rank) => {
    const known = waited.length === rows.length && before.length === rows.length && now > then;
    row.lastChild.textContent = known ? `${Math.round(((waited[rank] - before[rank]) / (now - then)) * 100)} %` : "–";
  });
}

const WORDS = { new: "not started", starting: "starting", ready: "ready", failed: "failed, restarting", stopped: "stopped" };

function showState(load) {
  const state = find("state");
  const said = load === null ? "not connected" : (WORDS[load.state] ?? load.state) + (load.error ? `: ${load.error}` : "");
  if (state.textContent !== said) state.textContent = said; // a screen reader reads what changes
  state.dataset.state = load?.state ?? "unknown";
}

/** Sums of the seconds from `first` on and before `end`. */
function summed(first, end) {
  const sums = [0, 0, 0, 0];
  for (let number = first; number < end; number += 1) {
    (seconds.get(number) ?? []).forEach((value, i) => { sums[i] += value; });
  }
  return sums;
}

function plot({ now, kept_s: kept, up_s: up }) {
  const rates = [];
  const shown = Math.max(2, Math.min(kept, Math.floor(up)));
  for (let end = now - shown + 1; end <= now; end += 1) rates.push(summed(end - SMOOTH_S, end)[1] / SMOOTH_S);
  const most = Math.max(...rates);
  const top = most || 1;
  const x = (i) => (WIDTH * (1 - (rates.length - 1 - i) / (kept - 1))).toFixed(1);
  const points = rates.map((rate, i) => `${x(i)},${(HEIGHT - 2 - (rate / top) * (HEIGHT - 8)).toFixed(1)}`);
  const shape = (name, attributes) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    return element;
  };
  find("plot").replaceChildren(
    shape("polygon", { points: `${x(0)},${HEIGHT} ${points.join(" ")} ${WIDTH},${HEIGHT}` }),
    shape("polyline", { points: points.join(" ") }),
  );
  const said = `most: ${digits(most)} a second`;
  find("plot").setAttribute("aria-label", `Texts a second in the last five minutes; ${said}, now ${digits(rates.at(-1))}`);
  find("plot-most").textContent = said;
}

/** Numbers as ranges: 0-3, 8. */
function ranges(cores) {
  const runs = [];
  for (const core of cores) {
    const last = runs.at(-1);
    if (last && core === last[1] + 1) last[1] = core;
    else runs.push([core, core]);
  }
  return runs.map(([first, last]) => (first === last ? `${first}` : `${first}-${last}`)).join(", ");
}

function duration(s) {
  if (s < 60) return `${Math.floor(s)} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${Math.floor(s % 60)} s`;
  return s < 86400 ? `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min` : `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`;
}
