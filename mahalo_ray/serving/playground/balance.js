// The control of one or more balances: a slider between two objectives, a triangle between three, and a slider for
// every objective where there are more.

import {html, svg, refill} from "./dom.js";
import {described, percentages, withShare} from "./shares.js";

const CORNERS = [[110, 34], [22, 184], [198, 184]]; // of the triangle, in the units of its view box
const HEIGHT = 214;
const RADIUS = 11;

/**
 * Draw into `box` and keep it up to date.
 *
 * names: of the objectives. read(): {balances, selected, letters}. onChange(column, shares, done): `done` is false
 * while a slider is still moving. onSelect(column). key: tells the controls of one page apart.
 */
export class BalanceControl {
  constructor(box, names, key, {read, onChange, onSelect}) {
    Object.assign(this, {box, names, key, read, onChange, onSelect});
    this.draw();
  }

  draw() {
    const parts = this.names.length === 2 ? this.sliders() : [this.tabs(), this.triangle(), ...this.shares()];
    refill(this.box, parts);
    this.update();
  }

  /** Follow the settings without rebuilding what is being dragged. */
  update() {
    const {balances, selected, letters} = this.read();
    if (letters.length !== this.columns) return void this.draw();
    const active = balances[selected];
    for (const node of this.box.querySelectorAll("[data-column]")) {
      const column = Number(node.dataset.column);
      const percent = percentages(balances[column]);
      node.classList.toggle("selected", letters.length > 1 && column === selected);
      if (node.matches(".pair")) {
        const input = node.querySelector("input");
        if (Number(input.value) !== percent[1]) input.value = percent[1];
        input.setAttribute("aria-valuetext", described(this.names, balances[column]));
        node.querySelectorAll(".end b").forEach((end, n) => { end.textContent = percent[n] + "\u00a0%"; });
      } else if (node.matches(".tab")) {
        node.setAttribute("aria-pressed", String(column === selected));
        node.querySelector(".figures").textContent = percent.join(" / ");
      } else if (node.matches(".handle")) {
        const [x, y] = place(balances[column]);
        node.setAttribute("transform", `translate(${x.toFixed(1)} ${y.toFixed(1)})`);
      }
    }
    const percent = percentages(active);
    for (const input of this.box.querySelectorAll("input[data-objective]")) {
      const n = Number(input.dataset.objective);
      if (Number(input.value) !== percent[n]) input.value = percent[n];
      input.setAttribute("aria-valuetext", percent[n] + " %");
      input.nextElementSibling.textContent = percent[n] + "\u00a0%";
    }
  }

  sliders() {
    const {letters} = this.read();
    this.columns = letters.length;
    return letters.map((letter, column) => {
      const name = letters.length > 1 ? "Balance " + letter : "Balance";
      const input = html("input", {
        type: "range", min: 0, max: 100, step: 1, "data-key": this.key + column, class: "blend",
        "aria-label": `${name}, from ${this.names[0]} to ${this.names[1]}`,
        oninput: () => this.move(column, Number(input.value), false),
        onchange: () => this.move(column, Number(input.value), true),
        onfocus: () => this.select(column),
        onpointerdown: () => this.select(column),
      });
      const ends = this.names.map((end, n) => html("span", {class: "end o" + n}, html("span", {}, end), " ", html("b")));
      return html("div", {class: "pair", "data-column": column},
        letters.length > 1 && html("span", {class: "badge", "aria-hidden": "true"}, letter),
        html("div", {class: "blend-box"}, input, html("div", {class: "ends", "aria-hidden": "true"}, ends)));
    });
  }

  move(column, percent, done) {
    this.onChange(column, [1 - percent / 100, percent / 100], done);
  }

  select(column) {
    if (this.read().selected !== column) this.onSelect(column);
  }

  tabs() {
    const {letters} = this.read();
    this.columns = letters.length;
    if (letters.length < 2) return null;
    return html("div", {class: "tabs", role: "group", "aria-label": "Balance to change"}, letters.map((letter, column) =>
      html("button", {
        type: "button", class: "tab", "data-column": column, "data-key": this.key + "tab" + column,
        onclick: () => this.onSelect(column),
      }, html("span", {class: "badge"}, letter), html("span", {class: "figures"}))));
  }

