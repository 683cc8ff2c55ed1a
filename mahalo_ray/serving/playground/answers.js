// The conversation: questions, the answers to each at several balances, their differences, scores and candidates.

import {count, decimals, html, listed, refill} from "./dom.js";
import {differences} from "./differences.js";
import {described, percentages} from "./shares.js";

const FEW_WORDS_SHARED = 0.2; // below it nearly every word would be marked, which shows nothing

// -- scales: one per objective for the whole page, so that bars can be compared between answers

/** The ends of each objective's bars: 0 and 1, or further apart where a score lies outside. */
export function scalesOf(names, turns) {
  const scales = Object.fromEntries(names.map((name) => [name, [0, 1]]));
  for (const {report} of turns.flatMap((turn) => turn.answers)) {
    for (const candidate of (report?.steps ?? []).flatMap((step) => step.candidates)) {
      for (const [name, value] of Object.entries(candidate.scores ?? {})) {
        const [low, high] = scales[name] ?? [0, 1];
        scales[name] = [value < low ? -roundUp(-value) : low, value > high ? roundUp(value) : high];
      }
    }
  }
  return scales;
}

/** The next of 1, 2, 5, 10, 20, ... */
function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(Math.abs(value) || 1));
  return power * [1, 2, 5, 10].find((step) => step * power >= Math.abs(value) - 1e-12);
}

function bar(context, name, value) {
  const [low, high] = context.scales[name];
  const at = (x) => (100 * (x - low)) / (high - low);
  const fill = html("span", {class: "fill o" + context.names.indexOf(name)});
  fill.style.left = at(Math.min(value, Math.max(low, 0))) + "%";
  fill.style.width = Math.abs(at(value) - at(Math.max(low, 0))) + "%";
  if (low >= 0) return html("dd", {class: "track", "aria-hidden": "true"}, fill);
  const zero = html("span", {class: "zero"});
  zero.style.left = at(0) + "%";
  return html("dd", {class: "track", "aria-hidden": "true"}, fill, zero);
}

function scoreList(context, scores) {
  return html("dl", {class: "scores"}, Object.entries(scores).map(([name, value]) => [
    html("dt", {}, name), bar(context, name, value), html("dd", {}, decimals(value)),
  ]));
}

/** The mean over an answer's steps of what its chosen candidates scored; null without scores. */
export function meanScores(report) {
  const chosen = (report?.steps ?? []).map((step) => step.candidates[step.chosen].scores).filter(Boolean);
  if (!chosen.length) return null;
  const names = Object.keys(chosen[0]);
  return Object.fromEntries(names.map((name) => [
    name, chosen.reduce((sum, scores) => sum + scores[name], 0) / chosen.length,
  ]));
}

// -- why a candidate was chosen

const EQUAL = 1e-9; // totals closer than this differ by rounding alone

/** The digits that tell the totals of candidates apart, two at least. */
function digitsOf(candidates) {
  const totals = candidates.map(({total}) => total).filter((total) => total !== null).sort((a, b) => a - b);
  const gaps = totals.slice(1).map((total, n) => total - totals[n]).filter((gap) => gap > EQUAL);
  const told = (digits) => totals.every((total, n) => !n || total - totals[n - 1] <= EQUAL || total.toFixed(digits) !== totals[n - 1].toFixed(digits));
  if (totals.every(Number.isInteger)) return 0; // ranks
  return gaps.length ? [2, 3, 4, 6].find(told) ?? 9 : 2;
}

const numbered = (indices) => "candidate" + (indices.length > 1 ? "s " : " ") + listed(indices.map((n) => String(n + 1)));

