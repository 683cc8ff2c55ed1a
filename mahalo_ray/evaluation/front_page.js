"use strict";
// The pictures of a front: a plane for two objectives, a space turned by hand and a triangle of weights for
// three, parallel coordinates for three and more. `front` is the document of front.json. No request is made.

const names = front.objectives;
const shown = new Set(front.series.map((_, index) => index));
let weights = Object.fromEntries(names.map((name) => [name, 1 / names.length]));
let picked = null; // a point that was chosen by itself, until the weights are moved
let colored = ""; // the objective that colours the points; none: their front's colour
const FACING = { yaw: -0.75 * Math.PI, pitch: -Math.atan(Math.SQRT1_2) };
const turn = { ...FACING };

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// A picture drawn in CSS pixels: `room` is the width it has, so that its text is as large on a phone.
function room(most) {
  return Math.max(280, Math.min(most, document.getElementById("pictures").clientWidth - 28));
}

function picture(width, height, label) {
  const svg = drawn(document.createDocumentFragment(), "svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  svg.style.maxWidth = `${width}px`;
  drawn(svg, "desc", {}, label);
  return svg;
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

const SCALE = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
function shade(share) {
  const at = Math.max(0, Math.min(1, share)) * (SCALE.length - 1), from = Math.min(Math.floor(at), SCALE.length - 2);
  return `rgb(${SCALE[from].map((value, index) => Math.round(value + (at - from) * (SCALE[from + 1][index] - value))).join(",")})`;
}

function colorOf(point) {
  if (!colored) return point.color;
  const reached = points.map((one) => one.mean[colored]), low = Math.min(...reached), high = Math.max(...reached);
  return shade((point.mean[colored] - low) / (high - low || 1));
}

const described = (point) => point.method + "\n" + names.map((name) => `${name} ${point.mean[name].toFixed(3)}`).join("\n");

function pick(point) {
  if (point.weights) setWeights(Object.fromEntries(names.map((name) => [name, point.weights[name] || 0])), point);
}

function nearest() {
  if (picked !== null && shown.has(picked.series)) return picked;
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

function mark(svg, point, x, y, chosen, radius = 5) {
  const color = colorOf(point);
  if (chosen) drawn(svg, "circle", { cx: x, cy: y, r: radius + 6, fill: "none", stroke: "currentColor", "stroke-width": 2 });
  const circle = drawn(svg, "circle", { cx: x, cy: y, r: chosen ? radius + 2 : radius, stroke: color, "stroke-width": 2,
    fill: point.on_front ? color : "var(--surface)", style: point.weights ? "cursor:pointer" : "" });
  drawn(circle, "title", {}, described(point));
  circle.addEventListener("click", () => pick(point));
}

// Two objectives: the plane, with intervals, the band of the front, and a line through its points.
function plane(chosen) {
  const width = room(736), height = Math.max(300, Math.min(480, width * 0.68)), left = 58, bottom = 48;
  const svg = picture(width, height, `Points over ${names.join(" and ")}, with the intervals of both.`);
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
    const across = x(point.mean[first]), up = y(point.mean[second]), bar = { stroke: colorOf(point), opacity: 0.35, "stroke-width": 1.3 };
    drawn(svg, "line", { x1: x(point.low[first]), x2: x(point.high[first]), y1: up, y2: up, ...bar });
    drawn(svg, "line", { x1: across, x2: across, y1: y(point.low[second]), y2: y(point.high[second]), ...bar });
  }
  for (const point of visible()) mark(svg, point, x(point.mean[first]), y(point.mean[second]), point === chosen);
  return svg;
}

// Three objectives: where the weights lie, with steps of a quarter.
function triangle(chosen) {
  const size = room(440), edge = 34, high = (size - 2 * edge) * Math.sqrt(3) / 2;
  const svg = picture(size, high + 2 * edge + 24, `Weights of ${names.join(", ")} in a triangle; a corner is all weight on one objective.`);
  const corners = [[edge, edge + high + 10], [size - edge, edge + high + 10], [size / 2, edge + 10]];
  const place = (share) => [0, 1].map((axis) => corners.reduce((sum, corner, index) => sum + corner[axis] * share[index], 0));
  for (const level of [0, 0.25, 0.5, 0.75]) for (let index = 0; index < 3; index++) {
    const ends = [1, 2].map((step) => [0, 1, 2].map((axis) => axis === index ? level : axis === (index + step) % 3 ? 1 - level : 0));
    const [from, to] = ends.map(place);
    drawn(svg, "line", { x1: from[0], y1: from[1], x2: to[0], y2: to[1], stroke: level ? "var(--line)" : "var(--soft)" });
  }
  const anchors = ["start", "end", "middle"];
  corners.forEach(([x, y], index) => drawn(svg, "text", { x: index === 2 ? x : index ? size - 4 : 4, y: index === 2 ? y - 14 : y + 22, "text-anchor": anchors[index], "font-size": 13, fill: "currentColor" }, `all on ${names[index]}`));
  const weighted = visible().filter((one) => one.weights), share = (point) => names.map((name) => point.weights[name] || 0);
  for (const point of weighted) mark(svg, point, ...place(share(point)), point === chosen);
  return svg;
}

// Three objectives: the points in space, turned by dragging or with the arrow keys. The corner that is best on
// all objectives begins nearest to the eye, so that the front is seen from its good side.
function space(chosen) {
  const size = room(440), middle = size / 2, scale = size * 0.48;
  const svg = picture(size, size, `Points over ${names.join(", ")} in space. Drag, or press the arrow keys, to turn; Home turns back.`);
  svg.setAttribute("tabindex", 0);
  svg.setAttribute("class", "turned");
  const ranges = names.map(range);
  const scaled = (point) => names.map((name, index) => (point.mean[name] - ranges[index][0]) / (ranges[index][1] - ranges[index][0]));
  const project = (at) => {
    const [a, b, c] = at.map((value) => value - 0.5);
    const across = a * Math.cos(turn.yaw) - b * Math.sin(turn.yaw), deep = a * Math.sin(turn.yaw) + b * Math.cos(turn.yaw);
    const up = c * Math.cos(turn.pitch) - deep * Math.sin(turn.pitch), far = c * Math.sin(turn.pitch) + deep * Math.cos(turn.pitch);
    return [middle + across * scale, middle - up * scale, far];
  };
  const outwards = ([x, y], by) => {
    const length = Math.hypot(x - middle, y - middle) || 1;
    return [x + (x - middle) / length * by, y + (y - middle) / length * by];
  };
  const draw = () => {
    svg.replaceChildren(svg.firstChild);
    for (let corner = 0; corner < 8; corner++) for (const bit of [1, 2, 4]) if (!(corner & bit)) {
      const [from, to] = [corner, corner | bit].map((code) => project([code & 1, (code >> 1) & 1, (code >> 2) & 1]));
      drawn(svg, "line", { x1: from[0], y1: from[1], x2: to[0], y2: to[1], stroke: "var(--line)" });
    }
    names.forEach((name, axis) => {
      // The edge of the box that lies farthest out, of two the lower one, carries the numbers.
      const others = [0, 1, 2].filter((other) => other !== axis);
      const edges = [[0, 0], [0, 1], [1, 0], [1, 1]].map((pair) => (value) => {
        const at = [0, 0, 0];
        at[axis] = value; at[others[0]] = pair[0]; at[others[1]] = pair[1];
        return project(at);
      });
      const out = (edge) => { const [x, y] = edge(0.5); return Math.hypot(x - middle, y - middle) + 0.02 * (y - middle); };
      const edge = edges.reduce((best, other) => (out(other) > out(best) ? other : best));
      const [low, high] = ranges[axis], [from, to] = [edge(0), edge(1)];
      drawn(svg, "line", { x1: from[0], y1: from[1], x2: to[0], y2: to[1], stroke: "var(--soft)", "stroke-width": 1.5 });
      for (const value of ticks(low, high, 4)) {
        const [x, y] = outwards(edge((value - low) / (high - low)), 14);
        drawn(svg, "text", { x, y: y + 4, "text-anchor": "middle", "font-size": 11, fill: "var(--soft)" }, value);
      }
      const [x, y] = outwards(edge(0.5), 36), best = edge(1)[0] < edge(0)[0] ? `← ${name}` : `${name} →`;
      const slope = Math.atan2(to[1] - from[1], to[0] - from[0]) * 180 / Math.PI, upright = slope > 90 ? slope - 180 : slope <= -90 ? slope + 180 : slope;
      drawn(svg, "text", { x, y: y + 4, "text-anchor": "middle", "font-size": 13, fill: "currentColor", transform: `rotate(${upright} ${x} ${y})` }, best);
    });
    front.series.forEach((series, index) => {
      if (!shown.has(index)) return;
      for (const corners of series.mesh || []) {
        const at = corners.map((corner) => project(scaled(series.points[corner])));
        drawn(svg, "polygon", { points: at.map((one) => `${one[0]},${one[1]}`).join(" "), fill: series.color, "fill-opacity": 0.07, stroke: series.color, "stroke-opacity": 0.3 });
      }
    });
    const placed = visible().map((point) => ({ point, at: project(scaled(point)) })).sort((one, other) => other.at[2] - one.at[2]);
    for (const { point, at } of placed) mark(svg, point, at[0], at[1], point === chosen, 5 - 1.6 * at[2]);
  };
  const turned = (yaw, pitch) => {
    turn.yaw += yaw;
    turn.pitch = Math.max(-1.55, Math.min(1.55, turn.pitch + pitch));
    draw();
  };
  let held = null;
  svg.addEventListener("pointerdown", (event) => { held = [event.clientX, event.clientY]; });
  svg.addEventListener("pointerup", () => { held = null; });
  svg.addEventListener("pointermove", (event) => {
    if (held === null || event.buttons === 0) return;
    if (!svg.hasPointerCapture(event.pointerId) && Math.hypot(event.clientX - held[0], event.clientY - held[1]) < 4) return; // a click
    if (!svg.hasPointerCapture(event.pointerId)) svg.setPointerCapture(event.pointerId);
    turned((event.clientX - held[0]) / 150, (event.clientY - held[1]) / 150);
    held = [event.clientX, event.clientY];
  });
  svg.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: [-0.1, 0], ArrowRight: [0.1, 0], ArrowUp: [0, -0.1], ArrowDown: [0, 0.1] };
    if (event.key === "Home") Object.assign(turn, FACING);
    else if (!(event.key in moves)) return;
    event.preventDefault();
    turned(...(moves[event.key] || [0, 0]));
  });
  draw();
  return svg;
}