  shares() {
    return this.names.map((name, n) => {
      const id = this.key + "share" + n;
      const input = html("input", {
        type: "range", min: 0, max: 100, step: 1, id, "data-objective": n, class: "o" + n,
        oninput: () => this.moveShare(n, input, false), onchange: () => this.moveShare(n, input, true),
      });
      return html("div", {class: "share"},
        html("label", {for: id}, html("i", {class: "dot o" + n, "aria-hidden": "true"}), name),
        input, html("output", {for: id}));
    });
  }

  moveShare(n, input, done) {
    const {balances, selected} = this.read();
    this.onChange(selected, withShare(balances[selected], n, Number(input.value) / 100), done);
  }

  /** Three objectives: a point in a triangle. The sliders below it do the same for keyboards and screen readers. */
  triangle() {
    if (this.names.length !== 3) return null;
    const {letters} = this.read();
    const anchors = ["middle", "start", "end"];
    const drawing = svg("svg", {viewBox: `0 0 220 ${HEIGHT}`, class: "triangle", "aria-hidden": "true"},
      svg("polygon", {points: CORNERS.map((corner) => corner.join()).join(" "), class: "field"}),
      [0.25, 0.5, 0.75].map((share) => lines(share)),
      CORNERS.map(([x, y], n) => svg("circle", {cx: x, cy: y, r: 4, class: "corner o" + n})),
      CORNERS.map(([x, y], n) => svg("text", {
        x: n === 0 ? x : n === 1 ? 2 : 218, y: n === 0 ? 14 : HEIGHT - 3, "text-anchor": anchors[n], class: "name o" + n,
      }, shortened(this.names[n]))),
      letters.map((letter, column) => svg("g", {class: "handle", "data-column": column},
        svg("circle", {r: RADIUS}), svg("text", {"text-anchor": "middle", dy: "0.36em"}, letter))));
    let dragged = null;
    const at = (event) => {
      const box = drawing.getBoundingClientRect();
      return [((event.clientX - box.left) / box.width) * 220, ((event.clientY - box.top) / box.height) * HEIGHT];
    };
    drawing.addEventListener("pointerdown", (event) => {
      const point = at(event);
      const {balances, selected} = this.read();
      const far = letters.map((_, column) => Math.hypot(...place(balances[column]).map((v, n) => v - point[n])));
      const nearest = far.indexOf(Math.min(...far));
      dragged = far[nearest] < 2 * RADIUS ? nearest : selected;
      this.onSelect(dragged);
      drawing.setPointerCapture(event.pointerId);
      this.onChange(dragged, inside(point), false);
      event.preventDefault();
    });
    drawing.addEventListener("pointermove", (event) => {
      if (dragged !== null) this.onChange(dragged, inside(at(event)), false);
    });
    for (const end of ["pointerup", "pointercancel"]) {
      drawing.addEventListener(end, () => {
        if (dragged !== null) this.onChange(dragged, this.read().balances[dragged], true);
        dragged = null;
      });
    }
    return drawing;
  }
}

const shortened = (name) => (name.length > 16 ? name.slice(0, 15) + "\u2026" : name);

const place = (shares) => [0, 1].map((axis) => shares.reduce((sum, share, n) => sum + share * CORNERS[n][axis], 0));

/** The shares at a point of the drawing; outside the triangle those of a point on its border. */
function inside([x, y]) {
  const [[x0, y0], [x1, y1], [x2, y2]] = CORNERS;
  const area = (y1 - y2) * (x0 - x2) + (x2 - x1) * (y0 - y2);
  const first = ((y1 - y2) * (x - x2) + (x2 - x1) * (y - y2)) / area;
  const second = ((y2 - y0) * (x - x2) + (x0 - x2) * (y - y2)) / area;
  const positive = [first, second, 1 - first - second].map((share) => Math.max(0, share));
  const total = positive.reduce((sum, share) => sum + share, 0);
  const percent = percentages(positive.map((share) => share / total));
  return percent.map((share) => share / 100);
}

/** The three lines on which one objective has this share. */
function lines(share) {
  return [0, 1, 2].map((n) => {
    const ends = [1, 2].map((step) => {
      const shares = [0, 0, 0];
      shares[n] = share;
      shares[(n + step) % 3] = 1 - share;
      return place(shares);
    });
    return svg("line", {x1: ends[0][0], y1: ends[0][1], x2: ends[1][0], y2: ends[1][1], class: "grid"});
  });
}
