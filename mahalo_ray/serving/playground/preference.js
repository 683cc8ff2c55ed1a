// A balance learned from which of two answers a person prefers.
//
// The person is taken to prefer the first answer with probability sigmoid(u): a logistic (Bradley-Terry) model in
// which u is linear in the unknown balance w. Where answers have scores, u = SHARPNESS * w . d, with d the
// difference of their scores in usual spreads. Without a reward model the person is taken to like an answer less
// the further its balance lies from w. All balances are equally likely at first; every choice reweighs them by
// Bayes' rule, and what is shown is their mean and the middle 80 % of them.

import {html, svg} from "./dom.js";
import {described, distance, percentages} from "./shares.js";

const SHARPNESS = 1.5; // a whole spread on the only goal that counts is preferred 82 times in 100
const PULL = 4; // without scores: the same for a balance's squared distance
const LEAST_SPREAD = 1e-3;
const LEAST_GAP = 0.3; // between the balances of a pair: closer ones lead to the same words too often

/** All balances that are told apart: a grid for two and three objectives, random ones for more. */
function candidatesFor(count) {
  if (count === 2) return Array.from({length: 101}, (_, n) => [1 - n / 100, n / 100]);
  if (count === 3) {
    const grid = [];
    for (let a = 0; a <= 20; a++) for (let b = 0; a + b <= 20; b++) grid.push([a / 20, b / 20, (20 - a - b) / 20]);
    return grid;
  }
  let state = 1;
  const uniform = () => (state = (state * 48271) % 2147483647) / 2147483647;
  return Array.from({length: 3000}, () => {
    const draws = Array.from({length: count}, () => -Math.log(uniform()));
    const total = draws.reduce((sum, draw) => sum + draw, 0);
    return draws.map((draw) => draw / total);
  });
}

/** How much scores of one step usually differ, per objective, over the candidates that the page has seen. */
export function usualSpreads(names, turns) {
  const sums = Object.fromEntries(names.map((name) => [name, [0, 0]]));
  for (const step of turns.flatMap((turn) => turn.answers).flatMap(({report}) => report?.steps ?? [])) {
    const scored = step.candidates.filter(({scores}) => scores);
    if (scored.length < 2) continue;
    for (const name of Object.keys(scored[0].scores)) {
      const values = scored.map(({scores}) => scores[name]);
      const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
      sums[name][0] += values.reduce((sum, value) => sum + (value - mean) ** 2, 0) / (values.length - 1);
      sums[name][1] += 1;
    }
  }
  return names.map((name) => (sums[name][1] ? Math.max(LEAST_SPREAD, Math.sqrt(sums[name][0] / sums[name][1])) : 1));
}

/** What a choice says: u = linear . w + offset. `kept`: 1 the first was preferred, -1 the second, 0 neither. */
export function choiceOf(names, first, second, kept, spreads) {
  if (first.scores && second.scores) {
    const linear = names.map((name, n) =>
      SHARPNESS * (((first.scores[name] ?? 0) - (second.scores[name] ?? 0)) / spreads[n]));
    return {linear, offset: 0, kept};
  }
  const [a, b] = [first.shares, second.shares];
  const square = (shares) => shares.reduce((sum, share) => sum + share * share, 0);
  return {linear: a.map((share, n) => 2 * PULL * (share - b[n])), offset: PULL * (square(b) - square(a)), kept};
}

/** log of the logistic function, exact for large |u| */
const logistic = (u) => (u > 0 ? -Math.log1p(Math.exp(-u)) : u - Math.log1p(Math.exp(u)));

/** The belief after some choices: {points, mass, mean, low, high}, the last three per objective. */
export function belief(names, choices) {
  const points = candidatesFor(names.length);
  const logs = points.map((point) => choices.reduce((sum, {linear, offset, kept}) => {
    const u = linear.reduce((dot, slope, n) => dot + slope * point[n], offset);
    // Neither: half a choice each way.
    return sum + (kept === 0 ? (logistic(u) + logistic(-u)) / 2 : logistic(kept * u));
  }, 0));
  const top = Math.max(...logs);
  const raw = logs.map((value) => Math.exp(value - top));
  const total = raw.reduce((sum, value) => sum + value, 0);
  const mass = raw.map((value) => value / total);
  const mean = names.map((_, n) => points.reduce((sum, point, k) => sum + mass[k] * point[n], 0));
  const bounds = [0.1, 0.9].map((level) => names.map((_, n) => quantile(points.map((point) => point[n]), mass, level)));
  return {points, mass, mean, low: bounds[0], high: bounds[1]};
}

