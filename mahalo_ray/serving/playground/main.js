// The page as a whole: it holds what is set and said, asks, and draws.

import {ServerError, get, post, streamAnswer, useKey} from "./api.js";
import {meanScores, scalesOf, showConversation, showText, spoken} from "./answers.js";
import {BalanceControl} from "./balance.js";
import {offerCopies, prepareCopies} from "./copies.js";
import {$, decimals, html, listed, refill} from "./dom.js";
import {FrontPicture, portfolioNote} from "./front.js";
import {RANGES, drawNotes, drawSettings} from "./panel.js";
import {belief, choiceOf, learnedNote, nextPair, usualSpreads} from "./preference.js";
import * as set from "./settings.js";
import {described, distance, fromWeights} from "./shares.js";

const PAIRS_TRIED = 3; // when both answers of a pair say the same
const LIVE_DELAY_MS = 250;
const DOUBLE_CLICK_MS = 400;

const state = {model: null, settings: null, turns: [], choices: [], draft: "", running: null, lesson: null, studentThinks: false};
let control = null, guidanceControl = null, picture = null, liveTimer = null, portfolioTimer = null, hasPortfolio = false;

const lastTurn = () => state.turns.at(-1);
const narrow = matchMedia("(max-width: 56rem)");

function say(text, isError = false) {
  $("status").textContent = text;
  $("status").className = isError ? "error" : "";
}

const remember = () => { if (state.model) set.save(state); };

// -- asking

const newId = () => "t" + Date.now().toString(36) + Math.random().toString(36).slice(2, 8);

/** The messages before a turn: every question with the answer that was taken. */
function messagesUpTo(turn) {
  const messages = [];
  for (const {question, answers, chosen} of state.turns.slice(0, state.turns.indexOf(turn))) {
    if (chosen === null) continue;
    messages.push({role: "user", content: question}, {role: "assistant", content: answers[chosen].text});
  }
  return [...messages, {role: "user", content: turn.question}];
}

function plannedAnswers(settings) {
  const balances = settings.mode === "prefer"
    ? nextPair(state.model.names, state.choices) : settings.balances.slice(0, set.columnsOf(settings));
  return balances.map((shares, n) => ({
    id: newId(), letter: set.LETTERS[n], shares: [...shares], state: "running", text: "", report: null, finish: null,
  }));
}

/** Why nothing can be asked now, after saying so; null if all is well. */
function hindrance() {
  const {settings, model} = state;
  const wrong = [["seed", set.seedProblem(settings.seed)]];
  if (model.scored.length && settings.strategy !== "none") {
    wrong.push(["candidates", set.candidatesProblem(settings.candidates, model.limits.max_candidates)]);
  }
  const first = wrong.find(([, problem]) => problem);
  if (!first) return null;
  $("more").open = $("advanced").open = true;
  $(first[0]).focus();
  say("Nothing was asked: " + first[1], true);
  return first[1];
}

async function ask(question, by = "person") {
  const {settings} = state;
  const turn = {id: newId(), question, by, mode: settings.mode, answers: plannedAnswers(settings), chosen: null, preferred: null};
  turn.seed = set.drawSeed(settings.seed);
  if (by === "person") reopenLesson();
  state.turns.push(turn);
  draw();
  showLastTurn();
  await run(turn, turn.answers);
}

/** Scroll to the last question, unless the reader is already past it. */
function showLastTurn() {
  const article = $("chat").lastElementChild;
  const top = parseFloat(getComputedStyle(document.documentElement).scrollPaddingTop) || 0;
  if (article.getBoundingClientRect().top <= top + 1) return;
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  article.scrollIntoView({block: "start", behavior: still ? "auto" : "smooth"});
}

/**
 * Answer the last question anew at the balances of now; its old answers stay until there are new ones.
 * `onlyMoved`: an answer whose request would be the same stays.
 */
