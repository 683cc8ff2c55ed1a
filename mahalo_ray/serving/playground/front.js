// What the run has measured, as a picture: each point is a way to answer, further right and further up is better.

import {decimals, html, refill, svg} from "./dom.js";
import {described, distance, fromWeights} from "./shares.js";

const WIDTH = 340, HEIGHT = 262, LEFT = 40, RIGHT = 12, TOP = 12, BOTTOM = 40;
const SAME = 0.005; // between balances

/** Round ends and steps of an axis that holds all values. */
function axis(values) {
  const low = Math.min(...values), high = Math.max(...values);
  const raw = (high - low || 1) / 4;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find((times) => times * power >= raw * 0.999);
  const first = Math.floor(low / step) * step, last = Math.ceil(high / step) * step;
  const ticks = Array.from({length: Math.round((last - first) / step) + 1}, (_, n) => first + n * step);
  return {low: first, high: last, ticks, digits: Math.max(0, -Math.floor(Math.log10(step) + 1e-9))};
}

const SHAPES = {
  circle: () => svg("circle", {r: 6.5}),
  diamond: () => svg("path", {d: "M0 -8.5L8.5 0L0 8.5L-8.5 0Z"}),
  square: () => svg("rect", {x: -5.5, y: -5.5, width: 11, height: 11}),
};

const shapeOf = ({weights, guidance}) => (weights === null ? "square" : guidance ? "diamond" : "circle");

/** How a policy answers beside its balance: `weights` null is the model before alignment. */
function manner({weights, guidance, num_candidates: candidates, strength, temperature}) {
  return [
    weights === null && "the model before alignment",
    guidance ? `the best of ${candidates} candidates` : "taken as sampled",
    strength !== undefined && strength !== 1 && `strength ${decimals(strength, 2)}`,
    temperature !== undefined && temperature !== null && `temperature ${decimals(temperature, 2)}`,
  ].filter(Boolean).join(", ");
}

/** The picture. `onPick(point)`; balances(): [{letter, shares, selected}]. */
export class FrontPicture {
  constructor(box, note, names, front, {balances, onPick}) {
    this.points = front.points.map((point) => ({...point, shares: point.weights && fromWeights(names, point.weights)}));
    Object.assign(this, {box, note, names, front, balances, onPick, axes: [0, 1]});
    this.draw();
  }

  value(point, axisNumber) {
    return point.values[this.front.objectives[this.axes[axisNumber]].name];
  }

  draw() {
    const scales = [0, 1].map((n) => axis(this.points.flatMap((point) => {
      const {value, low, high} = this.value(point, n);
      return [value, low ?? value, high ?? value];
    })));
    const x = (value) => LEFT + ((WIDTH - LEFT - RIGHT) * (value - scales[0].low)) / (scales[0].high - scales[0].low);
    const y = (value) => HEIGHT - BOTTOM - ((HEIGHT - TOP - BOTTOM) * (value - scales[1].low)) / (scales[1].high - scales[1].low);
    this.at = (point) => [x(this.value(point, 0).value), y(this.value(point, 1).value)];
    const titles = this.axes.map((n) => this.front.objectives[n].name);
    const colour = (n) => "o" + this.names.indexOf(titles[n]);
    this.letters = svg("g", {"aria-hidden": "true"});
    const swept = this.swept();
    const drawing = svg("svg", {viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "front", role: "radiogroup",
      "aria-label": `Measured ways to answer, by ${titles.join(" and ")}. Choosing one sets the balance.`},
      scales[0].ticks.map((tick) => [svg("line", {x1: x(tick), x2: x(tick), y1: TOP, y2: HEIGHT - BOTTOM, class: "grid"}),
        svg("text", {x: x(tick), y: HEIGHT - BOTTOM + 14, "text-anchor": "middle", class: "tick"}, decimals(tick, scales[0].digits))]),
      scales[1].ticks.map((tick) => [svg("line", {x1: LEFT, x2: WIDTH - RIGHT, y1: y(tick), y2: y(tick), class: "grid"}),
        svg("text", {x: LEFT - 5, y: y(tick) + 4, "text-anchor": "end", class: "tick"}, decimals(tick, scales[1].digits))]),
      svg("text", {x: WIDTH - RIGHT, y: HEIGHT - 8, "text-anchor": "end", class: "name " + colour(0)}, `more ${titles[0]} \u2192`),
      svg("text", {transform: `translate(10 ${TOP}) rotate(-90)`, "text-anchor": "end", class: "name " + colour(1)}, `more ${titles[1]} \u2192`),
      this.names.length === 2 && swept.length > 1 &&
        svg("polyline", {points: swept.map((point) => this.at(point).join()).join(" "), class: "swept"}),
      this.points.map((point) => this.interval(point, x, y)),
      this.points.map((point) => this.mark(point)),
      this.letters);
    drawing.addEventListener("click", (event) => {
      const box = drawing.getBoundingClientRect();
      const place = [((event.clientX - box.left) / box.width) * WIDTH, ((event.clientY - box.top) / box.height) * HEIGHT];
      this.pick(this.nearest(this.points.filter(({shares}) => shares), (point) => distance(this.at(point), place)));
    });
    refill(this.box, this.names.length > 2 && this.axisChoice(), drawing, this.legend());
    this.update();
  }

