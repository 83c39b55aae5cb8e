// The page: what is chosen stands in the link; every change asks anew and draws.

import { drawMap, drawPair, interval, legend, logScale, milliseconds } from "./charts.js";

const $ = (id) => document.getElementById(id);
const LONGEST_LINK = 4000; // characters of pings that a link carries
let known = { nodes: [], map_done: true }, ranked = [], place = null, at = null;
let shown = { answer: null, before: null }, turn = 0;

const state = { src: "", dst: "", ms: "50", pings: "" };

async function ask(path, asked) {
  const answer = await fetch(path, asked && {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(asked),
  });
  const content = await answer.json().catch(() => ({ detail: answer.statusText }));
  if (answer.ok) return content;
  const detail = Array.isArray(content.detail)
    ? content.detail.map((each) => `${each.loc.slice(1).join(".")}: ${each.msg}`).join("; ")
    : content.detail;
  throw new Error(detail || `the server answered ${answer.status}`);
}

/** The measurements in pasted text; throws with the line that is none. */
export function parsePings(text) {
  return text.split("\n").map((line) => line.trim()).flatMap((line, i) => {
    if (!line || line.startsWith("#")) return [];
    const [src, dst, rtt, ...rest] = line.split(/[\s,;]+/);
    const rtt_ms = Number(rtt?.replace(/ms$/, ""));
    if (rest.length > 1 || rtt === undefined || rtt === "" || !Number.isFinite(rtt_ms))
      throw new Error(`your pings, line ${i + 1}: give source, destination and RTT in ms`);
    return [{ src, dst, rtt_ms: rtt_ms < 0 ? -1 : rtt_ms }];
  });
}

// --- what is chosen ------------------------------------------------------------------------------

function readLink() {
  const link = new URLSearchParams(location.hash.slice(1));
  for (const key of Object.keys(state)) if (link.has(key)) state[key] = link.get(key);
}

function choose(change) {
  Object.assign(state, change);
  const kept = Object.entries(state).filter(([key, value]) => value && (key !== "pings" || value.length <= LONGEST_LINK));
  history.replaceState(null, "", `#${new URLSearchParams(kept)}`);
  refresh();
}

async function refresh() {
  const mine = ++turn, late = () => mine !== turn;
  for (const key of ["src", "dst", "ms", "pings"]) if ($(key) !== document.activeElement) $(key).value = state[key];
  $("problem").textContent = "";
  document.body.setAttribute("aria-busy", "true");
  try {
    const pings = parsePings(state.pings);
    const { src, dst } = state;
    let pair = null, before = null;
    if (src && dst) {
      const asked = { pairs: [{ src, dst }], curve: true };
      if (pings.length) {
        pair = (await ask("predict", { ...asked, history: pings })).answers[0];
        // Without them nothing may be known at all, and then nothing stands beside.
        before = known.nodes.length ? (await ask("predict", asked)).answers[0] : null;
      } else pair = (await ask("predict", asked)).answers[0];
    }
    if (late()) return;
    if (pair) pair.measured.push(...pings.filter((each) => [src, dst].includes(each.src) && [src, dst].includes(each.dst)));
    showPair(pair, before, pings);
    const all = { src, history: pings, ms: Number(state.ms) || 50, probability: 0 };
    const found = src ? (await ask("within", all)).within : [];
    if (late()) return;
    ranked = found.sort((a, b) => a.rtt_ms.p50 - b.rtt_ms.p50);
    showRank();
    showMap();
  } catch (error) {
    if (late()) return;
    $("problem").textContent = error.message;
    ranked = [];
    showPair(null, null, []);
    showRank();
    showMap();
  } finally {
    if (!late()) document.body.removeAttribute("aria-busy");
  }
}

// --- what is shown -------------------------------------------------------------------------------

const nameOf = (address) => {
  const name = known.nodes.find((node) => node.address === address)?.name;
  return name ? `${name} (${address})` : address;
};

function medians() {
  const low = Math.min(...ranked.map((each) => each.rtt_ms.p50)), high = Math.max(...ranked.map((each) => each.rtt_ms.p50));
  return [low, Math.max(high, low * 1.01)];
}

