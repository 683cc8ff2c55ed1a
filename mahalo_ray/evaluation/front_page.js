"use strict";
// The pictures of a front: a plane for two objectives, a space turned by hand and a triangle of weights for
// three, parallel coordinates for three and more. `front` is the document of front.json. No request is made.

const names = front.objectives;
const shown = new Set(front.series.map((_, index) => index));
let weights = Object.fromEntries(names.map((name) => [name, 1 / names.length]));
const turn = { yaw: -0.7, pitch: 0.45 };

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function drawn(parent, tag, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
}

const points = front.series.flatMap((series, index) =>
  series.points.map((point) => ({ ...point, color: series.color, series: index })));
const visible = () => points.filter((point) => shown.has(point.series));

function nearest() {
  const distance = (point) => names.reduce((sum, name) => sum + Math.abs((point.weights[name] || 0) - weights[name]), 0);
  const weighted = visible().filter((point) => point.weights);
  return weighted.reduce((best, point) => (best === null || distance(point) < distance(best) ? point : best), null);
}

function range(name) {
  const low = Math.min(...points.map((point) => point.low[name]));
  const high = Math.max(...points.map((point) => point.high[name]));
  const room = (high - low || 1) * 0.06;
  return [low - room, high + room];
}

function ticks(low, high, count = 5) {
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= raw);
  const values = [];
  for (let value = Math.ceil(low / step) * step; value <= high + 1e-12; value += step) values.push(value);
  return values.map((value) => Number(value.toFixed(10)));
}

function mark(svg, point, x, y, chosen) {
  const circle = drawn(svg, "circle", { cx: x, cy: y, r: chosen ? 8 : 5, stroke: point.color, "stroke-width": chosen ? 4 : 2,
    fill: point.on_front ? point.color : "var(--surface)", style: "cursor:pointer" });
  drawn(circle, "title", {}, point.method + "\n" + names.map((name) => `${name} ${point.mean[name].toFixed(3)}`).join("\n"));
  circle.addEventListener("click", () => {
    if (point.weights) setWeights(Object.fromEntries(names.map((name) => [name, point.weights[name] || 0])));
  });
}

// Two objectives: the plane, with intervals, the band of the front, and a line through its points.
function plane(chosen) {
  const width = 640, height = 440, left = 64, bottom = 48, svg = drawn(document.createDocumentFragment(), "svg", { viewBox: `0 0 ${width} ${height}` });
  const [first, second] = names, [x0, x1] = range(first), [y0, y1] = range(second);
  const x = (value) => left + (value - x0) / (x1 - x0) * (width - left - 12);
  const y = (value) => height - bottom - (value - y0) / (y1 - y0) * (height - bottom - 12);
  for (const value of ticks(x0, x1)) {
    drawn(svg, "line", { x1: x(value), x2: x(value), y1: 12, y2: height - bottom, stroke: "var(--line)" });
    drawn(svg, "text", { x: x(value), y: height - bottom + 18, "text-anchor": "middle", "font-size": 12, fill: "currentColor" }, value);
  }
  for (const value of ticks(y0, y1)) {
    drawn(svg, "line", { x1: left, x2: width - 12, y1: y(value), y2: y(value), stroke: "var(--line)" });
    drawn(svg, "text", { x: left - 8, y: y(value) + 4, "text-anchor": "end", "font-size": 12, fill: "currentColor" }, value);
  }
  drawn(svg, "text", { x: (width + left) / 2, y: height - 8, "text-anchor": "middle", "font-size": 13, fill: "currentColor" }, `${first} (better →)`);
  drawn(svg, "text", { x: 16, y: (height - bottom) / 2, "text-anchor": "middle", "font-size": 13, fill: "currentColor",
    transform: `rotate(-90 16 ${(height - bottom) / 2})` }, `${second} (better →)`);
  front.series.forEach((series, index) => {
    if (!shown.has(index)) return;
    if (series.band) {
      const upper = series.band.map((row) => `${x(row[0])},${y(row[2])}`), lower = series.band.map((row) => `${x(row[0])},${y(row[1])}`).reverse();
      drawn(svg, "polygon", { points: [...upper, ...lower].join(" "), fill: series.color, opacity: 0.14 });
    }
    if (!series.is_line) return;
    const line = series.points.filter((point) => point.on_front).map((point) => [point.mean[first], point.mean[second]]).sort((a, b) => a[0] - b[0]);
    drawn(svg, "polyline", { points: line.map((at) => `${x(at[0])},${y(at[1])}`).join(" "), fill: "none", stroke: series.color, "stroke-width": 2, opacity: 0.6 });
  });
  for (const point of visible()) {
    const across = x(point.mean[first]), up = y(point.mean[second]), bar = { stroke: point.color, opacity: 0.35, "stroke-width": 1.3 };
    drawn(svg, "line", { x1: x(point.low[first]), x2: x(point.high[first]), y1: up, y2: up, ...bar });
    drawn(svg, "line", { x1: across, x2: across, y1: y(point.low[second]), y2: y(point.high[second]), ...bar });
  }
  for (const point of visible()) mark(svg, point, x(point.mean[first]), y(point.mean[second]), point === chosen);
  return svg;
}