/** In a few sentences, why this candidate of a step and no other. */
export function whyChosen(step, strategy, guidance) {
  const {candidates, chosen} = step;
  const taken = candidates[chosen];
  if (candidates.length < 2 || taken.total === null) return "There was nothing to choose from.";
  if (candidates.every(({text}) => text === taken.text)) return "All candidates say the same.";
  const ranks = standing(candidates, chosen, guidance);
  if (strategy === "sample") {
    const highest = Math.max(...candidates.map(({total}) => total));
    return `Drawn by chance, higher totals more often: its total is ${decimals(taken.total, 2)}, the highest is ` +
      `${decimals(highest, 2)}.${ranks}`;
  }
  const spoken = candidates.map((candidate, n) => ({...candidate, n})).filter(({text, n}) => text.trim() && n !== chosen);
  const higher = candidates.filter(({total, text}) => total > taken.total && !text.trim());
  const passedOver = higher.length
    ? " A candidate with a higher total says nothing at all, and such a one is only taken when all are silent." : "";
  const equal = spoken.filter(({total}) => Math.abs(total - taken.total) < EQUAL);
  const same = equal.filter(({text}) => text === taken.text).map(({n}) => n);
  const others = equal.filter(({text}) => text !== taken.text).map(({n}) => n);
  const lower = spoken.filter((candidate) => !equal.includes(candidate)).sort((a, b) => b.total - a.total)[0];
  const reasons = [];
  if (others.length) {
    reasons.push(`It has the same total as ${numbered(others)}; of equal totals the one sampled first is taken.`);
  }
  if (same.length) reasons.push(`${capital(numbered(same))} ${same.length > 1 ? "are" : "is"} the same text, sampled again.`);
  if (lower && !others.length) {
    const digits = digitsOf(candidates);
    reasons.push(`It has the highest total, ${decimals(taken.total, digits)}; next comes candidate ${lower.n + 1} with ` +
      `${decimals(lower.total, digits)}.`);
  }
  return reasons.join(" ") + passedOver + ranks;
}

const capital = (text) => text[0].toUpperCase() + text.slice(1);

/** " It is best on engagement (weight 90 %) and 3rd of 5 on accuracy (10 %)." */
function standing(candidates, chosen, guidance) {
  const names = Object.keys(guidance ?? {}).filter((name) => guidance[name] > 0);
  if (!names.length) return "";
  const places = names.map((name) => {
    const better = new Set(candidates.map(({scores}) => scores[name]).filter((v) => v > candidates[chosen].scores[name])).size;
    return `${better ? "number " + (better + 1) : "best"} on ${name} (weight ${Math.round(100 * guidance[name])}\u00a0%)`;
  });
  return ` It is ${listed(places)}.`;
}

function stepBlock(context, answer, step, number, total) {
  const {strategy, guidance} = answer.report;
  const digits = digitsOf(step.candidates);
  const items = step.candidates.map((candidate, n) => html("li", {class: "candidate" + (n === step.chosen ? " chosen" : "")},
    html("p", {class: "mark"}, `Candidate ${n + 1}`, n === step.chosen && " \u2013 chosen",
      candidate.total !== null && ` \u00b7 total ${decimals(candidate.total, digits)}`),
    html("p", {class: "text"}, candidate.text.trim() ? candidate.text : "(says nothing)"),
    candidate.scores && scoreList(context, candidate.scores)));
  return [
    total > 1 && html("h4", {}, `Step ${number} of ${total}`),
    step.candidates.length > 1 && html("p", {class: "why"},
      answer.sent.aggregation?.kind === "thresholds" && "Totals are ranks here, 0 for the worst. ",
      whyChosen(step, strategy, guidance)),
    html("ol", {class: "candidates"}, items),
  ];
}

// -- an answer

function fold(answer, key, summary, ...content) {
  answer.open ??= {};
  const details = html("details", {open: answer.open[key], ontoggle: () => { answer.open[key] = details.open; }},
    html("summary", {"data-key": answer.id + key}, summary), content);
  return details;
}

function balanceBar(names, shares) {
  const strip = html("span", {class: "strip", "aria-hidden": "true"}, names.map((_, n) => {
    const part = html("span", {class: "o" + n});
    part.style.width = 100 * shares[n] + "%";
    return part;
  }));
  const parts = percentages(shares).map((percent, n) => html("span", {}, `${names[n]} ${percent}\u00a0%`));
  return [strip, html("span", {class: "balance-text"}, parts.flatMap((part, n) => (n ? [" ", part] : [part])))];
}

function answerText(answer, marked) {
  const text = html("p", {class: "text"});
  if (answer.state === "running" && !answer.text && answer.before) text.textContent = answer.before.text;
  else if (answer.text.trim()) {
    if (!marked) text.textContent = answer.text;
    else text.append(...marked.map((run) => (run.differs ? html("mark", {}, run.text) : run.text)));
  } else if (answer.state === "done") text.append(html("em", {}, "(an empty answer)"));
  return text;
}

/** Two answers wait for a choice between them. */
const isOpen = (turn) => turn.mode === "prefer" && turn.preferred === null;

/** The node of an answer's text while it streams in. */
const growing = new WeakMap();
export function showText(answer) {
  const node = growing.get(answer);
  if (!node) return;
  node.textContent = answer.text;
  node.closest(".answer").classList.remove("stale");
}