async function askAgain(onlyMoved = false) {
  const turn = lastTurn();
  const {settings} = state;
  if (!turn || hindrance()) return;
  // Moves in quick succession: what was there before the first of them.
  const before = state.running?.turn === turn ? state.running.before : {...turn};
  stop();
  reopenLesson();
  Object.assign(turn, {mode: settings.mode, answers: plannedAnswers(settings), chosen: null, preferred: null});
  // What an answer was before is shown, dimmed, until its new words arrive.
  turn.answers.forEach((answer, n) => {
    if (settings.mode !== "prefer" && before.answers[n]?.text) answer.before = before.answers[n];
  });
  if (!onlyMoved) turn.seed = settings.mode === "prefer" ? (turn.seed + 1) % 2 ** 32 : set.drawSeed(settings.seed);
  else {
    const wanted = (answer) => JSON.stringify(set.requestBody(state.model, settings, answer.shares, messagesUpTo(turn), turn.seed));
    turn.answers = turn.answers.map((answer, n) => {
      const old = before.answers.find(({state: how, sent}) => how === "done" && JSON.stringify(sent) === wanted(answer));
      return old ? {...old, letter: set.LETTERS[n], shares: answer.shares} : answer;
    });
  }
  await run(turn, turn.answers.filter(({state: how}) => how === "running"), before);
}

/** Put back what was there before, where nothing new has come; whether it was. */
function putBack(turn, before) {
  const ended = ({state: how, text}) => (how === "failed" || how === "stopped") && !text;
  if (!before?.answers.some(({text}) => text) || !turn.answers.every(ended)) return false;
  const failed = turn.answers.find(({state: how}) => how === "failed");
  Object.assign(turn, before);
  draw();
  remember();
  say((failed ? failed.error : "Stopped.") + " The answers before are still there; you can try again.", Boolean(failed));
  return true;
}

/** Fill in these answers of a turn; `before`: the turn as it was, if it is answered anew. */
async function run(turn, answers, before = null, attempt = 1) {
  const running = state.running = {turn, before, abort: new AbortController(), since: performance.now()};
  for (const answer of answers) {
    Object.assign(answer, {state: "running", text: "", report: null, error: undefined});
    answer.sent = set.requestBody(state.model, state.settings, answer.shares, messagesUpTo(turn), turn.seed);
  }
  draw();
  say(answers.length > 1 ? "Answering " + answers.length + " times\u2026" : "Answering\u2026");
  await Promise.all(answers.map((answer) => fillIn(answer, running.abort.signal)));
  if (state.running !== running) return; // another run has taken its place
  for (const answer of answers) delete answer.before;
  const same = new Set(turn.answers.map(({text}) => text.trim())).size === 1;
  if (turn.mode === "prefer" && same && turn.answers.every((answer) => answer.state === "done") && attempt < PAIRS_TRIED) {
    turn.seed = (turn.seed + 1) % 2 ** 32;
    return void await run(turn, answers, before, attempt + 1);
  }
  state.running = null;
  if (!putBack(turn, before)) settle(turn);
}

async function fillIn(answer, signal) {
  try {
    const {text, report, finish} = await streamAnswer(answer.sent, signal, (grown) => {
      answer.text = grown;
      showText(answer);
    });
    Object.assign(answer, {state: "done", text, report, finish});
  } catch (error) {
    if (!(error instanceof ServerError)) throw error;
    const stopped = error.kind === "stopped";
    Object.assign(answer, {state: stopped ? "stopped" : "failed", text: error.text, kind: error.kind, error: error.message});
    if (error.kind === "key") askForKey();
  }
}

/** A turn's answers are complete, stopped or failed. */
function settle(turn) {
  const usable = (answer) => answer && answer.state !== "failed" && answer.text.trim();
  if (turn.mode !== "prefer" || turn.preferred !== null) {
    const wanted = turn.answers[state.settings.follow];
    const first = turn.answers.findIndex(usable);
    turn.chosen = usable(wanted) ? state.settings.follow : first < 0 ? null : first;
  }
  const failed = turn.answers.filter((answer) => answer.state === "failed");
  draw();
  showLastTurn();
  remember();
  const again = failed.length ? failed[0].error : "";
  if (failed.length) say(again, true);
  else say(turn.answers.some((answer) => answer.state === "stopped") ? "Stopped." : "");
  $("spoken").textContent = spoken(state.model.names, turn);
}

// -- a simulated student in the person's place

/** Whether the conversation is one that a simulated student began and has not ended. */
function studentListens() {
  const {model, turns, lesson} = state;
  return Boolean(model && turns.length && model.students.includes(turns[0].question) && !lesson?.over);
}

