// Balances: shares of the objectives, a list of numbers from 0 to 1 that sum to 1, in the order of their names.

export const even = (count) => new Array(count).fill(1 / count);

export const only = (count, index) => even(count).map((_, n) => (n === index ? 1 : 0));

export function normalised(values) {
  const total = values.reduce((sum, value) => sum + value, 0);
  return total > 0 ? values.map((value) => value / total) : even(values.length);
}

/** The shares of `names` in an object such as {accuracy: 0.7, engagement: 0.3}. */
export const fromWeights = (names, weights) => normalised(names.map((name) => weights?.[name] ?? 0));

/** As an object over those of `names` that are in `known`; all of them alike where they have no share. */
export function toWeights(names, shares, known) {
  const taken = known.map((name) => shares[names.indexOf(name)] ?? 0);
  return Object.fromEntries(normalised(taken).map((share, n) => [known[n], Math.round(share * 1e4) / 1e4]));
}

/** Whole percentages that sum to 100. */
export function percentages(shares) {
  const exact = shares.map((share) => share * 100);
  const rounded = exact.map(Math.floor);
  const missing = 100 - rounded.reduce((sum, value) => sum + value, 0);
  const order = exact.map((value, n) => [value - rounded[n], n]).sort((a, b) => b[0] - a[0] || a[1] - b[1]);
  for (const [, n] of order.slice(0, Math.round(missing))) rounded[n] += 1;
  return rounded;
}

/** "accuracy 90 %, engagement 10 %" */
export function described(names, shares) {
  return percentages(shares).map((percent, n) => names[n] + " " + percent + "\u00a0%").join(", ");
}

/** One share set, the others scaled so that all sum to 1 again. */
export function withShare(shares, index, share) {
  const others = shares.reduce((sum, value, n) => (n === index ? sum : sum + value), 0);
  const rest = 1 - share;
  return shares.map((value, n) => {
    if (n === index) return share;
    return others > 0 ? (value / others) * rest : rest / (shares.length - 1);
  });
}

export const distance = (a, b) => Math.hypot(...a.map((value, n) => value - b[n]));

/** Named balances to begin with. */
export function presets(names) {
  const ends = names.map((name, n) => ({label: "Only " + name, shares: only(names.length, n)}));
  const middle = {label: "Even", shares: even(names.length)};
  if (names.length !== 2) return [...ends, middle];
  const mostly = names.map((name, n) => ({label: "Mostly " + name, shares: n === 0 ? [0.9, 0.1] : [0.1, 0.9]}));
  return [ends[0], mostly[0], middle, mostly[1], ends[1]];
}