function answerCard(context, turn, answer, index, view) {
  const {actions} = context;
  const {letter, report} = answer;
  const blind = isOpen(turn) && view.isLast;
  const several = turn.answers.length > 1;
  const name = blind ? ["First answer", "Second answer"][index] : several ? "Answer " + letter : "Answer";
  const text = answerText(answer, view.marked?.[index]);
  growing.set(answer, text);
  const chosen = turn.chosen === index;
  const stale = answer.state === "running" && !answer.text && answer.before;
  const card = html("section", {
    class: "answer" + (several && chosen && view.settled ? " taken" : "") + (stale ? " stale" : ""), "aria-label": name,
    "aria-busy": String(answer.state === "running"),
  });
  card.append(html("h3", {},
    several && !blind && html("span", {class: "badge", "aria-hidden": "true"}, letter),
    blind ? name : balanceBar(context.names, answer.shares)));
  card.append(text);
  const rest = html("div", {class: "rest"});
  if (answer.state === "stopped") rest.append(html("p", {class: "note"}, "You stopped this answer here."));
  if (answer.state === "failed") rest.append(failure(answer, index, actions));
  if ((report || stale) && !blind) {
    const scores = meanScores(report ?? answer.before.report);
    if (scores) rest.append(scoreList(context, scores));
  }
  if (answer.state === "running") rest.append(html("p", {class: "waiting"}, answer.text ? "Writing\u2026" : "Thinking\u2026"));
  if (view.settled && several) rest.append(choiceOf(context, turn, answer, index, view, name));
  if (report && !blind) {
    const most = Math.max(...report.steps.map((step) => step.candidates.length));
    rest.append(fold(answer, "candidates",
      most > 1 ? `The ${most} candidates${report.steps.length > 1 ? " of each step" : ""}, and why this one` : "What was sampled",
      report.steps.map((step, n) => stepBlock(context, answer, step, n + 1, report.steps.length)),
      html("p", {class: "used"}, usedText(answer))));
  }
  if (answer.sent && !blind && view.settled && answer.state !== "failed") {
    rest.append(html("p", {class: "elsewhere"},
      html("button", {type: "button", class: "link", "data-key": answer.id + "copy", onclick: () => actions.copy(turn, answer)},
        "Copy as curl, Python or a link")));
  }
  card.append(rest);
  return card;
}

function usedText(answer) {
  const {report, finish} = answer;
  const parts = [];
  const weights = (values) => Object.entries(values).map(([name, value]) => `${name} ${Math.round(100 * value)}\u00a0%`).join(", ");
  if (report.objectives) parts.push("words: " + weights(report.objectives));
  if (report.guidance) parts.push("choice: " + weights(report.guidance));
  parts.push("seed " + report.seed, report.seconds.toFixed(2) + "\u00a0s");
  if (finish === "length") parts.push("cut at the length limit");
  return parts.join(" \u00b7 ");
}

function failure(answer, index, actions) {
  const button = answer.kind === "full"
    ? html("button", {type: "button", class: "plain", "data-key": answer.id + "again", onclick: () => actions.startOver(true)},
      "New conversation with this question")
    : html("button", {type: "button", class: "plain", "data-key": answer.id + "again", onclick: () => actions.tryAgain(index)},
      "Try again");
  return html("div", {class: "failure"}, html("p", {}, answer.error), button);
}

/** How to make this answer the one that goes on, or the note that it is. */
function choiceOf(context, turn, answer, index, view, name) {
  const {actions} = context;
  const usable = answer.text.trim() && answer.state !== "failed";
  if (isOpen(turn) && view.isLast) {
    return html("p", {class: "choice"}, usable && html("button", {
      type: "button", "data-key": answer.id + "prefer", onclick: () => actions.prefer(turn, index),
    }, `I prefer the ${["first", "second"][index]}`));
  }
  if (turn.chosen === index) {
    return html("p", {class: "choice is-taken", tabindex: "-1", "data-key": answer.id + "take"},
      "\u2713 In the conversation");
  }
  if (!usable || !view.isLast) return "";
  return html("p", {class: "choice"}, html("button", {
    type: "button", class: "plain", "data-key": answer.id + "take", "aria-label": `Take this one instead: ${name}`,
    onclick: () => actions.take(turn, index),
  }, "Take this one instead"));
}

// -- a turn