// Three objectives: where the weights lie, coloured by what was reached.
function triangle(chosen) {
  const size = 420, top = 40, svg = drawn(document.createDocumentFragment(), "svg", { viewBox: `0 0 ${size} ${size}` });
  const corners = [[30, size - 50], [size - 30, size - 50], [size / 2, top]];
  drawn(svg, "polygon", { points: corners.map((at) => at.join(",")).join(" "), fill: "none", stroke: "var(--soft)" });
  const anchors = ["start", "end", "middle"];
  corners.forEach(([x, y], index) => drawn(svg, "text", { x, y: index === 2 ? y - 12 : y + 22, "text-anchor": anchors[index], "font-size": 13, fill: "currentColor" }, `all on ${names[index]}`));
  for (const point of visible().filter((one) => one.weights)) {
    const share = names.map((name) => point.weights[name] || 0);
    const x = corners.reduce((sum, corner, index) => sum + corner[0] * share[index], 0);
    const y = corners.reduce((sum, corner, index) => sum + corner[1] * share[index], 0);
    // Red, green and blue say how near the point is to the best that was reached on each objective.
    const level = names.map((name) => { const [low, high] = range(name); return Math.round(40 + 200 * (point.mean[name] - low) / (high - low)); });
    mark(svg, { ...point, color: `rgb(${level.join(",")})` }, x, y, point === chosen);
  }
  return svg;
}

// Three objectives: the points in space, turned by dragging.
function space(chosen) {
  const canvas = element("canvas", { width: 760, height: 760, title: "drag to turn" });
  const draw = () => {
    const pen = canvas.getContext("2d"), style = getComputedStyle(document.documentElement), middle = canvas.width / 2, scale = canvas.width * 0.36;
    pen.clearRect(0, 0, canvas.width, canvas.height);
    const project = (at) => {
      const [a, b, c] = at.map((value) => value - 0.5);
      const across = a * Math.cos(turn.yaw) - b * Math.sin(turn.yaw), deep = a * Math.sin(turn.yaw) + b * Math.cos(turn.yaw);
      const up = c * Math.cos(turn.pitch) - deep * Math.sin(turn.pitch), near = c * Math.sin(turn.pitch) + deep * Math.cos(turn.pitch);
      return [middle + across * scale * 1.3, middle - up * scale * 1.3, near];
    };
    const ranges = names.map(range), scaled = (point) => names.map((name, index) => (point.mean[name] - ranges[index][0]) / (ranges[index][1] - ranges[index][0]));
    pen.strokeStyle = style.getPropertyValue("--line");
    pen.lineWidth = 2;
    for (let corner = 0; corner < 8; corner++) for (const bit of [1, 2, 4]) if (!(corner & bit)) {
      const [from, to] = [corner, corner | bit].map((code) => project([code & 1, (code >> 1) & 1, (code >> 2) & 1]));
      pen.beginPath(); pen.moveTo(from[0], from[1]); pen.lineTo(to[0], to[1]); pen.stroke();
    }
    pen.fillStyle = style.getPropertyValue("--ink");
    pen.font = "22px system-ui";
    pen.textAlign = "center";
    names.forEach((name, index) => { const at = project([0, 1, 2].map((axis) => (axis === index ? 1.12 : 0))); pen.fillText(`${name} →`, at[0], at[1]); });
    const placed = visible().map((point) => ({ point, at: project(scaled(point)) })).sort((a, b) => b.at[2] - a.at[2]);
    for (const { point, at } of placed) {
      pen.beginPath(); pen.arc(at[0], at[1], point.method === chosen?.method ? 15 : 9, 0, 2 * Math.PI);
      pen.fillStyle = point.on_front ? point.color : style.getPropertyValue("--surface");
      pen.strokeStyle = point.color;
      pen.lineWidth = 4;
      pen.fill(); pen.stroke();
    }
  };
  let held = null;
  canvas.addEventListener("pointerdown", (event) => { held = [event.clientX, event.clientY]; canvas.setPointerCapture(event.pointerId); });
  canvas.addEventListener("pointerup", () => { held = null; });
  canvas.addEventListener("pointermove", (event) => {
    if (held === null) return;
    turn.yaw += (event.clientX - held[0]) / 150;
    turn.pitch = Math.max(-1.5, Math.min(1.5, turn.pitch + (event.clientY - held[1]) / 150));
    held = [event.clientX, event.clientY];
    draw();
  });
  draw();
  return canvas;
}

