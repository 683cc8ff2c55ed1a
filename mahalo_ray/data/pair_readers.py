"""Preference pairs in the formats people have, as our records.

trl            `prompt`, `chosen`, `rejected` as TRL takes them: text, or lists of messages, whose completions
               may repeat the prompt; without `prompt`, it is what both conversations begin with. ShareGPT's
               `conversations` in place of `prompt` and single messages as answers, too
mahalo         `question`, `chosen`, `rejected` as in the MAHALO code: the question is a text of turns, each
               opened by `Student:`, `Assistant:` (or User, Human, Tutor, Teacher) at its beginning or after a
               blank line
hh_rlhf        `chosen` and `rejected` are whole conversations as text, opened by `Human:` and `Assistant:`;
               they differ in the last answer
hhh            BIG-bench's HHH alignment: `input` and `targets` with `choices` and `labels` (1: the better)
ultrafeedback  `instruction` and rated `completions`: the best answer by `aspect` against the worst
helpsteer      `prompt`, `response` and ratings: rows of one prompt that follow each other are compared
records        pairs that this project wrote (Parquet of `PreferencePair`): taken as they are, token ids too

All but the last may have `id`, `dialogue` (else pairs whose conversations open alike count as one dialogue,
which a held-out split keeps together), `weight` and `margin` of the loss, and scores: `chosen_score` or
`score_chosen`, `rejected_score` or `score_rejected`, in the row or its `metadata`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mahalo_ray.data.records import Message, PreferencePair
from mahalo_ray.data.row_fields import (
    Row,
    RowError,
    as_name,
    get_id,
    get_list,
    get_text,
    make_record,
    opening,
    parse_messages,
    parse_prompt,
    require,
    show,
    split_turns,
    to_finite,
)
from mahalo_ray.data.rows import Place, ReadRecords, RowLeftOut, use_rows


@dataclass
class ReadPairs(ReadRecords[PreferencePair]):
    """Pairs of one or several sources. `left_out`: rows of objectives that were not asked for, by
    objective."""

    left_out: dict[str, int] = field(default_factory=dict)

    @property
    def pairs(self) -> list[PreferencePair]:
        """The pairs that were kept."""
        return self.kept


def read_pairs(
    path: str,
    row_format: str,
    objectives: Sequence[str],
    objective: str | None,
    objective_field: str | None,
    name: str,
    into: ReadPairs,
    *,
    aspect: str | None = None,
) -> None:
    """Add the pairs of a file or folder to `into`; rows that are none become its `bad` rows.

    `row_format`: a name above, or "auto" (by the fields of each row). One of `objective` (of all rows) and
    `objective_field` (which field of a row names it) is given; rows of objectives outside `objectives` are
    left out and counted, as are rated answers that do not differ in the `aspect`. A pair without an `id` gets
    "name/file:line". ValueError when there is nothing to read.
    """
    assert (objective is None) != (objective_field is None)
    parser = PairParser(row_format, aspect)

    def use(row: Row, place: Place) -> None:
        of_row = objective or get_text(row, str(objective_field))
        if of_row not in objectives:
            into.left_out[of_row] = into.left_out.get(of_row, 0) + 1
            raise RowLeftOut(f"objective {show(of_row)}")
        into.add(parser.parse(row, of_row, f"{name}/{place}", path), place, name)

    use_rows(path, use, into.report)


@dataclass(frozen=True)
class ParsedPair:
    """A pair as its format gives it: nothing is checked yet."""

    prompt: list[Message]
    chosen: str
    rejected: str
    scores: tuple[float, float] | None = None  # of chosen and rejected, where the format itself has them


def pair_format_of(row: Row) -> str:
    """The format of a row of pairs, by its fields; RowError if it is of none."""
    if "chosen_ids" in row:
        return "records"
    if isinstance(row.get("completions"), list) and "instruction" in row:
        return "ultrafeedback"
    if isinstance(row.get("response"), str) and "prompt" in row and "chosen" not in row:
        return "helpsteer"
    if isinstance(row.get("targets"), Mapping) and "input" in row:
        return "hhh"
    if "question" in row:
        return "mahalo"
    transcripts = [row.get(name) for name in ("chosen", "rejected")]
    if row.get("prompt") is None and all(isinstance(t, str) and _HH_TURN.match(t) for t in transcripts):
        return "hh_rlhf"
    return "trl"


class PairParser:
    """Rows of one source as pairs, one after the other: a format may compare a row with the row before."""

    def __init__(self, row_format: str = "auto", aspect: str | None = None) -> None:
        self._format, self._aspect = row_format, aspect
        self._before: Row | None = None

    def parse(self, row: Row, objective: str, default_id: str, source: str) -> PreferencePair:
        """The pair of a row; RowError if it is none, RowLeftOut where rated answers give none."""
        row_format = pair_format_of(row) if self._format == "auto" else self._format
        before, self._before = self._before, row
        if row_format == "records":
            return _record(row, objective)
        if row_format == "ultrafeedback":
            choice = _ultrafeedback(row, self._aspect)
        elif row_format == "helpsteer":
            choice = _helpsteer(row, before, self._aspect)
        else:
            choice = _FORMATS[row_format](row)
        return _checked(row, choice, objective, default_id, source)


def _checked(row: Row, choice: ParsedPair, objective: str, default_id: str, source: str) -> PreferencePair:
    prompt, chosen, rejected = choice.prompt, choice.chosen, choice.rejected
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        if not text.strip():
            raise RowError(f"'{name}' is empty")
    if chosen == rejected:
        raise RowError("'chosen' and 'rejected' are the same")
    if not prompt or not any(message.content.strip() for message in prompt):
        raise RowError("the prompt is empty")
    metadata = row.get("metadata")
    places = [row, metadata] if isinstance(metadata, Mapping) else [row]
    extra = {name: to_finite(row[name], name) for name in ("weight", "margin") if row.get(name) is not None}
    scores = choice.scores or (_score(places, "chosen"), _score(places, "rejected"))
    return make_record(
        PreferencePair,
        dialogue=opening(prompt) if row.get("dialogue") is None else as_name(row["dialogue"], "dialogue"),
        id=get_id(row, default_id),
        objective=objective,
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        chosen_score=scores[0],
        rejected_score=scores[1],
        source=source,
        **extra,
    )


def _record(row: Row, objective: str) -> PreferencePair:
    """A row of `PreferencePair`'s own schema; Arrow's maps come as lists of (key, value)."""
    maps = {name: _as_dict(row[name]) for name in ("chosen_scores", "rejected_scores") if row.get(name)}
    return make_record(PreferencePair, **{**row, **maps, "objective": objective})


def _as_dict(value: Any) -> Any:
    pairs = isinstance(value, list) and all(isinstance(item, tuple) and len(item) == 2 for item in value)
    return dict(value) if pairs else value


def _trl(row: Row) -> ParsedPair:
    answers = [require(row, name) for name in ("chosen", "rejected")]
    if all(isinstance(answer, str) for answer in answers):
        return ParsedPair(parse_prompt(require(row, "prompt")), answers[0], answers[1])
    chosen, rejected = (parse_messages([a] if isinstance(a, Mapping) else a) for a in answers)
    prompt = row.get("conversations") if row.get("prompt") is None else row["prompt"]
    if prompt is None:
        both = zip(chosen, rejected, strict=False)
        messages = [a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], both)]
    else:
        messages = parse_prompt(prompt)
    return ParsedPair(messages, _reply(messages, chosen, "chosen"), _reply(messages, rejected, "rejected"))


def _reply(prompt: list[Message], conversation: list[Message], name: str) -> str:
    """The one assistant message that follows the prompt, whether or not the conversation repeats it."""
    rest = conversation[len(prompt) :] if conversation[: len(prompt)] == prompt else conversation
    if len(rest) != 1 or rest[0].role != "assistant":
        raise RowError(f"'{name}' must end the prompt with exactly one assistant message")
    return rest[0].content


def _mahalo(row: Row) -> ParsedPair:
    return ParsedPair(
        split_turns(get_text(row, "question")), get_text(row, "chosen"), get_text(row, "rejected")
    )


def _hh_rlhf(row: Row) -> ParsedPair:
    """Anthropic's HH-RLHF: two transcripts; what both say before their last answer is the prompt."""
    chosen, rejected = (_transcript(get_text(row, name), name) for name in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise RowError("'chosen' and 'rejected' differ before their last answer")
    return ParsedPair(chosen[:-1], chosen[-1].content, rejected[-1].content)


def _transcript(text: str, name: str) -> list[Message]:
    opening_text, *parts = _HH_TURN.split(text)
    if opening_text.strip() or not parts:
        raise RowError(f"'{name}' does not open with 'Human:'")
    turns = zip(parts[::2], parts[1::2], strict=True)
    messages = [
        Message(role="user" if speaker == "Human" else "assistant", content=said.strip())
        for speaker, said in turns
    ]
    if len(messages) < 2 or messages[-1].role != "assistant":
        raise RowError(f"'{name}' does not end with an answer of the assistant")
    return messages


def _hhh(row: Row) -> ParsedPair:
    """BIG-bench's HHH alignment: the first choice with label 1 against the first with label 0."""
    targets = dict(require(row, "targets"))
    choices, labels = get_list(targets, "choices"), get_list(targets, "labels")
    if len(choices) != len(labels) or {0, 1} - set(labels) or not all(isinstance(c, str) for c in choices):
        raise RowError(
            f"'targets' has {len(choices)} choices with labels {show(labels, 40)}: one of each of 1, 0"
        )
    chosen, rejected = (choices[labels.index(label)] for label in (1, 0))
    return ParsedPair(split_turns(get_text(row, "input")), chosen, rejected)


def _ultrafeedback(row: Row, aspect: str | None) -> ParsedPair:
    """UltraFeedback: the best completion by the aspect's rating against the worst, the first among equals."""
    aspect = _given(aspect, "a row of UltraFeedback")
    rated = []
    for number, completion in enumerate(get_list(row, "completions"), start=1):
        if not isinstance(completion, Mapping):
            raise RowError(f"completion {number} is {type(completion).__name__}, not an object")
        annotations = completion.get("annotations")
        judged = annotations.get(aspect) if isinstance(annotations, Mapping) else None
        rating = judged.get("Rating") if isinstance(judged, Mapping) else completion.get(f"{aspect}_score")
        if rating is not None and rating != "N/A":
            rated.append((_rating(rating, aspect), get_text(dict(completion), "response")))
    if not rated:
        raise RowError(f"no completion is rated for '{aspect}'")
    best, worst = max(rated, key=lambda item: item[0]), min(rated, key=lambda item: item[0])
    if best[0] == worst[0]:
        raise RowLeftOut(f"no two answers differ in '{aspect}'")
    return ParsedPair(parse_prompt(require(row, "instruction")), best[1], worst[1], (best[0], worst[0]))


def _helpsteer(row: Row, before: Row | None, aspect: str | None) -> ParsedPair:
    """HelpSteer: an answer against the answer to the same prompt in the row before."""
    aspect = _given(aspect, "a row of HelpSteer")
    rating, answer = _rating(require(row, aspect), aspect), get_text(row, "response")
    if before is None or before.get("prompt") != require(row, "prompt"):
        raise RowLeftOut("the first answer to its prompt: the row after it is compared with it")
    other = (_rating(require(before, aspect), aspect), get_text(before, "response"))
    if other[0] == rating:
        raise RowLeftOut(f"no two answers differ in '{aspect}'")
    best, worst = sorted([(rating, answer), other], key=lambda item: -item[0])
    return ParsedPair(parse_prompt(row["prompt"]), best[1], worst[1], (best[0], worst[0]))


def _given(aspect: str | None, what: str) -> str:
    if aspect is None:
        raise RowError(f"{what} has ratings of several aspects: say which decides ('aspect')")
    return aspect


def _rating(value: Any, aspect: str) -> float:
    """A rating as a number; UltraFeedback writes some as text."""
    try:
        return to_finite(float(value) if isinstance(value, str) else value, aspect)
    except ValueError as error:
        raise RowError(f"the rating of '{aspect}' is {show(value)}, not a number") from error


_HH_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
_FORMATS: dict[str, Callable[[Row], ParsedPair]] = {
    "trl": _trl,
    "mahalo": _mahalo,
    "hh_rlhf": _hh_rlhf,
    "hhh": _hhh,
}


def _score(places: Sequence[Mapping[str, Any]], answer: str) -> float | None:
    """`chosen_score` or `score_chosen`, of the row or its metadata."""
    for place in places:
        for name in (f"{answer}_score", f"score_{answer}"):
            value = place.get(name)
            if value is not None:
                return to_finite(value, name)
    return None
