"use strict";
// Draws the curves of the runs in #data. Legend: x is a place on the axis (tokens or steps), px a place on the screen.

const runs = JSON.parse(document.getElementById("data").textContent);
const CHARTS = [
  { id: "loss", title: "Training loss", unit: "nats per token", series: "loss", log: false, canLog: true },
  { id: "validation", title: "Validation", unit: "bits per byte", checks: "bits_per_byte" },
  { id: "grad_norm", title: "Gradient norm", unit: "before clipping", series: "grad_norm", log: true, canLog: true },
  { id: "learning_rate", title: "Learning rate", unit: "", series: "learning_rate", exact: true },
  { id: "tokens_per_s", title: "Throughput", unit: "tokens per second", series: "tokens_per_s", zero: true },
  { id: "mfu", title: "Model FLOPs utilisation", unit: "of the dense bf16 peak", series: "mfu", zero: true, percent: true },
];
const MARGIN = { left: 52, right: 12, top: 10, bottom: 24 };
const HEIGHT = 240;
const state = { axis: "tokens", smoothing: 0.6, hidden: new Set(), zoom: null, hover: null };

const svg = (tag, attributes = {}, parent = null) => {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (parent) parent.append(element);
  return element;
};
const html = (tag, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};
const visible = () => runs.filter((run, index) => !state.hidden.has(index));
const isNumber = (value) => value !== null && value !== undefined && Number.isFinite(value);

// ---- numbers ----

function short(value) {
  const size = Math.abs(value);
  if (size === 0) return "0";
  for (const [unit, letter] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]])
    if (size >= unit) return trimmed((value / unit).toPrecision(4)) + letter;
  if (size < 1e-3) return value.toExponential(Number.isInteger(value / 10 ** Math.floor(Math.log10(size))) ? 0 : 1);
  return trimmed(value.toPrecision(4));
}
const trimmed = (text) => (text.includes(".") && !text.includes("e") ? text.replace(/\.?0+$/, "") : text);

function exact(chart, value) {
  if (!isNumber(value)) return "no number";
  if (chart.percent) return (100 * value).toPrecision(3) + "%";
  if (chart.series === "learning_rate") return value.toExponential(3);
  return value >= 1000 ? Math.round(value).toLocaleString("en") : value.toFixed(4);
}

function linearTicks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 2.5, 5, 10].find((factor) => factor * power >= rough * 0.999);
  const ticks = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9; n++) ticks.push(n * step);
  return ticks;
}

function logTicks(low, high) {
  const found = (factors) => {
    const ticks = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
      for (const factor of factors) {
        const value = factor * 10 ** power;
        if (value >= low * 0.999 && value <= high * 1.001) ticks.push(value);
      }
    return ticks;
  };
  const decades = found([1]);
  if (decades.length >= 3) return decades;
  const some = found([1, 2, 5]);
  return some.length >= 2 ? some : linearTicks(low, high, 4).filter((value) => value > 0);
}

// ---- what is drawn ----

// An exponential moving average whose weight does not depend on gaps; the first values are not pulled towards zero.
function smooth(values, weight) {
  let sum = 0, total = 0;
  return values.map((value) => {
    if (!isNumber(value)) return null;
    sum = weight * sum + (1 - weight) * value;
    total = weight * total + (1 - weight);
    return sum / total;
  });
}

function lines(chart, run) {
  if (chart.checks) {
    const checks = run.validation;
    return { x: checks[state.axis], y: checks[chart.checks], raw: null, low: null, high: null, dots: true };
  }
  const mean = run.mean[chart.series];
  const smoothed = !chart.exact && state.smoothing > 0;
  return {
    x: run[state.axis],
    y: smoothed ? smooth(mean, state.smoothing) : mean,
    raw: smoothed && !run.thinned ? mean : null,
    low: run.thinned && !chart.exact ? run.low[chart.series] : null,
    high: run.thinned && !chart.exact ? run.high[chart.series] : null,
    dots: mean.length < 3,
  };
}

function fullRange() {
  let low = Infinity, high = -Infinity;
  for (const run of visible()) {
    const x = run[state.axis];
    low = Math.min(low, x[0]);
    high = Math.max(high, x[x.length - 1]);
  }
  if (low > high) return [0, 1];
  return low === high ? [low - 0.5, high + 0.5] : [low, high];
}