// Any number of objectives: a line per point over one axis per objective.
function parallel(chosen) {
  const width = 760, height = 400, left = 60, svg = drawn(document.createDocumentFragment(), "svg", { viewBox: `0 0 ${width} ${height}` });
  const x = (index) => left + index * (width - 2 * left) / Math.max(names.length - 1, 1), ranges = names.map(range);
  const y = (index, value) => height - 40 - (value - ranges[index][0]) / (ranges[index][1] - ranges[index][0]) * (height - 80);
  names.forEach((name, index) => {
    drawn(svg, "line", { x1: x(index), x2: x(index), y1: 40, y2: height - 40, stroke: "var(--soft)" });
    drawn(svg, "text", { x: x(index), y: 22, "text-anchor": "middle", "font-size": 13, fill: "currentColor" }, name);
    for (const value of ticks(...ranges[index], 4)) drawn(svg, "text", { x: x(index) - 6, y: y(index, value) + 4, "text-anchor": "end", "font-size": 11, fill: "currentColor" }, value);
  });
  for (const point of visible()) {
    const line = drawn(svg, "polyline", { points: names.map((name, index) => `${x(index)},${y(index, point.mean[name])}`).join(" "), fill: "none", stroke: point.color,
      "stroke-width": point === chosen ? 5 : 1.8, opacity: point === chosen ? 1 : point.on_front ? 0.7 : 0.25, style: "cursor:pointer" });
    drawn(line, "title", {}, point.method);
    line.addEventListener("click", () => { if (point.weights) setWeights(Object.fromEntries(names.map((name) => [name, point.weights[name] || 0]))); });
  }
  return svg;
}

function showNearest(chosen) {
  const place = document.getElementById("nearest");
  place.replaceChildren();
  if (chosen === null) { place.append(element("p", {}, "No point with weights is shown.")); return; }
  const figures = names.map((name) => `${name} ${chosen.mean[name].toFixed(3)} [${chosen.low[name].toFixed(3)}, ${chosen.high[name].toFixed(3)}]`).join(", ");
  place.append(element("p", {}, element("b", {}, chosen.method), ` is the nearest of the points shown: ${figures}.`));
  for (const sample of chosen.samples) {
    const turns = element("div", { class: "turns" });
    for (const said of sample.turns) turns.append(element("div", { class: `turn ${said.speaker}` }, element("span", { class: "who" }, said.speaker), said.content));
    const outcome = Object.entries(sample.outcome).map(([name, value]) => `${name} ${value.toFixed(2)}`).join(", ");
    const details = element("details", {}, element("summary", {}, `A dialogue: ${sample.topic} `, element("span", { class: "soft" }, outcome)), turns);
    details.open = sample === chosen.samples[0];
    place.append(details);
  }
}

function render() {
  const chosen = nearest(), place = document.getElementById("pictures");
  const pictures = names.length === 2 ? [plane(chosen)] : names.length === 3 ? [space(chosen), triangle(chosen), parallel(chosen)] : [parallel(chosen)];
  place.replaceChildren(...pictures.map((picture) => element("figure", { class: "picture" }, picture)));
  showNearest(chosen);
}

function setWeights(next) {
  weights = next;
  for (const slider of document.querySelectorAll("#weights input")) {
    slider.value = weights[slider.name];
    slider.nextElementSibling.textContent = weights[slider.name].toFixed(2);
  }
  render();
}

function addControls() {
  front.series.forEach((series, index) => {
    const box = element("input", { type: "checkbox" });
    box.checked = true;
    box.addEventListener("change", () => { if (box.checked) shown.add(index); else shown.delete(index); render(); });
    document.getElementById("series").append(element("label", {}, box, element("span", { class: "swatch", style: `background:${series.color}` }), series.name));
  });
  for (const name of names) {
    const slider = element("input", { type: "range", min: 0, max: 1, step: 0.01, name, "aria-label": `weight of ${name}` });
    slider.addEventListener("input", () => {
      // The others keep their proportions and share what is left.
      const value = Number(slider.value), rest = names.filter((other) => other !== name), before = rest.reduce((sum, other) => sum + weights[other], 0);
      const next = { [name]: value };
      for (const other of rest) next[other] = (1 - value) * (before > 1e-9 ? weights[other] / before : 1 / rest.length);
      setWeights(Object.fromEntries(names.map((key) => [key, next[key]])));
    });
    document.getElementById("weights").append(element("label", {}, name, slider, element("output", {}, "")));
  }
}

addControls();
setWeights(weights);