/** What the answers' words and scores come to, side by side. */
function comparison(context, turn, found) {
  const done = turn.answers.filter(({state}) => state === "done");
  if (done.length < 2 || isOpen(turn)) return null;
  const parts = [];
  if (new Set(done.map(({text}) => text.trim())).size === 1) {
    parts.push("All balances lead to the same words here. Try balances further apart, or another seed.");
  } else if (found.shared !== null && found.shared < FEW_WORDS_SHARED) {
    parts.push("These answers have next to no words in common.");
  } else if (found.marked) {
    parts.push(html("span", {}, html("mark", {}, "Marked words"), " are not in all answers."));
  }
  const scores = done.map(({report}) => meanScores(report));
  if (scores.every(Boolean)) {
    const better = done.length > 2 ? "best" : "better";
    const leads = [];
    for (const name of Object.keys(scores[0])) {
      const values = scores.map((each) => each[name]);
      const top = Math.max(...values), low = Math.min(...values);
      if (decimals(top, 2) === decimals(low, 2)) continue;
      const against = done.length > 2 ? "down to" : "against";
      leads.push(`${done[values.indexOf(top)].letter} ${leads.length ? "" : `does ${better} `}on ${name} ` +
        `(${decimals(top, 2)} ${against} ${decimals(low, 2)})`);
    }
    if (leads.length) parts.push(` By the scores, ${listed(leads)}.`);
  }
  return parts.length ? html("p", {class: "comparison"}, parts) : null;
}

function turnBlock(context, turn, isLast, isRunning) {
  const settled = !(isLast && isRunning);
  let found = {marked: null, shared: null};
  const complete = turn.answers.every(({state, text}) => state === "done" && text.trim());
  if (settled && turn.answers.length > 1 && complete) found = differences(turn.answers.map(({text}) => text));
  const view = {settled, isLast, marked: found.shared !== null && found.shared >= FEW_WORDS_SHARED ? found.marked : null};
  const cards = turn.answers.map((answer, index) => answerCard(context, turn, answer, index, view));
  const article = html("article", {class: "turn", "data-turn": turn.id},
    html("div", {class: "question" + (turn.by === "student" ? " by-student" : "")}, html("h2", {}, turn.by === "student" ? "Simulated student" : "You"), html("p", {class: "text"}, turn.question)));
  const answers = html("div", {class: "answers n" + turn.answers.length});
  if (isLast || turn.answers.length === 1 || turn.chosen === null) {
    answers.append(...cards);
    article.append(answers, comparison(context, turn, found) ?? "", settled ? preference(context, turn, isLast) ?? "" : "");
    if (!isLast && turn.chosen === null) {
      article.append(html("p", {class: "note"},
        (isOpen(turn) ? "You preferred neither" : "There is no answer") + ", so this question is not part of the conversation."));
    }
  } else {
    // What was not taken steps back once the conversation has gone on.
    const others = cards.filter((_, index) => index !== turn.chosen);
    answers.classList.replace("n" + turn.answers.length, "n1");
    answers.append(cards[turn.chosen]);
    article.append(answers, fold(turn, "others", count(others.length, "other answer") + " to this question",
      html("div", {class: "answers n" + others.length}, others)));
  }
  return article;
}

function preference(context, turn, isLast) {
  if (turn.mode !== "prefer" || !isLast) return null;
  const {actions} = context;
  if (turn.answers.some(({state}) => state === "failed" || state === "stopped")) return null;
  if (turn.preferred !== null) return html("div", {class: "preference"}, context.learned(turn));
  return html("p", {class: "preference"}, html("button", {
    type: "button", class: "plain", "data-key": turn.id + "neither", onclick: () => actions.prefer(turn, null),
  }, "No difference to me"));
}

/**
 * Draw the conversation into `box`.
 *
 * context: {names, scales, actions, learned(turn)}; actions: take(turn, n), prefer(turn, n or null), tryAgain(n),
 * startOver(withQuestion), copy(turn, answer). `isRunning`: the last turn is being answered.
 */
export function showConversation(box, context, turns, isRunning) {
  refill(box, turns.map((turn, n) => turnBlock(context, turn, n === turns.length - 1, isRunning)));
}

/** What a screen reader hears when the answers are complete. */
export function spoken(names, turn) {
  const blind = isOpen(turn);
  return turn.answers.map((answer, n) => {
    const who = blind ? ["First", "Second"][n] + " answer" : turn.answers.length > 1
      ? `Answer ${answer.letter}, ${described(names, answer.shares)}` : "Answer";
    return `${who}: ${answer.state === "failed" ? answer.error : answer.text || "empty"}`;
  }).join(". ");
}