/** The student hears the last answer and says the next thing, which is asked at the balances of now. */
async function letStudentAnswer() {
  const turn = lastTurn();
  if (state.running || state.studentThinks || !studentListens() || hindrance()) return;
  if (turn.chosen === null) return void say("Choose the answer that the student hears first.");
  state.studentThinks = true;
  say("The student thinks\u2026");
  try {
    const said = {role: "assistant", content: turn.answers[turn.chosen].text};
    const {message, over, outcome} = await post("v1/student", {model: state.model.id, messages: [...messagesUpTo(turn), said]});
    if (turn !== lastTurn()) return;
    const before = state.lesson?.outcome ?? {};
    state.lesson = {over, outcome, before, farewell: over ? message?.content ?? "" : ""};
    say("");
    if (message && !over) ask(message.content, "student");
    else {
      draw();
      remember();
      $("message").focus({preventScroll: true});
    }
  } catch (error) {
    if (!(error instanceof ServerError)) throw error;
    say(error.message, true);
    if (error.kind === "key") askForKey();
  } finally {
    state.studentThinks = false;
  }
}

/** The student who has left hears another answer: the lesson goes on. */
function reopenLesson() {
  if (state.lesson?.over) state.lesson = null;
}

/** What the lesson has come to so far, by a program that knows the student's mind. */
function drawLesson() {
  const {lesson, turns} = state;
  const shown = Boolean(lesson && turns.length);
  $("lesson").hidden = !shown;
  if (!shown) return;
  const values = Object.entries(lesson.outcome).filter(([name]) => state.model.names.includes(name)).map(([name, value]) => (
    `${name} ${decimals(value, 2)}${name in lesson.before ? ` (${decimals(lesson.before[name], 2)} before)` : ""}`));
  refill($("lesson"),
    lesson.over && `The lesson is over${lesson.farewell ? "; the student\u2019s last words: \u201c" + lesson.farewell + "\u201d" : "."} `,
    values.length > 0 && `${lesson.over ? "What the lesson came to" : "The lesson so far"}, by the simulation itself: ${listed(values)}.`);
}

function stop() {
  if (!state.running) return;
  state.running.abort.abort();
}

const actions = {
  take(turn, index) {
    turn.chosen = index;
    reopenLesson();
    state.settings.follow = index;
    draw();
    remember();
    say("The conversation goes on with answer " + turn.answers[index].letter + ".");
  },
  prefer(turn, index) {
    const [first, second] = turn.answers.map(({report, shares}) => ({scores: meanScores(report), shares}));
    const kept = index === null ? 0 : index === 0 ? 1 : -1;
    state.choices.push(choiceOf(state.model.names, first, second, kept, usualSpreads(state.model.names, state.turns)));
    turn.preferred = index === null ? "none" : index;
    turn.chosen = index ?? 0;
    draw();
    picture?.update();
    showPortfolio();
    remember();
    const note = $("chat").querySelector("[data-turn=" + turn.id + "] .preference");
    const next = note.querySelector("button");
    next.focus({preventScroll: true});
    note.scrollIntoView({block: "nearest"});
    say("");
    $("spoken").textContent = note.querySelector("p").textContent;
  },
  another: () => askAgain(),
  adopt(shares) {
    state.settings.balances[0] = shares;
    setMode("one");
    say("Answers now have your balance: " + described(state.model.names, shares) + ".");
  },
  forget() {
    state.choices = [];
    draw();
    picture?.update();
    showPortfolio();
    remember();
    $("message").focus();
    say("Your choices are forgotten: all balances are equally likely again.");
  },
  tryAgain(index) {
    const turn = lastTurn();
    if (state.running || hindrance()) return;
    run(turn, turn.answers.filter((answer, n) => answer.state === "failed" || n === index));
  },
  startOver(withQuestion) {
    stop();
    const question = withQuestion ? lastTurn().question : "";
    state.running = null;
    state.turns = [];
    state.lesson = null;
    draw();
    remember();
    $("message").value = state.draft = question;
    fitMessage();
    $("message").focus();
    say(withQuestion ? "A new conversation: your question is in the box." : "A new conversation.");
  },
  copy(turn, answer) {
    const settings = {...state.settings, seed: String(turn.seed)};
    if (turn.mode === "one") settings.balances = settings.balances.with(0, answer.shares);
    offerCopies(answer.sent, set.linkTo(state.model, settings, turn.question));
  },
};

