// Which words of answers to the same question differ.

const LONGEST = 1500; // words of one answer; the comparison takes time in the product of two lengths

/** The pieces of a text: words, numbers, single signs and the white space between them. */
export const pieces = (text) => text.match(/\s+|[\p{L}\p{N}_]+(?:['\u2019][\p{L}]+)*|[^\s\p{L}\p{N}_]/gu) ?? [];

/** For words `a` and `b`: which words of `a` belong to a longest common subsequence of both. */
function common(a, b) {
  const width = b.length + 1;
  const lengths = new Uint16Array((a.length + 1) * width);
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      lengths[i * width + j] = a[i] === b[j]
        ? lengths[(i + 1) * width + j + 1] + 1
        : Math.max(lengths[(i + 1) * width + j], lengths[i * width + j + 1]);
    }
  }
  const shared = new Array(a.length).fill(false);
  for (let i = 0, j = 0; i < a.length && j < b.length;) {
    if (a[i] === b[j]) {
      shared[i] = true;
      i++, j++;
    } else if (lengths[(i + 1) * width + j] >= lengths[i * width + j + 1]) i++;
    else j++;
  }
  return shared;
}

/**
 * Mark what differs between texts. Returns for each text a list of {text, differs}; a word differs unless all
 * the other texts have it in the same order. `shared`: the part of all words that they have in common, 0 to 1.
 */
export function differences(texts) {
  const split = texts.map(pieces);
  const words = split.map((parts) => parts.filter((part) => part.trim()));
  if (words.some((list) => list.length > LONGEST)) return {marked: null, shared: null};
  let total = 0, same = 0;
  const marked = split.map((parts, k) => {
    const shared = words.map((other, n) => n === k ? null : common(words[k], other)).filter(Boolean);
    let position = 0;
    const runs = [];
    for (const part of parts) {
      const isWord = Boolean(part.trim());
      const differs = isWord ? shared.some((flags) => !flags[position]) : null;
      if (isWord) {
        position++;
        total++;
        same += differs ? 0 : 1;
      }
      runs.push({text: part, differs});
    }
    // White space belongs to a difference when both of its neighbours do.
    runs.forEach((run, n) => {
      if (run.differs === null) run.differs = Boolean(runs[n - 1]?.differs && runs[n + 1]?.differs);
    });
    return joined(runs);
  });
  return {marked, shared: total ? same / total : 1};
}

function joined(runs) {
  const result = [];
  for (const run of runs) {
    if (result.at(-1)?.differs === run.differs) result.at(-1).text += run.text;
    else result.push({...run});
  }
  return result;
}
