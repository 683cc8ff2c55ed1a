// What the page is set to: reading, checking and keeping it, links that carry it, and the requests it leads to.

import {distance, fromWeights, normalised, only, toWeights} from "./shares.js";

export const LETTERS = ["A", "B", "C"];
export const MODES = ["compare", "one", "prefer"];

/** Names of strategies, for people. */
export const STRATEGIES = {
  argmax: "the best of each step",
  best_of_n: "the best whole answer",
  sample: "by chance, better ones more often",
  none: "none: the first thing sampled",
};

/** How scores become a total, for people. */
export const AGGREGATIONS = {
  sum: "the weighted sum",
  soft_min: "mostly the goal that fares worst",
  thresholds: "first enough of one goal, then the sum",
};

/** A model of GET /v1/models with what the page asks about it again and again. */
export function servedModel(entry) {
  const names = [...new Set([...entry.objectives, ...entry.guidance_objectives])];
  const described = Object.fromEntries((entry.descriptions ?? []).map((about) => [about.name, about.description]));
  return {
    id: entry.id, names, described, heads: entry.objectives, scored: entry.guidance_objectives,
    limits: entry.limits, defaults: entry.defaults, examples: entry.examples ?? [],
    students: entry.students ?? [], merged: entry.merged_weights ?? [],
  };
}

export function defaultSettings(model) {
  const {names, defaults} = model;
  const usual = fromWeights(names, Object.values(defaults.objectives ?? {}).length ? defaults.objectives : defaults.guidance);
  const ends = names.length === 2 ? [[0.9, 0.1], [0.1, 0.9]] : [only(names.length, 0), only(names.length, 1)];
  return {
    mode: names.length > 1 ? "compare" : "one", columns: 2, selected: 0, follow: 0,
    balances: [...(names.length > 1 ? ends : [usual, usual]), usual], usual,
    live: false, apart: false, guidance: fromWeights(names, defaults.guidance ?? {}),
    candidates: String(defaults.num_candidates), strategy: model.scored.length ? "argmax" : "none", seed: "1",
    strength: model.heads.length && model.limits.max_strength > 1 ? "1" : null,
    aggregation: "sum", softness: "1", floor: "0", floored: model.scored[0] ?? names[0],
  };
}

/** How many balances the page shows now. */
export const columnsOf = (settings) => (settings.mode === "compare" ? settings.columns : 1);

/** What is wrong with the text of a seed, or null. */
export function seedProblem(text) {
  if (text === "") return null;
  if (!/^\d+$/.test(text)) return "A seed is a whole number from 0 on: only digits.";
  if (BigInt(text) > BigInt(Number.MAX_SAFE_INTEGER)) {
    return "Browsers cannot send numbers above 9,007,199,254,740,991 exactly: choose a smaller seed.";
  }
  return null;
}

export function candidatesProblem(text, limit) {
  if (!/^\d+$/.test(text) || Number(text) < 1) return "Give the number of candidates, from 1 on.";
  return Number(text) > limit ? `This server samples at most ${limit} candidates.` : null;
}

/** The seed to use now: one at random for an empty field. */
export const drawSeed = (text) => (text === "" ? crypto.getRandomValues(new Uint32Array(1))[0] : Number(text));

/** A model on a completion server writes at a few balances only: the nearest of them. */
function nearestMerged(model, shares) {
  const far = model.merged.map((weights) => distance(fromWeights(model.names, weights), shares));
  return model.merged[far.indexOf(Math.min(...far))];
}

/** The body of a request for an answer at this balance. */
export function requestBody(model, settings, shares, messages, seed) {
  const body = {model: model.id, messages, seed};
  if (model.heads.length) {
    body.objectives = model.merged.length ? nearestMerged(model, shares) : toWeights(model.names, shares, model.heads);
    if (settings.strength !== null) body.strength = Number(settings.strength);
  }
  if (!model.scored.length || settings.strategy === "none") return {...body, strategy: "none"};
  body.guidance = toWeights(model.names, settings.apart ? settings.guidance : shares, model.scored);
  body.num_candidates = Number(settings.candidates);
  if (settings.strategy !== "argmax") body.strategy = settings.strategy;
  if (settings.aggregation === "soft_min") body.aggregation = {kind: "soft_min", temperature: Number(settings.softness)};
  if (settings.aggregation === "thresholds") {
    body.aggregation = {kind: "thresholds", thresholds: [{objective: settings.floored, at_least: Number(settings.floor)}]};
  }
  return body;
}