function valueRange(chart, drawn, [from, to]) {
  let low = Infinity, high = -Infinity;
  const take = (value) => {
    if (isNumber(value) && (!chart.log || value > 0)) {
      low = Math.min(low, value);
      high = Math.max(high, value);
    }
  };
  for (const line of drawn) {
    line.x.forEach((x, index) => {
      if (x < from || x > to) return;
      take(line.y[index]);
      if (line.raw) take(line.raw[index]);
      if (line.low) take(line.low[index]), take(line.high[index]);
    });
  }
  if (chart.checks) for (const run of visible()) for (const value of [run.zlib, run.xz]) take(value);
  if (low > high) return null;
  if (chart.zero) low = Math.min(0, low);
  if (chart.log) return low === high ? [low / 2, high * 2] : [low / 1.05, high * 1.05];
  const room = (high - low) * 0.05 || Math.abs(high) * 0.1 || 1;
  return [chart.zero && low === 0 ? 0 : low - room, high + room];
}

function path(xs, ys, toX, toY, log) {
  let text = "", pen = false;
  for (let index = 0; index < xs.length; index++) {
    const value = ys[index];
    if (!isNumber(value) || (log && value <= 0)) {
      pen = false;
      continue;
    }
    text += (pen ? "L" : "M") + toX(xs[index]).toFixed(1) + "," + toY(value).toFixed(1);
    pen = true;
  }
  return text;
}

function bandPath(line, toX, toY, log) {
  const up = [], down = [];
  line.x.forEach((x, index) => {
    const low = line.low[index], high = line.high[index];
    if (!isNumber(low) || (log && low <= 0)) return;
    up.push(toX(x).toFixed(1) + "," + toY(high).toFixed(1));
    down.push(toX(x).toFixed(1) + "," + toY(low).toFixed(1));
  });
  return up.length ? "M" + up.join("L") + "L" + down.reverse().join("L") + "Z" : "";
}

function draw(chart) {
  const width = chart.figure.clientWidth - 26;
  const root = chart.svg;
  root.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
  root.replaceChildren();
  const range = state.zoom || fullRange();
  const drawn = visible().map((run) => ({ run, ...lines(chart, run) }));
  const values = valueRange(chart, drawn, range);
  const right = width - MARGIN.right, bottom = HEIGHT - MARGIN.bottom;
  chart.toX = (x) => MARGIN.left + ((x - range[0]) / (range[1] - range[0])) * (right - MARGIN.left);
  chart.fromX = (px) => range[0] + ((px - MARGIN.left) / (right - MARGIN.left)) * (range[1] - range[0]);
  chart.drawn = drawn;
  if (!values) {
    svg("text", { x: width / 2, y: HEIGHT / 2, "text-anchor": "middle", class: "none" }, root).textContent = "nothing to show yet";
    return;
  }
  const scale = chart.log ? Math.log : (value) => value;
  const toY = (value) => bottom - ((scale(value) - scale(values[0])) / (scale(values[1]) - scale(values[0]))) * (bottom - MARGIN.top);
  chart.toY = toY;
  axes(chart, root, range, values, right, bottom, toY);
  const clip = `clip-${chart.id}`;
  const area = svg("clipPath", { id: clip }, svg("defs", {}, root));
  svg("rect", { x: MARGIN.left - 4, y: MARGIN.top - 4, width: Math.max(0, right - MARGIN.left + 8), height: bottom - MARGIN.top + 8 }, area);
  const plot = svg("g", { "clip-path": `url(#${clip})` }, root);
  if (!chart.checks) markEvents(chart, plot, range, bottom);
  for (const line of drawn) {
    const colour = line.run.colour;
    if (line.low) svg("path", { class: "band", fill: colour, d: bandPath(line, chart.toX, toY, chart.log) }, plot);
    if (line.raw) svg("path", { class: "raw", stroke: colour, d: path(line.x, line.raw, chart.toX, toY, chart.log) }, plot);
    svg("path", { class: "curve", stroke: colour, d: path(line.x, line.y, chart.toX, toY, chart.log) }, plot);
    if (line.dots)
      line.x.forEach((x, index) => {
        if (isNumber(line.y[index])) svg("circle", { cx: chart.toX(x), cy: toY(line.y[index]), r: 3, fill: colour }, plot);
      });
  }
  if (chart.checks) yardsticks(plot, toY, right);
  chart.cross = svg("line", { class: "cross", y1: MARGIN.top, y2: bottom, visibility: "hidden" }, root);
  chart.select = svg("rect", { class: "zoom", y: MARGIN.top, height: bottom - MARGIN.top, visibility: "hidden" }, root);
}