// -- drawing

function context() {
  const {names} = state.model;
  return {
    names, actions, scales: scalesOf(names, state.turns),
    learned: (turn) => (state.choices.length ? learnedNote(names, state.choices, turn, actions) : null),
  };
}

function draw() {
  const active = document.activeElement;
  const inChat = $("chat").contains(active), inForm = active === $("send") || active === $("stop");
  showConversation($("chat"), context(), state.turns, Boolean(state.running));
  const begun = state.turns.length > 0;
  $("start").hidden = begun;
  $("after").hidden = !begun;
  $("student").hidden = !studentListens();
  drawLesson();
  $("stop").hidden = !state.running;
  $("send").hidden = Boolean(state.running);
  // What was pressed may be gone now: the focus goes to what one would press or write next.
  const next = state.running ? "stop" : inForm ? "send" : "message";
  if (inForm || (inChat && !$("chat").contains(document.activeElement))) $(next).focus({preventScroll: true});
  $("message-label").textContent = $("message").placeholder = begun ? "What you say next" : "Your question";
}

// -- settings

const panelActions = {setMode, setBalance, submit};

function settingsChanged() {
  drawSettings(state, panelActions);
  control?.update();
  guidanceControl?.update();
  picture?.update();
  showPortfolio();
  if (state.running === null) draw();
  remember();
}

function setMode(mode) {
  state.settings.mode = mode;
  state.settings.selected = Math.min(state.settings.selected, set.columnsOf(state.settings) - 1);
  settingsChanged();
}

/** A balance for the selected column, set by a preset or a picture. */
function setBalance(shares) {
  const {settings} = state;
  if (settings.mode === "prefer") setMode("one");
  settings.balances[settings.selected] = [...shares];
  balanceMoved(true);
  const letter = settings.mode === "compare" ? " " + set.LETTERS[settings.selected] : "";
  say(`Balance${letter} is now ${described(state.model.names, shares)}.`);
}

function balanceMoved(done) {
  control.update();
  picture?.update();
  if (done) {
    remember();
    showPortfolio();
  }
  const {settings} = state;
  const turn = lastTurn();
  if (!settings.live || !turn || settings.mode === "prefer") return;
  clearTimeout(liveTimer);
  liveTimer = setTimeout(() => {
    const now = settings.balances.slice(0, set.columnsOf(settings));
    const differs = now.length !== turn.answers.length || now.some((shares, n) => distance(shares, turn.answers[n].shares) > 1e-6);
    if (differs && turn === lastTurn()) askAgain(true);
  }, LIVE_DELAY_MS);
}

function prepareControls() {
  const {names} = state.model;
  if (names.length < 2) return;
  control = new BalanceControl($("balance"), names, "balance", {
    read: () => ({
      balances: state.settings.balances, selected: state.settings.selected,
      letters: set.LETTERS.slice(0, set.columnsOf(state.settings)),
    }),
    onChange(column, shares, done) {
      state.settings.balances[column] = shares;
      balanceMoved(done);
    },
    onSelect(column) {
      state.settings.selected = column;
      control.update();
      picture?.update();
      showPortfolio();
    },
  });
  guidanceControl = new BalanceControl($("guidance"), names, "guidance", {
    read: () => ({balances: [state.settings.guidance], selected: 0, letters: ["A"]}),
    onChange(_, shares, done) {
      state.settings.guidance = shares;
      guidanceControl.update();
      if (done) remember();
    },
    onSelect() {},
  });
}

// -- what was measured

/** Take a measured policy's decoding weights, strength and guidance; an unguided one leaves the picking as it is. */
function usePolicy(weights, {strength, guidance, num_candidates: candidates}) {
  const {model, settings} = state;
  const shares = fromWeights(model.names, weights);
  if (settings.strength !== null && strength !== undefined) settings.strength = String(strength);
  if (guidance && model.scored.length) {
    const picking = fromWeights(model.names, guidance);
    settings.apart = distance(picking, shares) > 0.005;
    if (settings.apart) settings.guidance = picking;
    settings.candidates = String(Math.min(candidates, model.limits.max_candidates));
    if (settings.strategy === "none") settings.strategy = "argmax";
  }
  settingsChanged();
  setBalance(shares);
}