function quantile(values, mass, level) {
  const order = values.map((_, n) => n).sort((a, b) => values[a] - values[b]);
  let sum = 0;
  for (const n of order) {
    sum += mass[n];
    if (sum >= level) return values[n];
  }
  return values[order.at(-1)];
}

/** Two balances worth comparing next: likely ones that lie far apart. `random`: numbers in [0, 1). */
export function nextPair(names, choices, random = Math.random) {
  const {points, mass, mean, low, high} = belief(names, choices);
  let pair;
  if (names.length === 2) {
    const half = Math.max(LEAST_GAP, high[0] - low[0]) / 2;
    const centre = Math.min(1 - half, Math.max(half, mean[0]));
    pair = [centre + half, centre - half].map((share) => [share, 1 - share]);
  } else {
    const draw = () => {
      let left = random();
      return points[mass.findIndex((share) => (left -= share) < 0)] ?? points.at(-1);
    };
    const pairs = Array.from({length: 40}, () => [draw(), draw()]);
    pair = pairs.reduce((best, each) => (distance(...each) > distance(...best) ? each : best));
  }
  return random() < 0.5 ? pair : pair.reverse();
}

const percent = (share) => Math.round(100 * share) + "\u00a0%";

/** "accuracy 61 % (likely 47 % to 78 %)" */
export function summary(names, choices) {
  const {mean, low, high} = belief(names, choices);
  const rounded = percentages(mean);
  return names.map((name, n) => `${name} ${rounded[n]}\u00a0% (likely ${percent(low[n])} to ${percent(high[n])})`).join(", ");
}

/** How likely every balance of two objectives is, as columns between the two names. */
function picture(names, choices) {
  if (names.length !== 2) return null;
  const {mass, mean} = belief(names, choices);
  const bins = Array.from({length: 25}, (_, bin) => mass.slice(bin * 4, bin * 4 + 4 + (bin === 24)).reduce((a, b) => a + b, 0));
  const top = Math.max(...bins);
  return html("figure", {class: "belief"},
    svg("svg", {viewBox: "0 0 250 52", role: "img", "aria-label": "How likely each balance is: most likely near " + described(names, mean)},
      bins.map((value, bin) => svg("rect", {x: bin * 10 + 1, y: 50 - 46 * (value / top), width: 8, height: 46 * (value / top) + 2, rx: 1.5})),
      svg("line", {x1: 250 * mean[1], x2: 250 * mean[1], y1: 0, y2: 52})),
    html("figcaption", {}, html("span", {class: "o0"}, "all " + names[0]), html("span", {class: "o1"}, "all " + names[1])));
}

/** What is shown after a choice. actions: another(), adopt(shares), forget(). */
export function learnedNote(names, choices, turn, actions) {
  const {preferred} = turn;
  const said = preferred === "none"
    ? "Noted: no difference to you."
    : `You preferred the answer made with ${described(names, turn.answers[preferred].shares)}.`;
  const number = choices.length === 1 ? "1 choice" : choices.length + " choices";
  return [
    html("p", {}, said + ` After ${number}, what suits you is about ${summary(names, choices)}.`),
    picture(names, choices),
    html("div", {class: "row-buttons"},
      html("button", {type: "button", "data-key": turn.id + "another", onclick: actions.another}, "Another pair"),
      html("button", {type: "button", class: "plain", "data-key": turn.id + "adopt", onclick: () => actions.adopt(belief(names, choices).mean)},
        "Use this balance"),
      html("button", {type: "button", class: "plain", "data-key": turn.id + "forget", onclick: actions.forget}, "Forget my choices")),
    html("details", {}, html("summary", {}, "How this is learned"),
      html("p", {}, "At first every balance is equally likely. Each of your choices makes those balances likelier at which " +
        "the answer you preferred has the better scores, and the others less likely; how much depends on how far the " +
        "two answers\u2019 scores lie apart, measured in their usual spread. The columns show how likely each balance is now, the " +
        "line their mean. \u2018Likely\u2019 is the middle 80\u00a0%. The next pair is made where your choices leave most doubt.")),
  ];
}