  /** The points along which letters travel: most of those measured in one manner, by the first objective's share. */
  swept() {
    const manners = {};
    for (const point of this.points.filter(({shares}) => shares)) (manners[manner(point)] ??= []).push(point);
    const largest = Object.values(manners).reduce((most, points) => (points.length > most.length ? points : most), []);
    return largest.sort((a, b) => a.shares[0] - b.shares[0]);
  }

  interval(point, x, y) {
    const [a, b] = [this.value(point, 0), this.value(point, 1)];
    const lines = [];
    if (a.low !== undefined) lines.push([x(a.low), x(a.high), y(b.value), y(b.value)]);
    if (b.low !== undefined) lines.push([x(a.value), x(a.value), y(b.low), y(b.high)]);
    return lines.map(([x1, x2, y1, y2]) => svg("line", {x1, x2, y1, y2, class: "interval"}));
  }

  mark(point) {
    const shape = shapeOf(point);
    const node = svg("g", {
      class: `point ${shape}${point.on_front ? " best" : ""}${point.shares ? "" : " fixed"}`,
      transform: `translate(${this.at(point).map((v) => v.toFixed(1)).join(" ")})`,
      "data-key": "point " + point.label,
    }, svg("title", {}, this.told(point)), SHAPES[shape]());
    const show = () => this.tell(point);
    node.addEventListener("pointerenter", show);
    node.addEventListener("focus", show);
    if (point.shares) {
      node.setAttribute("role", "radio");
      node.setAttribute("aria-label", this.told(point));
      node.addEventListener("keydown", (event) => this.pressed(event, point));
    } else {
      node.setAttribute("role", "img");
      node.setAttribute("aria-label", this.told(point));
    }
    point.node = node;
    return node;
  }

