// The settings as they are drawn: how to answer, presets, meanings, the advanced part, and where to begin.

import {$, decimals, html, listed, refill} from "./dom.js";
import * as set from "./settings.js";
import {presets} from "./shares.js";

const MODE_NAMES = {compare: "Compare", one: "One answer", prefer: "Which do you prefer?"};
const MODE_HINTS = {
  compare: "Each balance answers the same question.",
  one: "The model answers at your balance.",
  prefer: "You get two answers and say which you prefer. From that the page learns your balance.",
};
export const RANGES = ["strength", "softness", "floor"]; // sliders of one number each

/** Bring all settings on the page up to date. actions: setMode(mode), setBalance(shares), submit(question). */
export function drawSettings(state, actions) {
  const {model, settings} = state;
  const several = model.names.length > 1;
  refill($("modes"), set.MODES.map((mode) => html("label", {}, html("input", {
    type: "radio", name: "mode", value: mode, checked: settings.mode === mode, "data-key": "mode" + mode, onchange: () => actions.setMode(mode),
  }), MODE_NAMES[mode])));
  $("modes").hidden = $("presets-part").hidden = !several;
  $("mode-hint").textContent = several ? MODE_HINTS[settings.mode]
    : model.names.length ? `This model has one goal, ${model.names[0]}: there is nothing to balance.`
      : "This model has no goals to balance, and no reward model.";
  $("balance-card").hidden = !several || settings.mode === "prefer";
  $("balance-buttons").hidden = $("balance-card").hidden;
  $("columns").hidden = settings.mode !== "compare";
  $("columns").textContent = settings.columns === 2 ? "Add a third" : "Back to two";
  refill($("presets"), presets(model.names).map(({label, shares}) => html("button", {
    type: "button", "data-key": "preset" + label, onclick: () => actions.setBalance(shares),
  }, label)));
  const meanings = model.names.filter((name) => model.described[name]);
  $("meaning-part").hidden = !meanings.length;
  refill($("meaning"), meanings.map((name) => [
    html("dt", {}, html("i", {class: "dot o" + model.names.indexOf(name), "aria-hidden": "true"}), name),
    html("dd", {}, model.described[name]),
  ]));
  const scored = model.scored.length > 0;
  $("numbers").hidden = !scored;
  for (const name of ["candidates", "strategy", "aggregation"]) $(name).parentElement.hidden = !scored;
  $("strength").parentElement.hidden = settings.strength === null;
  $("softness-part").hidden = !scored || settings.aggregation !== "soft_min";
  $("floored-part").hidden = $("floor-part").hidden = !scored || settings.aggregation !== "thresholds";
  for (const name of ["candidates", "seed"]) if ($(name).value !== settings[name]) $(name).value = settings[name];
  $("strength").max = model.limits.max_strength ?? 1;
  for (const name of RANGES) {
    $(name).value = settings[name] ?? "1";
    $(name + "-value").textContent = decimals(Number($(name).value), 1);
  }
  const options = (labels, chosen) => Object.entries(labels).map(([value, label]) =>
    html("option", {value, selected: value === chosen}, label));
  refill($("strategy"), options(set.STRATEGIES, settings.strategy));
  refill($("aggregation"), options(set.AGGREGATIONS, settings.aggregation));
  refill($("floored"), options(Object.fromEntries(model.scored.map((name) => [name, name])), settings.floored));
  $("apart-part").hidden = !(scored && model.heads.length && several);
  $("apart").checked = settings.apart;
  $("guidance").hidden = !settings.apart;
  drawNotes(state);
  drawStart(state, actions);
}

/** What is wrong with a field, or what it does. */
export function drawNotes(state) {
  const {settings, model} = state;
  const notes = {
    seed: [set.seedProblem(settings.seed), settings.seed === "" ? "Empty: every question gets a random seed." : "Equal seeds give equal answers."],
    candidates: [set.candidatesProblem(settings.candidates, model.limits.max_candidates), "More: better chosen, slower."],
  };
  for (const [name, [problem, note]] of Object.entries(notes)) {
    $(name).setAttribute("aria-invalid", String(Boolean(problem)));
    $(name + "-note").textContent = problem ?? note;
    $(name + "-note").classList.toggle("wrong", Boolean(problem));
  }
}

function drawStart(state, actions) {
  const {model} = state;
  const several = model.names.length > 1;
  refill($("start"),
    html("h2", {id: "start-title"}, several ? "Ask once, and see the trade-off" : "Ask the model something"),
    html("p", {}, several
      ? `This model was trained for ${model.names.length} goals at once: ${listed(model.names)}. They pull its answers in ` +
        "different directions. Ask something, and read the same model at different balances, side by side."
      : "Its answer appears here" + (model.scored.length ? ", with the candidates it was chosen from and their scores." : ".")),
    model.examples.length > 0 && [html("h3", {}, "Begin with one of these"),
      html("div", {class: "examples"}, model.examples.map((example) => html("button", {
        type: "button", onclick: () => actions.submit(example),
      }, example)))]);
}