const counted = (pings) => (pings.length === 1 ? "1 measurement counts" : `${pings.length} measurements count`);

function placed() {
  const world = known.nodes.some((node) => node.latitude !== null);
  const scale = ranked.length ? logScale(...medians(), 0, 1) : null;
  const median = new Map(ranked.map((each) => [each.dst, each.rtt_ms.p50]));
  const nodes = known.nodes.flatMap((node) => {
    const [x, y] = world ? [node.longitude, node.latitude] : [node.x, node.y];
    if (x === null) return [];
    const ms = median.get(node.address);
    const label = `${nameOf(node.address)}${ms === undefined ? "" : `: ${milliseconds(ms)} ms`}`;
    return [{ address: node.address, label, x, y, share: ms === undefined ? null : scale(ms) }];
  });
  return { world, nodes };
}

function showMap() {
  const { world, nodes } = placed();
  const absent = known.nodes.length - nodes.length;
  $("map-note").textContent = !known.nodes.length
    ? "No node is known: paste pings to begin with."
    : !known.map_done && !world
      ? "The map is being made…"
      : (world ? "By their places." : "As far apart as their predicted RTTs, as well as two dimensions allow.") +
        (absent ? ` ${absent} more nodes are not on it.` : "");
  place = nodes.length ? drawMap($("map"), nodes, { world, src: state.src, dst: state.dst, at, onChoose }) : null;
  $("map").toggleAttribute("hidden", !nodes.length);
  $("legend").replaceChildren(...(ranked.length ? legend(...medians()) : []));
}

function onChoose(address, asSource) {
  at = address;
  choose(asSource || !state.src ? { src: address } : { dst: address });
}

function showPair(answer, before, pings) {
  shown = { answer, before };
  $("pair").toggleAttribute("hidden", !answer);
  if (!answer) {
    $("pair-note").textContent = "Choose a source and a destination.";
    $("quantiles").replaceChildren();
    $("pings-note").textContent = pings.length ? `${counted(pings)}.` : "";
    return;
  }
  const { rtt_ms: rtt, p_failed: failed } = answer;
  const unseen = answer.unseen.map((end) => state[end]);
  $("pair-note").textContent =
    `${nameOf(answer.src)} to ${nameOf(answer.dst)}: ${milliseconds(rtt.p50)} ms, with 90 % between ` +
    `${milliseconds(rtt.p5)} and ${milliseconds(rtt.p95)} ms; fails ${(100 * failed).toFixed(1)} %; ` +
    `drawn from ${answer.history} measurement${answer.history === 1 ? "" : "s"}.` + (unseen.length ? ` Nothing is known of ${unseen.join(", ")}.` : "");
  drawPair($("pair"), answer, before);
  const names = ["p5", "p25", "p50", "p75", "p95", "mode", "mean"];
  const rows = [["", ...names.map((name) => name.replace(/^p(\d+)/, "$1 %"))], ["ms", ...names.map((name) => milliseconds(rtt[name]))]];
  if (before) rows.push(["without your pings", ...names.map((name) => milliseconds(before.rtt_ms[name]))]);
  fill($("quantiles"), rows);
  const width = (each) => `${milliseconds(each.rtt_ms.p5)} to ${milliseconds(each.rtt_ms.p95)} ms`;
  const compared = before ? `: 90 % between ${width(answer)}, without them ${width(before)} (dashed).` : ".";
  $("pings-note").textContent = pings.length ? `${counted(pings)}${compared}` : "";
}

function cell(kind, content, type = "") {
  const made = document.createElement(kind);
  if (type) made.className = type;
  made.append(content);
  return made;
}

function fill(table, rows) {
  table.replaceChildren(...rows.map((row, i) => {
    const line = document.createElement("tr");
    line.append(...row.map((each, j) => {
      const made = cell(i && j ? "td" : "th", each, j ? "number" : "");
      if (!i || !j) made.scope = i ? "row" : "col";
      return made;
    }));
    return line;
  }));
}