/** The balance that the picture and the portfolio speak of: the selected one, or what was learned so far. */
function currentBalance() {
  const {model, settings, choices} = state;
  return settings.mode === "prefer" ? belief(model.names, choices).mean : settings.balances[settings.selected];
}

async function showFront() {
  const {model} = state;
  const front = model.names.length > 1 ? await get("v1/front", {optional: true}) : null;
  const measured = front?.objectives.length > 1 && front.points.length > 0
    && front.objectives.every(({name}) => model.names.includes(name));
  $("front-part").hidden = !measured;
  if (!measured) return;
  $("front-about").textContent = `${front.dialogues} dialogues behind every point; further right and further up is better. ` +
    `The thin lines are ${Math.round(100 * front.confidence)}\u00a0% intervals. Click a point to take its balance.`;
  picture = new FrontPicture($("front"), $("front-note"), model.names, front, {
    balances: () => {
      const {settings} = state;
      if (settings.mode === "prefer") return [{letter: "", shares: currentBalance(), selected: true}];
      return settings.balances.slice(0, set.columnsOf(settings)).map((shares, n) => (
        {letter: set.LETTERS[n], shares, selected: n === settings.selected}));
    },
    onPick: (point) => usePolicy(point.weights, point),
  });
  showPortfolio();
}

/** The portfolio's member for the selected balance, a moment after it was set. */
function showPortfolio() {
  if (!picture || !hasPortfolio) return;
  clearTimeout(portfolioTimer);
  const timer = portfolioTimer = setTimeout(async () => {
    const {model, settings} = state;
    const shares = currentBalance();
    try {
      const weights = new URLSearchParams({weights: set.weightText(model.names, shares)});
      const portfolio = await get("v1/portfolio?" + weights);
      if (timer !== portfolioTimer) return; // another balance was set meanwhile
      const letter = settings.mode === "compare" ? set.LETTERS[settings.selected] : "";
      refill($("portfolio"), portfolioNote(model.names, letter, portfolio, (member) => usePolicy(member.objectives, member)));
    } catch (error) {
      if (!(error instanceof ServerError)) throw error;
      if (timer !== portfolioTimer) return;
      refill($("portfolio"), html("p", {}, "The portfolio cannot be shown: " + error.message));
    }
  }, LIVE_DELAY_MS);
}

// -- the form

/** The box is as high as its text, up to a limit of the style sheet. */
function fitMessage() {
  const box = $("message");
  box.style.height = "auto";
  box.style.height = box.scrollHeight + box.offsetHeight - box.clientHeight + "px";
}

function submit(question) {
  const text = question.trim();
  if (!state.model) return void start();
  if (state.running) return void say("An answer is on its way: wait for it, or stop it.");
  if (!text) {
    $("message").focus();
    return void say("Write a question first.");
  }
  if (hindrance()) return;
  $("message").value = state.draft = "";
  fitMessage();
  if (!document.activeElement || document.activeElement.closest("#start")) $("message").focus({preventScroll: true});
  ask(text);
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  submit($("message").value);
});
$("message").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("ask").requestSubmit();
});
$("message").addEventListener("input", () => {
  state.draft = $("message").value;
  fitMessage();
});
$("message").addEventListener("change", remember);
$("again").addEventListener("click", () => askAgain());
$("student").addEventListener("click", letStudentAnswer);
$("clear").addEventListener("click", () => actions.startOver(false));
$("stop").addEventListener("click", () => {
  // The second click of a double click on \u2018Ask\u2019 lands here.
  if (state.running && performance.now() - state.running.since > DOUBLE_CLICK_MS) stop();
});
$("model").addEventListener("change", () => {
  remember();
  location.assign("?" + new URLSearchParams({model: $("model").value}));
});
$("columns").addEventListener("click", () => {
  state.settings.columns = state.settings.columns === 2 ? 3 : 2;
  state.settings.selected = state.settings.columns - 1;
  settingsChanged();
});
$("live").addEventListener("change", () => {
  state.settings.live = $("live").checked;
  remember();
});
for (const name of ["candidates", "seed"]) {
  $(name).addEventListener("input", () => {
    state.settings[name] = $(name).value.trim();
    drawNotes(state);
    remember();
  });
}
for (const name of RANGES) {
  $(name).addEventListener("input", () => {
    state.settings[name] = $(name).value;
    $(name + "-value").textContent = decimals(Number($(name).value), 1);
    remember();
  });
}
for (const name of ["strategy", "aggregation", "floored"]) {
  $(name).addEventListener("change", () => {
    state.settings[name] = $(name).value;
    settingsChanged();
  });
}
$("apart").addEventListener("change", () => {
  state.settings.apart = $("apart").checked;
  if (state.settings.apart) state.settings.guidance = [...state.settings.balances[state.settings.selected]];
  settingsChanged();
});
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey($("key").value.trim());
  start();
});