function axes(chart, root, range, values, right, bottom, toY) {
  for (const tick of chart.log ? logTicks(...values) : linearTicks(...values, 5)) {
    svg("line", { class: "grid", x1: MARGIN.left, x2: right, y1: toY(tick), y2: toY(tick) }, root);
    const label = svg("text", { x: MARGIN.left - 7, y: toY(tick) + 4, "text-anchor": "end" }, root);
    label.textContent = chart.percent ? short(100 * tick) + "%" : short(tick);
  }
  const places = Math.max(2, Math.floor((right - MARGIN.left) / 75));
  for (const tick of linearTicks(...range, places)) {
    if (state.axis === "steps" && !Number.isInteger(tick)) continue;
    const place = chart.toX(tick);
    svg("line", { class: "grid", x1: place, x2: place, y1: bottom, y2: bottom + 4 }, root);
    const edge = place > right - 14 ? "end" : place < MARGIN.left + 10 ? "start" : "middle";
    svg("text", { x: place, y: bottom + 17, "text-anchor": edge }, root).textContent = short(tick);
  }
}

function markEvents(chart, plot, [from, to], bottom) {
  for (const run of visible())
    for (const mark of run.marks) {
      const x = placeOf(run, mark.step);
      if (x < from || x > to) continue;
      const line = svg("line", { class: "mark", x1: chart.toX(x), x2: chart.toX(x), y1: MARGIN.top, y2: bottom }, plot);
      svg("title", {}, line).textContent = `${run.name}: ${mark.label} at step ${mark.step}`;
    }
}

// The place of a step on the axis, between the points that are kept.
function placeOf(run, step) {
  if (state.axis === "steps") return step;
  const index = nearest(run.steps, step);
  return run.tokens[index] + ((step - run.steps[index]) * run.tokens[index]) / Math.max(1, run.steps[index]);
}

function yardsticks(plot, toY, right) {
  const seen = new Set();
  for (const run of visible())
    for (const [name, value] of [["zlib -9", run.zlib], ["xz -9", run.xz]]) {
      const key = name + (isNumber(value) ? value.toFixed(4) : "");
      if (!isNumber(value) || seen.has(key)) continue;
      seen.add(key);
      svg("line", { class: "yardstick", x1: MARGIN.left, x2: right, y1: toY(value), y2: toY(value) }, plot);
      svg("text", { x: right - 4, y: toY(value) - 5, "text-anchor": "end" }, plot).textContent = `${name} ${value.toFixed(3)}`;
    }
}

// ---- pointer ----

function nearest(sorted, x) {
  let low = 0, high = sorted.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (sorted[middle] <= x) low = middle;
    else high = middle;
  }
  return Math.abs(sorted[low] - x) <= Math.abs(sorted[high] - x) ? low : high;
}

function hover(chart, x) {
  for (const other of CHARTS) {
    if (!other.cross) continue;
    other.cross.setAttribute("visibility", x === null ? "hidden" : "visible");
    if (x !== null) for (const end of ["x1", "x2"]) other.cross.setAttribute(end, other.toX(x));
    if (other !== chart || x === null) other.tip.hidden = true;
  }
  if (x === null || !chart.cross) return;
  const rows = chart.drawn.filter((line) => line.x.length).map((line) => {
    const index = nearest(line.x, x);
    const dot = html("i");
    dot.style.background = line.run.colour;
    const value = line.raw ? line.raw[index] : chart.checks ? line.y[index] : line.run.mean[chart.series][index];
    const low = line.low ? line.low[index] : null, high = line.high ? line.high[index] : null;
    const spread = isNumber(low) && low !== high ? ` (${exact(chart, low)} to ${exact(chart, high)})` : "";
    const step = chart.checks ? line.run.validation.steps[index] : line.run.steps[index];
    const tokens = chart.checks ? line.run.validation.tokens[index] : line.run.tokens[index];
    const name = runs.length > 1 ? `${line.run.name}: ` : "";
    return html("div", {}, dot, name, html("strong", { textContent: exact(chart, value) }), spread,
      html("em", { textContent: `  step ${step.toLocaleString("en")}, ${short(tokens)} tokens` }));
  });
  chart.tip.replaceChildren(...rows);
  chart.tip.hidden = rows.length === 0;
  const place = chart.toX(x) + 12, room = chart.figure.clientWidth;
  chart.tip.style.left = place + chart.tip.offsetWidth + 24 > room ? `${Math.max(6, place - chart.tip.offsetWidth - 10)}px` : `${place + 14}px`;
}