function showRank() {
  const limit = Number(state.ms) || 50;
  if (!ranked.length) {
    $("rank-note").textContent = state.src ? "" : "Choose a source.";
    $("rank").replaceChildren();
    return;
  }
  const likely = ranked.filter((each) => each.probability >= 0.5).length;
  $("rank-note").textContent = `${likely} of ${ranked.length} nodes answer ${nameOf(state.src)} within ${limit} ms more likely than not.`;
  const low = Math.min(...ranked.map((each) => each.rtt_ms.p5)), high = Math.max(...ranked.map((each) => each.rtt_ms.p95));
  const head = document.createElement("tr");
  head.append(...["Destination", "Median, ms", "50 % and 90 %", `≤ ${limit} ms`].map((text, i) => {
    const made = cell("th", text, i % 2 ? "number" : "");
    made.scope = "col";
    return made;
  }));
  $("rank").replaceChildren(head, ...ranked.map((each) => {
    const line = document.createElement("tr");
    if (each.probability < 0.5) line.className = "far";
    const button = cell("button", nameOf(each.dst));
    button.type = "button";
    button.addEventListener("click", () => choose({ dst: each.dst }));
    const bar = cell("td", interval(each.rtt_ms, low, high));
    bar.title = `50 %: ${milliseconds(each.rtt_ms.p25)} to ${milliseconds(each.rtt_ms.p75)} ms, 90 %: ${milliseconds(each.rtt_ms.p5)} to ${milliseconds(each.rtt_ms.p95)} ms`;
    line.append(cell("td", button), cell("td", milliseconds(each.rtt_ms.p50), "number"), bar, cell("td", `${(100 * each.probability).toFixed(0)} %`, "number"));
    return line;
  }));
}

// --- keys, the map in time, the start ------------------------------------------------------------

/** Moves to the nearest node in the direction of an arrow key. */
function move(dx, dy) {
  const { nodes } = placed();
  const here = nodes.find((node) => node.address === (at ?? state.dst)) ?? nodes[0];
  if (!here || !place) return;
  const [x, y] = place(here);
  let best = null, least = Infinity;
  for (const node of nodes) {
    const [u, v] = place(node), along = (u - x) * dx + (v - y) * dy, aside = Math.abs((u - x) * dy) + Math.abs((v - y) * dx);
    if (node !== here && along > 0 && along + 2 * aside < least) [best, least] = [node, along + 2 * aside];
  }
  at = (best ?? here).address;
  $("spoken").textContent = (best ?? here).label;
  showMap();
}

$("map").addEventListener("keydown", (event) => {
  const arrows = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  if (arrows[event.key]) move(...arrows[event.key]);
  else if (event.key === "Enter" && at) onChoose(at, event.shiftKey);
  else return;
  event.preventDefault();
});
$("choice").addEventListener("submit", (event) => event.preventDefault());
for (const key of ["src", "dst", "ms"]) $(key).addEventListener("change", () => choose({ [key]: $(key).value.trim() }));
$("swap").addEventListener("click", () => choose({ src: state.dst, dst: state.src }));
$("use").addEventListener("click", () => choose({ pings: $("pings").value }));
$("forget").addEventListener("click", () => { $("pings").value = ""; choose({ pings: "" }); });
addEventListener("hashchange", () => { readLink(); refresh(); });
addEventListener("resize", () => { showMap(); if (shown.answer) drawPair($("pair"), shown.answer, shown.before); });

async function readNodes() {
  known = await ask("nodes");
  $("known").replaceChildren(...known.nodes.map((node) => {
    const option = document.createElement("option");
    option.value = node.address;
    option.label = node.name ?? "";
    return option;
  }));
}

async function start() {
  try {
    await readNodes();
    const health = await ask("health");
    $("about").textContent = `${health.model === "run" ? "Your run" : "The model in the box"}; it knows ` +
      `${health.nodes.toLocaleString()} nodes and ${health.measurements.toLocaleString()} measurements.`;
    readLink();
    if (!state.src && known.nodes.length) state.src = known.nodes[0].address;
    refresh();
    while (!known.map_done) {
      await new Promise((done) => setTimeout(done, 1500));
      await readNodes();
      if (known.map_done) showMap();
    }
  } catch (error) {
    $("problem").textContent = error.message;
  }
}

start();