// Any number of objectives: a line per point over one axis per objective.
function parallel(chosen) {
  const width = room(900), height = 380, left = 52;
  const svg = picture(width, height, `A line per point over the axes ${names.join(", ")}.`);
  const x = (index) => left + index * (width - 2 * left) / Math.max(names.length - 1, 1), ranges = names.map(range);
  const y = (index, value) => height - 16 - (value - ranges[index][0]) / (ranges[index][1] - ranges[index][0]) * (height - 56);
  for (const point of [...visible()].sort((one, other) => (one === chosen) - (other === chosen))) {
    const line = drawn(svg, "polyline", { points: names.map((name, index) => `${x(index)},${y(index, point.mean[name])}`).join(" "), fill: "none", stroke: colorOf(point),
      "stroke-width": point === chosen ? 4.5 : 1.8, opacity: point === chosen ? 1 : point.on_front ? 0.6 : 0.25, style: "cursor:pointer" });
    drawn(line, "title", {}, described(point));
    line.addEventListener("click", () => pick(point));
  }
  names.forEach((name, index) => {
    drawn(svg, "line", { x1: x(index), x2: x(index), y1: 40, y2: height - 16, stroke: "var(--soft)" });
    drawn(svg, "text", { x: x(index), y: 22, "text-anchor": "middle", "font-size": 13, fill: "currentColor" }, `${name} ↑`);
    for (const value of ticks(...ranges[index], 4)) drawn(svg, "text", { x: x(index) - 6, y: y(index, value) + 4, "text-anchor": "end", "font-size": 11, fill: "currentColor", class: "over" }, value);
  });
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
  const kinds = names.length === 2 ? [plane] : names.length === 3 ? [space, triangle, parallel] : [parallel];
  place.replaceChildren(...kinds.map((kind) => element("figure", { class: `picture ${kind.name}` }, kind(chosen), element("figcaption", {}, CAPTIONS[kind.name]))));
  showNearest(chosen);
}