// -- what outlives a reload: this tab only, and never the API key

const storeOf = (model) => "mahalo playground, " + model.id; // every model has a conversation of its own

export function save(state) {
  const {model, settings, turns, choices, draft, lesson} = state;
  const write = (kept) => sessionStorage.setItem(storeOf(model), JSON.stringify(kept));
  const kept = {model: model.id, names: model.names, settings, turns, choices, draft, lesson};
  try {
    write(kept);
  } catch {
    // The tab's storage is full (or forbidden): candidates are what takes space, so texts alone are tried.
    const bare = turns.map((turn) => ({...turn, answers: turn.answers.map((answer) => ({...answer, report: null}))}));
    try {
      write({...kept, turns: bare});
    } catch { /* a reload will begin anew */ }
  }
}

/** What was kept for this model, or null. */
export function restore(model) {
  try {
    const kept = JSON.parse(sessionStorage.getItem(storeOf(model)));
    return kept && kept.model === model.id && String(kept.names) === String(model.names) ? kept : null;
  } catch {
    return null;
  }
}

// -- links

/** "accuracy=0.7,engagement=0.3" */
export const weightText = (names, shares) => names.map((name, n) => `${name}=${Math.round(shares[n] * 1e4) / 1e4}`).join(",");

function weightsFrom(names, text) {
  const values = Object.fromEntries(text.split(",").map((part) => part.split(/=(?=[^=]*$)/)));
  const shares = names.map((name) => Number(values[name] ?? 0));
  return shares.every((share) => share >= 0 && Number.isFinite(share)) ? normalised(shares) : null;
}

/** The address of this page with the settings and a question in it. */
export function linkTo(model, settings, question) {
  const values = new URLSearchParams();
  values.set("mode", settings.mode);
  for (let column = 0; column < columnsOf(settings); column++) {
    values.set(LETTERS[column], weightText(model.names, settings.balances[column]));
  }
  if (settings.apart) values.set("guidance", weightText(model.names, settings.guidance));
  const plain = ["candidates", "strategy", "seed", "strength", "aggregation"];
  const more = {soft_min: ["softness"], thresholds: ["floored", "floor"]}[settings.aggregation] ?? [];
  for (const name of [...plain, ...more]) if (settings[name] !== null) values.set(name, settings[name]);
  if (question) values.set("question", question);
  return location.href.replace(/#.*$/, "") + "#" + values;
}

/** The settings that a link carries over `settings`; {settings, question}, or null without any. */
export function readLink(model, settings, hash) {
  const values = new URLSearchParams(hash.replace(/^#/, ""));
  if (!values.has("mode")) return null;
  const linked = {...settings, balances: [...settings.balances]};
  if (MODES.includes(values.get("mode")) && model.names.length > 1) linked.mode = values.get("mode");
  LETTERS.forEach((letter, column) => {
    const shares = values.has(letter) && weightsFrom(model.names, values.get(letter));
    if (shares) linked.balances[column] = shares;
  });
  linked.columns = values.has("C") ? 3 : 2;
  const guidance = values.has("guidance") && weightsFrom(model.names, values.get("guidance"));
  Object.assign(linked, guidance ? {apart: true, guidance} : {apart: false});
  for (const name of ["candidates", "seed"]) if (values.has(name)) linked[name] = values.get(name).slice(0, 25);
  const choices = {strategy: model.scored.length ? Object.keys(STRATEGIES) : [], aggregation: Object.keys(AGGREGATIONS), floored: model.scored};
  for (const [name, known] of Object.entries(choices)) if (known.includes(values.get(name))) linked[name] = values.get(name);
  const ranges = {softness: [0.1, 5], floor: [-3, 3]};
  if (settings.strength !== null) ranges.strength = [0, model.limits.max_strength];
  for (const [name, [low, high]] of Object.entries(ranges)) {
    const value = values.has(name) ? Number(values.get(name)) : NaN;
    if (value >= low && value <= high) linked[name] = String(value);
  }
  return {settings: linked, question: values.get("question") ?? ""};
}