function askForKey() {
  $("key-form").hidden = false;
  $("key").focus();
}

// -- the beginning

async function start() {
  try {
    say("Looking for the model\u2026");
    const models = await get("v1/models");
    const first = !state.model;
    // An id with a member of the portfolio behind it is the same model.
    const offered = models.data.filter(({id}) => !id.includes("@"));
    hasPortfolio = models.data.some(({id}) => id.startsWith(offered[0].id + "@"));
    const wanted = new URLSearchParams(location.search).get("model");
    const chosen = offered.find(({id}) => id === wanted) ?? offered[0];
    const model = state.model = set.servedModel(chosen);
    $("model-part").hidden = offered.length < 2;
    refill($("model"), offered.map(({id}) => html("option", {value: id, selected: id === model.id}, id)));
    if (first) restoreAll(model);
    if (offered.length > 1) $("about").textContent = "Choose what counts more, and see what that does to its answers.";
    say("");
    $("key-form").hidden = true;
    if ($("key").value) $("message").focus();
    // What was measured is the run's own model. It may come late: nothing that was said meanwhile is taken back.
    if (chosen === offered[0]) await showFront();
  } catch (error) {
    if (!(error instanceof ServerError)) throw error;
    say(error.message + (error.kind === "network" ? " Ask again to look for it once more." : ""), true);
    if (error.kind === "key") askForKey();
  }
}

function restoreAll(model) {
  const usual = set.defaultSettings(model);
  const kept = set.restore(model);
  state.settings = {...usual, ...kept?.settings};
  if (usual.strength === null) state.settings.strength = null;
  state.turns = (kept?.turns ?? []).map(ended);
  state.choices = kept?.choices ?? [];
  state.lesson = kept?.lesson ?? null;
  state.draft = kept?.draft ?? "";
  const linked = set.readLink(model, state.settings, location.hash);
  if (linked) {
    state.settings = linked.settings;
    state.draft = linked.question || state.draft;
    history.replaceState(null, "", location.pathname + location.search);
  }
  $("about").textContent = `Model \u2018${model.id}\u2019.` +
    (model.names.length > 1 ? " Choose what counts more, and see what that does to its answers." : "");
  $("live").checked = state.settings.live;
  $("message").value = state.draft;
  fitMessage();
  prepareControls();
  settingsChanged();
}

/** A turn as it was kept; answers that were still being written when the page went are told to be broken off. */
function ended(turn) {
  for (const answer of turn.answers) {
    if (answer.state !== "running") continue;
    Object.assign(answer, {state: "failed", kind: "network", error: "The page was reloaded before this answer was complete."});
  }
  return turn;
}

// What scrolls into view stays clear of what is fixed above and below.
const clearance = new ResizeObserver(() => {
  const above = narrow.matches && !$("balance-card").hidden ? $("balance-card").offsetHeight + 8 : 0;
  document.documentElement.style.scrollPaddingTop = above + 8 + "px";
  document.documentElement.style.scrollPaddingBottom = $("ask").offsetHeight + 8 + "px";
});
for (const name of ["conversation", "balance-card", "ask"]) clearance.observe($(name));

// On a phone the settings begin folded.
$("more").open = !narrow.matches;
prepareCopies();
start();