const FILLED = "Filled: no point of the same front is better on everything.";
const CAPTIONS = {
  plane: `Means with intervals. ${FILLED} The band holds the front through its points.`,
  space: `Drag, or press the arrow keys, to turn; Home turns back. The mesh joins points whose weights are neighbours. ${FILLED}`,
  triangle: "The weights of every point.",
  parallel: "A line per point, one axis per objective, more is better. Faint: another point of the same front is better on everything.",
};

function setWeights(next, point = null) {
  weights = next;
  picked = point;
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
  if (names.length > 2) {
    const choice = element("select", {}, element("option", { value: "" }, "front"), ...names.map((name) => element("option", { value: name }, name)));
    const reached = (name) => points.map((point) => point.mean[name]);
    const legend = element("span", { class: "soft" });
    choice.addEventListener("change", () => {
      colored = choice.value;
      const stops = SCALE.map((color) => `rgb(${color.join(",")})`).join(",");
      legend.replaceChildren(...(colored ? [Math.min(...reached(colored)).toFixed(3), element("span", { class: "ramp", style: `background:linear-gradient(90deg,${stops})` }), Math.max(...reached(colored)).toFixed(3)] : []));
      render();
    });
    document.getElementById("series").append(element("label", {}, "colour by", choice), legend);
  }
  for (const button of document.querySelectorAll("button[data-point]")) {
    const point = points[Number(button.dataset.point)];
    button.addEventListener("click", () => {
      shown.add(point.series);
      document.querySelectorAll("#series input")[point.series].checked = true;
      pick(point);
      document.getElementById("front").scrollIntoView();
    });
  }
  let width = room(900);
  window.addEventListener("resize", () => { if (room(900) !== width) { width = room(900); render(); } });
}

addControls();
setWeights(weights);