  pressed(event, point) {
    const order = this.points.filter(({shares}) => shares).sort((a, b) => this.at(a)[0] - this.at(b)[0]);
    const step = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1}[event.key];
    if (step) {
      const next = order[(order.indexOf(point) + step + order.length) % order.length];
      this.pick(next);
      next.node.focus();
    } else if (event.key === " " || event.key === "Enter") this.pick(point);
    else return;
    event.preventDefault();
  }

  pick(point) {
    this.onPick(point);
    this.tell(point);
  }

  nearest(points, far) {
    return points.reduce((best, point) => (far(point) < far(best) ? point : best));
  }

  told(point) {
    const values = this.front.objectives.map(({name}) => {
      const {value, low, high} = point.values[name];
      return `${name} ${decimals(value)}` + (low === undefined ? "" : ` (${decimals(low)} to ${decimals(high)})`);
    });
    const balance = point.shares ? `${described(this.names, point.shares)}, ` : "";
    return `${balance}${manner(point)}: reached ${values.join(", ")}`;
  }

  tell(point) {
    this.note.textContent = capital(this.told(point)) + "." + (point.shares ? "" : " It cannot be chosen here.");
  }

  axisChoice() {
    return html("p", {class: "axes"}, ["across", "up"].map((word, n) => {
      const id = "axis" + n;
      const chosen = html("select", {id, onchange: () => {
        const taken = Number(chosen.value);
        if (this.axes[1 - n] === taken) this.axes[1 - n] = this.axes[n];
        this.axes[n] = taken;
        this.draw();
      }}, this.front.objectives.map(({name}, k) => html("option", {value: k, selected: k === this.axes[n]}, name)));
      return html("span", {}, html("label", {for: id}, word), chosen);
    }));
  }

  legend() {
    const shapes = [...new Set(this.points.map(shapeOf))];
    const words = {circle: "taken as sampled", diamond: "best of candidates", square: "before alignment"};
    const entry = (shape, kind, word) => html("span", {},
      svg("svg", {viewBox: "-9 -9 18 18", width: 14, height: 14}, svg("g", {class: `point ${kind} ${shape}`}, SHAPES[shape]())), word);
    const beaten = this.points.find((point) => !point.on_front);
    return html("p", {class: "legend", "aria-hidden": "true"}, shapes.map((shape) => entry(shape, "best", words[shape])),
      beaten && entry(shapeOf(beaten), "", "hollow: another of its kind is better at every goal"));
  }

  /** Where a balance lies: on a line between measured points of two objectives, else at the nearest one. */
  place(shares) {
    const swept = this.swept();
    if (!swept.length) return null;
    if (this.names.length > 2) return this.at(this.nearest(swept, (point) => distance(point.shares, shares)));
    const after = swept.findIndex((point) => point.shares[0] >= shares[0]);
    if (after <= 0) return this.at(after === 0 ? swept[0] : swept.at(-1));
    const [before, next] = [swept[after - 1], swept[after]];
    const part = (shares[0] - before.shares[0]) / (next.shares[0] - before.shares[0]);
    const [from, to] = [this.at(before), this.at(next)];
    return from.map((value, n) => value + part * (to[n] - value));
  }

  /** Follow the balances. */
  update() {
    const balances = this.balances();
    const active = balances.find(({selected}) => selected) ?? balances[0];
    const known = this.points.filter(({shares}) => shares);
    const checked = active && known.find((point) => distance(point.shares, active.shares) < SAME);
    for (const point of known) {
      point.node.setAttribute("aria-checked", String(point === checked));
      point.node.setAttribute("tabindex", point === (checked ?? known[0]) ? "0" : "-1");
    }
    this.letters.replaceChildren(...balances.map(({letter, shares, selected}) => {
      const place = this.place(shares);
      if (!place) return "";
      return svg("g", {class: "handle" + (selected && balances.length > 1 ? " selected" : ""), transform: `translate(${place.map((v) => v.toFixed(1)).join(" ")})`},
        svg("circle", {r: 9}), svg("text", {"text-anchor": "middle", dy: "0.36em"}, balances.length > 1 ? letter : "\u25cf"));
    }));
  }
}

const capital = (text) => text[0].toUpperCase() + text.slice(1);

/** What the portfolio has for a balance: the choice of GET /v1/portfolio?weights=... and the member it names. */
export function portfolioNote(names, letter, portfolio, onUse) {
  const [choice] = portfolio.choices;
  const member = portfolio.members.find(({model}) => model === choice.member);
  const whose = letter ? `For balance ${letter}` : "For your balance";
  const balance = member.objectives ? described(names, fromWeights(names, member.objectives)) + ", " : "";
  const certified = choice.loss_bound === null
    ? "Nothing is certified here: your balance lies outside those that were tried."
    : choice.loss_bound < 0.0005 ? "Certified: weighted your way, none is worth more."
      : `Certified: weighted your way, none is worth more than ${decimals(choice.loss_bound)} on top of its ` +
        `${decimals(choice.worth)}.`;
  return [
    html("p", {}, `${whose} the portfolio has ${balance}${manner({...member, weights: member.objectives})}. ${certified}`),
    member.objectives && html("button", {type: "button", class: "plain small", "data-key": "use-member", onclick: () => onUse(member)},
      "Use this member"),
    html("details", {}, html("summary", {"data-key": "portfolio-what"}, "What the portfolio is"),
      html("p", {}, `A handful of ${portfolio.best}, chosen such that one of them is nearly the best whatever you care about. ` +
        "The certified loss is a proven bound, computed from the measurements: it holds as long as each policy that was found " +
        `is the best one for its own weighting. Its unit: ${portfolio.unit}.`)),
  ];
}
