// Pictures as SVG: the map, a distribution, an interval. No state is kept here.

import { LAND } from "./land.js";

const NS = "http://www.w3.org/2000/svg";

// Viridis (van der Walt and Smith, 2015) at five places: as good for those who see colours otherwise.
const COLOURS = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];

export function element(name, attributes = {}, text = "") {
  const made = document.createElementNS(NS, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.textContent = text;
  return made;
}

/** The colour at `share`, 0 (near) to 1 (far). */
export function colour(share) {
  const at = Math.min(Math.max(1 - share, 0), 1) * (COLOURS.length - 1);
  const low = Math.min(Math.floor(at), COLOURS.length - 2);
  const mixed = COLOURS[low].map((c, i) => Math.round(c + (at - low) * (COLOURS[low + 1][i] - c)));
  return `rgb(${mixed.join(" ")})`;
}

export function milliseconds(ms) {
  return ms >= 100 ? ms.toFixed(0) : ms >= 10 ? ms.toFixed(1) : ms.toFixed(2);
}

/** A logarithmic scale from [low, high] ms to [left, right]. */
export function logScale(low, high, left, right) {
  const a = Math.log(Math.max(low, 1e-3));
  const span = Math.max(Math.log(Math.max(high, 1e-3)) - a, 1e-6);
  return (ms) => left + ((Math.log(Math.max(ms, 1e-3)) - a) / span) * (right - left);
}

function ticks(low, high, most) {
  const found = [];
  if (high < 2.5 * low) { // a narrow part of the scale: even steps
    const raw = (high - low) / most, ten = 10 ** Math.floor(Math.log10(raw));
    const step = ten * [1, 2, 5, 10].find((n) => n * ten >= raw);
    for (let tick = Math.ceil(low / step) * step; tick <= high; tick += step) found.push(tick);
    return found;
  }
  for (let ten = 10 ** Math.floor(Math.log10(low)); ten <= high; ten *= 10)
    for (const n of [1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9]) if (n * ten >= low && n * ten <= high) found.push(n * ten);
  const step = Math.ceil(found.length / most);
  return found.filter((_, i) => i % step === 0);
}

/**
 * Draws nodes, each { address, label, x, y, share }: share 0 to 1 of the colours, null for unknown.
 * `world` lays degrees on a grid; otherwise x and y are distances.
 */
export function drawMap(svg, nodes, { world, src, dst, at, onChoose }) {
  const width = svg.clientWidth || 560, height = Math.round(width * (world ? 0.5 : 0.7)), edge = 14;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.style.height = `${height}px`;
  const drawn = [], beside = new Map(); // what stands at one place is drawn around it
  let place;
  if (world) {
    place = (n) => [((n.x + 180) / 360) * width, ((90 - n.y) / 180) * height];
    const coasts = LAND.map((ring) => {
      const points = [];
      for (let i = 0; i < ring.length; i += 2) points.push(place({ x: ring[i], y: ring[i + 1] }).map(Math.round).join(" "));
      return `M${points.join("L")}Z`;
    });
    drawn.push(element("path", { class: "land", d: coasts.join("") }));
    for (let degree = -150; degree <= 150; degree += 30) {
      const [x] = place({ x: degree, y: 0 });
      drawn.push(element("line", { class: "grid", x1: x, x2: x, y1: 0, y2: height }));
      if (Math.abs(degree) > 60) continue;
      const [, y] = place({ x: 0, y: degree });
      drawn.push(element("line", { class: "grid", x1: 0, x2: width, y1: y, y2: y }));
      const name = degree ? `${Math.abs(degree)}° ${degree > 0 ? "N" : "S"}` : "equator";
      drawn.push(element("text", { x: 3, y: y - 3 }, name));
    }
  } else {
    const xs = nodes.map((n) => n.x), ys = nodes.map((n) => n.y);
    const [left, right, low, high] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
    const by = Math.min((width - 2 * edge) / (right - left || 1), (height - 2 * edge) / (high - low || 1));
    place = (n) => [width / 2 + (n.x - (left + right) / 2) * by, height / 2 - (n.y - (low + high) / 2) * by];
    const round = 10 ** Math.floor(Math.log10((width / 3) / by)) || 1;
    drawn.push(element("line", { class: "middle", x1: 4, x2: 4 + round * by, y1: height - 4, y2: height - 4 }));
    drawn.push(element("text", { x: 4, y: height - 9 }, `${round} ms`));
  }
  // The chosen ones come last, and so lie on top.
  const rank = (n) => (n.address === src || n.address === dst ? 1 : 0);
  for (const node of [...nodes].sort((a, b) => rank(a) - rank(b))) {
    const key = `${node.x} ${node.y}`, k = world ? (beside.get(key) ?? 0) : 0;
    beside.set(key, k + 1);
    const at0 = place(node), cx = at0[0] + 4.5 * Math.sqrt(k) * Math.cos(2.4 * k), cy = at0[1] + 4.5 * Math.sqrt(k) * Math.sin(2.4 * k);
    const kind = node.address === src ? " source" : node.address === dst ? " chosen" : node.share === null ? " unknown" : "";
    const circle = element("circle", { class: `node${kind}`, cx, cy, r: rank(node) ? 8 : 5.5 });
    if (node.share !== null && node.address !== src) circle.setAttribute("fill", colour(node.share));
    circle.append(element("title", {}, node.label));
    circle.addEventListener("click", (event) => onChoose(node.address, event.shiftKey));
    drawn.push(circle);
    if (node.address === at) drawn.push(element("circle", { class: "here", cx, cy, r: 12 }));
  }
  svg.replaceChildren(...drawn);
  return (node) => place(node);
}

/** The share of a distribution in each of some bins, from its quantiles at 0.01 to 0.99. */
function densities(curve, edges) {
  const below = (ms) => {
    const i = curve.findIndex((quantile) => quantile > ms);
    if (i < 0) return 0.99;
    if (i === 0) return 0.01;
    return 0.01 * (i + (ms - curve[i - 1]) / (curve[i] - curve[i - 1] || 1));
  };
  const at = edges.map(below);
  return at.slice(1).map((share, i) => share - at[i]);
}

/** Draws a distribution; `before` is another one, for comparison, and may be null. */
export function drawPair(svg, answer, before) {
  const width = svg.clientWidth || 560, height = 210, base = 150;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.style.height = `${height}px`;
  const curves = [answer.curve_ms, ...(before ? [before.curve_ms] : [])];
  const points = answer.measured.map((m) => m.rtt_ms).filter((rtt) => rtt !== null && rtt > 0);
  const middle = [curves.map((c) => c[2]), curves.map((c) => c[96])];
  let low = Math.max(Math.min(...middle[0], ...points), 1e-3), high = Math.max(...middle[1], ...points);
  [low, high] = [low / 1.06, Math.max(high * 1.06, low * 1.2)];
  const x = logScale(low, high, 8, width - 8), drawn = [];
  for (const tick of ticks(low, high, width / 60)) {
    drawn.push(element("line", { class: "grid", x1: x(tick), x2: x(tick), y1: 8, y2: base }));
    drawn.push(element("text", { x: x(tick), y: height - 4, "text-anchor": "middle" }, `${+tick.toPrecision(3)}`));
  }
  drawn.push(element("text", { x: width - 4, y: height - 18, "text-anchor": "end" }, "ms"));
  const bins = 70, edges = Array.from({ length: bins + 1 }, (_, i) => low * (high / low) ** (i / bins));
  const found = curves.map((curve) => densities(curve, edges));
  const top = Math.max(...found.flat());
  found.forEach((shares, k) => {
    const y = (share) => base - (share / top) * (base - 14);
    const path = shares.map((s, i) => `L${x(edges[i])} ${y(s)}L${x(edges[i + 1])} ${y(s)}`).join("");
    drawn.push(element("path", { class: k ? "before" : "density", d: `M${x(low)} ${base}${path}L${x(high)} ${base}` }));
  });
  for (const [name, kind] of [["p5", "quantile"], ["p25", "quantile"], ["p50", "middle"], ["p75", "quantile"], ["p95", "quantile"]]) {
    const at = x(answer.rtt_ms[name]);
    drawn.push(element("line", { class: kind, x1: at, x2: at, y1: 12, y2: base }));
  }
  drawn.push(element("text", { class: "strong", x: x(answer.rtt_ms.p50), y: 9, "text-anchor": "middle" }, "median"));
  for (const rtt of points) drawn.push(element("line", { class: "point", x1: x(rtt), x2: x(rtt), y1: base + 5, y2: base + 19 }));
  drawn.push(element("line", { class: "axis", x1: 0, x2: width, y1: base, y2: base }));
  const label = points.length ? `${points.length} measured` : "not measured";
  drawn.push(element("text", { x: 4, y: base + 33 }, label));
  svg.replaceChildren(...drawn);
}

/** An interval: 90 % thin, 50 % thick, the median across. */
export function interval(rtt, low, high) {
  const svg = element("svg", { viewBox: "0 0 144 14", preserveAspectRatio: "none", "aria-hidden": "true" });
  const x = logScale(low, high, 2, 142);
  const line = (kind, from, to) => element("line", { class: kind, x1: x(rtt[from]), x2: Math.max(x(rtt[to]), x(rtt[from]) + 1), y1: 7, y2: 7 });
  const middle = element("line", { class: "middle", x1: x(rtt.p50), x2: x(rtt.p50), y1: 1, y2: 13 });
  svg.append(line("wide", "p5", "p95"), line("narrow", "p25", "p75"), middle);
  return svg;
}

/** What the colours of the map mean. */
export function legend(low, high) {
  const svg = element("svg", { viewBox: "0 0 100 12", preserveAspectRatio: "none", "aria-hidden": "true" });
  for (let i = 0; i < 50; i++) svg.append(element("rect", { x: 2 * i, y: 0, width: 2.1, height: 12, fill: colour(i / 49) }));
  return [`${milliseconds(low)} ms`, svg, `${milliseconds(high)} ms, predicted median from the source`];
}