function listen(chart) {
  let from = null;
  const place = (event) => {
    const box = chart.svg.getBoundingClientRect();
    const [low, high] = state.zoom || fullRange();
    return Math.min(high, Math.max(low, chart.fromX(event.clientX - box.left)));
  };
  chart.svg.addEventListener("pointermove", (event) => {
    if (!chart.cross) return;
    const x = place(event);
    if (from !== null) {
      const [a, b] = [chart.toX(from), chart.toX(x)].sort((p, q) => p - q);
      chart.select.setAttribute("x", a);
      chart.select.setAttribute("width", b - a);
      chart.select.setAttribute("visibility", "visible");
    }
    hover(chart, x);
  });
  chart.svg.addEventListener("pointerleave", () => from === null && hover(chart, null));
  chart.svg.addEventListener("pointerdown", (event) => {
    if (!chart.cross || event.button !== 0) return;
    from = place(event);
    chart.svg.setPointerCapture(event.pointerId);
  });
  chart.svg.addEventListener("pointerup", (event) => {
    if (from === null) return;
    const [a, b] = [from, place(event)].sort((p, q) => p - q);
    from = null;
    if (chart.toX(b) - chart.toX(a) > 6) zoomTo([a, b]);
    else chart.select.setAttribute("visibility", "hidden");
  });
  chart.svg.addEventListener("dblclick", () => zoomTo(null));
}

function zoomTo(range) {
  state.zoom = range;
  document.getElementById("whole").hidden = range === null;
  drawAll();
}

// ---- page ----

function drawAll() {
  for (const chart of CHARTS) draw(chart);
  hover(null, null);
}

function build() {
  const place = document.getElementById("charts");
  for (const chart of CHARTS) {
    const caption = html("figcaption", {}, chart.title, html("small", { textContent: chart.unit }));
    if (chart.canLog) {
      const box = html("input", { type: "checkbox", checked: chart.log });
      box.addEventListener("change", () => ((chart.log = box.checked), draw(chart)));
      caption.append(html("label", {}, box, "log"));
    }
    chart.svg = svg("svg", { role: "img", "aria-label": chart.title, preserveAspectRatio: "none" });
    chart.tip = html("div", { className: "tip", hidden: true });
    chart.figure = html("figure", { id: chart.id }, caption, chart.svg, chart.tip);
    place.append(chart.figure);
    listen(chart);
  }
  const toggles = document.getElementById("toggles");
  if (runs.length > 1)
    runs.forEach((run, index) => {
      const button = html("button", { type: "button" }, html("i"), run.name);
      button.style.setProperty("--run", run.colour);
      button.setAttribute("aria-pressed", "true");
      button.addEventListener("click", () => {
        if (!state.hidden.delete(index)) state.hidden.add(index);
        button.setAttribute("aria-pressed", String(!state.hidden.has(index)));
        drawAll();
      });
      toggles.append(button);
    });
  for (const radio of document.querySelectorAll("input[name=axis]"))
    radio.addEventListener("change", () => ((state.axis = radio.value), zoomTo(null)));
  const slider = document.getElementById("smoothing");
  slider.addEventListener("input", () => {
    state.smoothing = Number(slider.value);
    document.getElementById("smoothed").textContent = state.smoothing.toFixed(2);
    drawAll();
  });
  document.getElementById("whole").addEventListener("click", () => zoomTo(null));
  window.addEventListener("resize", drawAll);
  drawAll();
}

build();
