"""Step traces in the formats people have, as our records.

trl                `prompt`, `completions`, `labels` as TRL's PRM trainer takes them
mahalo             `question` (a text of turns), `response_steps`, `step_value` as in the MAHALO code
processbench       `problem`, `steps`, `label`: the first wrong step, -1 for none (steps after it: unknown)
prm800k            PRM800K: `question` and `label`, whose steps have rated completions (0 counts as right)
math_shepherd      Math-Shepherd: `input`, whose steps end with a mark, and `label` with + or - in its place
big_bench_mistake  `input`, `steps`, `mistake_index`: the same, null for none
model_solutions    `question` and several fields with a `solution` and whether it `is_correct`
mathdial           MathDial: every teacher turn with what was said before, and whether the student solved it
conversation       steps as user messages, each answered by + or -
rated              a dialogue (`messages`, a `question` of turns, or prompt and `response`) and its `rating`
steps              our own records; or prompt (`question`, `problem`) and `steps`, with `labels` or without

All may have `id`, `group` (what is compared within; else equal prompts are one group) and `dialogue`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mahalo_ray.config import OutcomeLabels
from mahalo_ray.data.prompts import reference_answer
from mahalo_ray.data.records import Message, StepTrace
from mahalo_ray.data.row_fields import (
    Row,
    RowError,
    as_name,
    digest,
    get_id,
    get_list,
    get_text,
    is_finite,
    make_record,
    opening,
    parse_messages,
    parse_prompt,
    require,
    show,
    split_turns,
)
from mahalo_ray.data.rows import BadRow, Place, ReadRecords, RowLeftOut, use_rows
from mahalo_ray.objectives import unknown_name

Labels = Mapping[str | None, Sequence[Any]]
OWN: str | None = None  # stands for the source's own objective

_EOM = "|EOM|"
_MATHDIAL_OUTCOMES = {"Yes": 1.0, "Yes, but I had to reveal the answer": 0.5, "No": 0.0}
_SIGNS = {"+": True, "-": False}
_STEP_MARK = "ки"  # of Math-Shepherd
_PROMPT_FIELDS = ("prompt", "question", "problem", "input")


@dataclass(frozen=True)
class Parsed:
    """A trace as its format gives it: nothing is checked yet. Labels
    may be missing, booleans (right or wrong) or numbers in the source's own range."""

    prompt: list[Message]
    steps: list[Any]
    labels: Labels = field(default_factory=dict)
    outcome: Mapping[str | None, Any] = field(default_factory=dict)
    answer: str | None = None
    part: str = ""  # tells traces of one row apart, in ids and reasons
    group: str | None = None
    dialogue: str | None = None
    tokens: Mapping[str, list[int]] = field(default_factory=dict)


def _trl_steps(row: Row) -> list[Parsed]:
    labels = {OWN: get_list(row, "labels")}
    return [Parsed(parse_prompt(require(row, "prompt")), get_list(row, "completions"), labels)]


def _mahalo_steps(row: Row) -> list[Parsed]:
    values = {OWN: get_list(row, "step_value")}
    return [Parsed(split_turns(get_text(row, "question")), get_list(row, "response_steps"), values)]


def _steps(row: Row) -> list[Parsed]:
    """Our own records, and plain steps without labels."""
    prompt = _asked(row)
    tokens = {
        name: row[name] for name in ("token_ids", "step_starts", "step_ends") if row.get(name) is not None
    }
    labels, outcome = _by_objective(row.get("labels")), _by_objective(row.get("outcome"))
    return [Parsed(prompt, get_list(row, "steps"), labels, outcome, reference_answer(row), tokens=tokens)]


def _by_objective(value: Any) -> Mapping[str | None, Any]:
    """Values per objective, as given; anything else is of the source's own objective."""
    if value is None:
        return {}
    return value if isinstance(value, Mapping) else {OWN: value}


def _asked(row: Row) -> list[Message]:
    """The prompt, under any of its usual names."""
    name = next((name for name in _PROMPT_FIELDS if row.get(name) is not None), "prompt")
    value = require(row, name)
    return split_turns(value) if isinstance(value, str) and value.strip() else parse_prompt(value)


def _processbench(row: Row) -> list[Parsed]:
    steps = get_list(row, "steps")
    labels = _first_wrong(steps, require(row, "label"), "label")
    verdict = row.get("final_answer_correct")
    return [_math(get_text(row, "problem"), steps, labels, verdict)]


def _big_bench_mistake(row: Row) -> list[Parsed]:
    steps, index = get_list(row, "steps"), row.get("mistake_index")
    labels = _first_wrong(steps, -1 if index is None else index, "mistake_index")
    verdict = None
    if row.get("answer") is not None and row.get("target") is not None:
        verdict = str(row["answer"]).strip() == str(row["target"]).strip()
    target = None if row.get("target") is None else str(row["target"])
    return [_math(get_text(row, "input"), steps, labels, verdict, target)]


def _prm800k(row: Row) -> list[Parsed]:
    """The chosen completion of every step, rated 1 or 0 (right) or -1 (wrong). Where none was chosen, a
    person's own completion, or else the first one, stands for the step."""
    question, label = (require(row, name) for name in ("question", "label"))
    if not isinstance(question, Mapping) or not isinstance(label, Mapping):
        raise RowError("'question' and 'label' must be objects")
    steps, signs = [], list[bool | None]()
    for number, step in enumerate(get_list(dict(label), "steps"), start=1):
        if not isinstance(step, Mapping):
            raise RowError(f"step {number} is {type(step).__name__}, not an object")
        completions, chosen = step.get("completions") or [], step.get("chosen_completion")
        written = step.get("human_completion")
        if chosen is None and written is not None:
            completion = (
                {"rating": 1, **written} if isinstance(written, Mapping) else {"text": written, "rating": 1}
            )
        else:
            number_chosen = 0 if chosen is None else chosen
            if not isinstance(number_chosen, int) or not 0 <= number_chosen < len(completions):
                raise RowError(
                    f"step {number} has {len(completions)} completions, and {show(chosen)} is chosen"
                )
            completion = completions[number_chosen]
        rating = completion.get("rating") if isinstance(completion, Mapping) else None
        if not isinstance(completion, Mapping) or rating not in (None, 1, 0, -1):
            raise RowError(f"step {number} is rated {show(rating)}: known are 1, 0, -1")
        steps.append(completion.get("text"))
        signs.append(None if rating is None else rating >= 0)
    answer = question.get("ground_truth_answer")
    return [
        Parsed(
            parse_prompt(get_text(dict(question), "problem")),
            steps,
            {OWN: signs},
            answer=None if answer is None else str(answer),
        )
    ]


def _math_shepherd(row: Row) -> list[Parsed]:
    """`label` is `input` with a sign in place of every mark. What comes before "Step 1:" is the question."""
    marked, signed = get_text(row, "input"), get_text(row, "label")
    question, first, _ = marked.partition("Step 1:")
    if not first or not question.strip():
        raise RowError("'input' has no 'Step 1:' after a question")
    *pieces, rest = marked.split(_STEP_MARK)
    if rest.strip() or not pieces:
        raise RowError(f"a step of 'input' does not end with the mark '{_STEP_MARK}'")
    signs, at = [], 0
    for number, piece in enumerate(pieces, start=1):
        at += len(piece)
        sign = signed[at : at + 1]
        if sign not in _SIGNS or signed[at - len(piece) : at] != piece:
            raise RowError(f"'label' does not repeat 'input' with + or - at the end of step {number}")
        signs.append(_SIGNS[sign])
        at += 1
    steps = [pieces[0].removeprefix(question).strip(), *(piece.strip() for piece in pieces[1:])]
    return [Parsed(parse_prompt(question.strip()), steps, {OWN: signs})]


def _math(
    problem: str, steps: list[Any], labels: Sequence[Any], verdict: Any, answer: str | None = None
) -> Parsed:
    outcome = {} if verdict is None else {OWN: verdict}
    return Parsed(parse_prompt(problem), steps, {OWN: labels}, outcome, answer)


def _first_wrong(steps: Sequence[Any], index: Any, name: str) -> list[bool | None]:
    """Right before the first wrong step, wrong there, unknown after it."""
    if isinstance(index, bool) or not isinstance(index, int) or not -1 <= index < len(steps):
        raise RowError(
            f"'{name}' is {show(index)}: it must be a step's number (0 to {len(steps) - 1}), or say none"
        )
    if index == -1:
        return [True] * len(steps)
    return [*([True] * index), False, *([None] * (len(steps) - index - 1))]


def _model_solutions(row: Row) -> list[Parsed]:
    """GSM8K's example model solutions: fields with a solution and whether its answer is right."""
    problem, answer = get_text(row, "question"), reference_answer(row)
    found = []
    for name, solution in row.items():
        if _is_solution(solution):
            steps = [line for line in get_text(solution, "solution").split("\n") if line.strip()]
            outcome = {OWN: solution["is_correct"]}
            found.append(Parsed(parse_prompt(problem), steps, {}, outcome, answer, part=name))
    return found


def _is_solution(value: Any) -> bool:
    return isinstance(value, Mapping) and value.get("is_correct") is not None


def _mathdial(row: Row) -> list[Parsed]:
    """One trace per teacher turn: what was said before is the prompt, whether the student came to solve the
    problem is the outcome (1, 0.5 if the teacher had to reveal the answer, 0)."""
    verdict = require(row, "self-correctness")
    if not isinstance(verdict, str) or verdict not in _MATHDIAL_OUTCOMES:
        raise RowError(f"'self-correctness' is {show(verdict)}: known are {', '.join(_MATHDIAL_OUTCOMES)}")
    problem = get_text(row, "question")
    if row.get("student_incorrect_solution") is not None:
        problem += f"\n\n{get_text(row, 'student_incorrect_solution')}"
    said = [Message(role="user", content=problem), *_mathdial_turns(get_text(row, "conversation"))]
    conversation = _merged(said)
    dialogue = digest(conversation[:1]) if row.get("qid") is None else as_name(row["qid"], "qid")
    return [
        Parsed(
            conversation[:at],
            [message.content],
            {},
            {OWN: _MATHDIAL_OUTCOMES[verdict]},
            part=f"turn {at // 2 + 1}",
            dialogue=dialogue,
        )
        for at, message in enumerate(conversation)
        if message.role == "assistant"
    ]


def _mathdial_turns(conversation: str) -> list[Message]:
    found = []
    for turn in conversation.split(_EOM):
        speaker, colon, said = turn.strip().partition(":")
        if not colon:
            raise RowError(f"a turn of 'conversation' names no speaker: {turn[:40]!r}")
        teacher = speaker.strip() == "Teacher"
        said = re.sub(r"^\s*\([a-z]+\)", "", said) if teacher else said  # the teacher's move
        found.append(Message(role="assistant" if teacher else "user", content=said.strip()))
    return found


def _merged(conversation: Sequence[Message]) -> list[Message]:
    """Turns in a row by one speaker as one message: chat templates want them to alternate."""
    merged: list[Message] = []
    for message in conversation:
        if not message.content:
            continue
        if merged and merged[-1].role == message.role:
            both = f"{merged[-1].content}\n\n{message.content}"
            merged[-1] = Message(role=message.role, content=both)
        else:
            merged.append(message)
    return merged


def _conversation(row: Row) -> list[Parsed]:
    """Steps as user messages, each answered by + or -. The question is a field of its own, a message of its
    own, or what stands before "Step 1" in the first message."""
    name = "conversation" if row.get("conversation") is not None else "conversations"
    said = parse_messages(get_list(row, name))
    question = next((get_text(row, name) for name in _PROMPT_FIELDS if row.get(name) is not None), None)
    opened = question is None and len(said) > 1 and said[1].content.strip() not in _SIGNS
    if opened:
        question, said = said[0].content, said[1:]
    steps, signs = said[::2], [message.content.strip() for message in said[1::2]]
    unknown = next((sign for sign in signs if sign not in _SIGNS), None)
    if unknown is not None or not steps:
        raise RowError(f"'{name}' must have a step and its sign (+ or -) in turn, not {str(unknown)[:40]!r}")
    first = steps[0].content
    if question is None:
        question, marker, rest = first.partition("Step 1")
        if not marker or not question.strip():
            raise RowError(
                f"'{name}' opens with question and step in one message, and no 'Step 1' parts them"
            )
        first = marker + rest
    texts = [first.removeprefix(question).strip(), *(message.content for message in steps[1:])]
    return [Parsed(parse_prompt(question.strip()), texts, {OWN: [_SIGNS[sign] for sign in signs]})]


def _rated(row: Row) -> list[Parsed]:
    """A dialogue that people rated: its last assistant message is the step, what comes after it is left out.

    `messages`, `question` with turns, or prompt and `response`; `rating` or `ratings` per objective, in the
    row or its metadata.
    """
    metadata = row.get("metadata")
    rated = {**metadata, **row} if isinstance(metadata, Mapping) else row
    ratings = rated.get("ratings")
    if ratings is not None and not isinstance(ratings, Mapping):
        raise RowError(f"'ratings' is {type(ratings).__name__}: numbers per objective are wanted")
    outcome = {OWN: require(rated, "rating")} if ratings is None else dict(ratings)
    if row.get("response") is not None:
        said = (
            split_turns(get_text(row, "question"))
            if "question" in row
            else parse_prompt(require(row, "prompt"))
        )
        said = [*said, Message(role="assistant", content=get_text(row, "response"))]
    else:
        said = (
            parse_messages(row["messages"]) if "messages" in row else split_turns(get_text(row, "question"))
        )
    last = next((at for at in reversed(range(len(said))) if said[at].role == "assistant"), 0)
    if last == 0:
        raise RowError("no assistant message follows a message of the user")
    return [Parsed(said[:last], [said[last].content], {}, outcome)]


def _question_of(row: Row) -> list[Message]:
    return split_turns(get_text(row, "question"))


FORMATS: dict[str, Callable[[Row], list[Parsed]]] = {
    "trl": _trl_steps,
    "mahalo": _mahalo_steps,
    "processbench": _processbench,
    "prm800k": _prm800k,
    "math_shepherd": _math_shepherd,
    "big_bench_mistake": _big_bench_mistake,
    "model_solutions": _model_solutions,
    "mathdial": _mathdial,
    "conversation": _conversation,
    "rated": _rated,
    "steps": _steps,
}

# By which fields a row shows its format, the most telling first.
_SIGNATURES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("trl", ("completions", "labels")),
    ("mahalo", ("response_steps", "step_value")),
    ("processbench", ("problem", "steps", "label")),
    ("big_bench_mistake", ("input", "steps", "mistake_index")),
    ("mathdial", ("conversation", "self-correctness")),
    ("conversation", ("conversation",)),
    ("conversation", ("conversations",)),
    ("steps", ("steps",)),
    ("rated", ("rating",)),
    ("rated", ("ratings",)),
)


def format_of(row: Row) -> str:
    """The format of a row, by its fields."""
    for name, fields in _SIGNATURES:
        if all(field in row for field in fields):
            return name
    if isinstance(row.get("label"), Mapping) and isinstance(row.get("question"), Mapping):
        return "prm800k"
    if isinstance(row.get("label"), str) and _STEP_MARK in str(row.get("input")):
        return "math_shepherd"
    if any(_is_solution(value) for value in row.values()):
        return "model_solutions"
    if isinstance(row.get("metadata"), Mapping) and {"rating", "ratings"} & set(row["metadata"]):
        return "rated"
    names = show(", ".join(row), 200)[1:-1]
    raise RowError(f"its fields ({names}) are those of no known format: {', '.join(FORMATS)}")


@dataclass
class ReadTraces(ReadRecords[StepTrace]):
    """Traces of one or several sources. A row may hold several; a RowError raised by `take` makes one
    unusable, and a RowLeftOut leaves it out."""

    traces_left_out: int = 0

    @property
    def traces(self) -> list[StepTrace]:
        """The traces that were kept."""
        return self.kept

    @property
    def seen(self) -> int:
        """Traces that were taken, left out or unusable: what a share of bad rows is a share of."""
        return self.taken + self.traces_left_out + len(self.bad)


@dataclass(frozen=True)
class _Mapping:
    """How labels of a source become labels of objectives."""

    objectives: Sequence[str]
    objective: str | None
    objective_field: str | None
    label_range: tuple[float, float]
    outcome_labels: OutcomeLabels
    gamma: float
    with_labels: bool


def read_traces(
    path: str,
    row_format: str,
    objectives: Sequence[str],
    objective: str | None,
    objective_field: str | None,
    name: str,
    into: ReadTraces,
    *,
    label_range: tuple[float, float] = (0.0, 1.0),
    outcome_labels: OutcomeLabels = "last",
    gamma: float = 1.0,
    with_labels: bool = True,
) -> None:
    """Add the traces of a file, folder or hub data set to `into`; rows that are none become its `bad` rows.

    `row_format`: "auto" (by the fields of each row) or a name above. Labels that name no objective of their
    own are of `objective`, or of the one that the row's `objective_field` names; one that is not among
    `objectives` is a bad row. Numbers must lie in `label_range`, which is mapped to 0..1. Where a format
    knows the outcome only, it becomes the label of the last step, or with `outcome_labels` "all" that of
    every step t of n, as gamma^(n-t) * outcome (one rollout of the step's value). `with_labels` False reads
    neither. A trace without an `id` gets "name/file:line". ValueError when there is nothing to read.
    """
    assert objective is None or objective_field is None
    if row_format != "auto" and row_format not in FORMATS:
        raise ValueError(unknown_name("format of steps", row_format, ("auto", *FORMATS)))
    mapping = _Mapping(
        objectives, objective, objective_field, label_range, outcome_labels, gamma, with_labels
    )

    def use(row: Row, place: Place) -> None:
        usable, errors = 0, list[RowError]()
        left_out: RowLeftOut | None = None
        for parsed in FORMATS[format_of(row) if row_format == "auto" else row_format](row):
            try:
                into.add(_trace(row, parsed, mapping, f"{name}/{place}", path), place, name)
                usable += 1
            except RowLeftOut as reason:
                left_out = reason
                into.traces_left_out += 1
            except RowError as error:
                errors.append(RowError(f"{parsed.part}: {error}") if parsed.part else error)
        # Of a row that gives nothing the last error is raised, and counted where it is caught.
        counted = errors if usable or left_out else errors[:-1]
        into.report.bad += [BadRow.of(place.file, place.line, str(error), row) for error in counted]
        if not usable:
            raise left_out or (errors[-1] if errors else RowError("it holds no step"))

    use_rows(path, use, into.report)


def _trace(row: Row, parsed: Parsed, mapping: _Mapping, default_id: str, source: str) -> StepTrace:
    _check_steps(parsed.steps)
    if not mapping.with_labels:
        parsed = replace(parsed, labels={}, outcome={})
    outcome = {
        _objective(row, name, mapping): _label(value, "the outcome", mapping.label_range)
        for name, value in parsed.outcome.items()
        if value is not None
    }
    labels = {
        _objective(row, name, mapping): _labels(values, len(parsed.steps), mapping.label_range)
        for name, values in parsed.labels.items()
        if values is not None
    } or _labels_from_outcome(outcome, len(parsed.steps), mapping)
    own_id = get_id(row, default_id)
    dialogue = parsed.dialogue if row.get("dialogue") is None else as_name(row["dialogue"], "dialogue")
    if dialogue is None and len(parsed.prompt) > 1:
        dialogue = opening(parsed.prompt)
    return make_record(
        StepTrace,
        id=f"{own_id}/{parsed.part}" if parsed.part else own_id,
        group=as_name(row.get("group") or parsed.group or digest(parsed.prompt), "group"),
        prompt=parsed.prompt,
        steps=parsed.steps,
        labels=labels,
        outcome=outcome or None,
        source=source,
        dialogue=dialogue,
        answer=parsed.answer,
        **_tokens(parsed),
    )


def _check_steps(steps: Sequence[Any]) -> None:
    if not steps:
        raise RowError("there are no steps")
    for number, step in enumerate(steps, start=1):
        if not isinstance(step, str):
            raise RowError(f"step {number} is {type(step).__name__}, not text")
        if not step.strip():
            raise RowError(f"step {number} is empty")


def _labels_from_outcome(
    outcome: Mapping[str, float], steps: int, mapping: _Mapping
) -> dict[str, list[float | None]]:
    unknown: list[float | None] = [None] * (steps - 1)
    if mapping.outcome_labels == "last":
        return {name: [*unknown, z] for name, z in outcome.items()}
    discounts = [mapping.gamma ** (steps - t) for t in range(1, steps + 1)]
    return {name: [discount * z for discount in discounts] for name, z in outcome.items()}


def _objective(row: Row, name: str | None, mapping: _Mapping) -> str:
    if name is None:
        name = mapping.objective
        if mapping.objective_field is not None:
            name = get_text(row, mapping.objective_field)
        if name is None:
            raise RowError("its labels name no objective: say which ('objective' or 'objective_field')")
    if not isinstance(name, str) or name not in mapping.objectives:
        raise RowError(unknown_name("objective", as_name(name, "objective")[:80], mapping.objectives))
    return name


def _labels(values: Any, steps: int, label_range: tuple[float, float]) -> list[float | None]:
    if not isinstance(values, list):
        raise RowError(f"its labels are {type(values).__name__}, not a list")
    check_count(values, steps)
    return [
        None if value is None else _label(value, f"the label of step {number}", label_range)
        for number, value in enumerate(values, start=1)
    ]


def check_count(labels: Sequence[Any], steps: int) -> None:
    """RowError unless every step has a label."""
    if len(labels) != steps:
        raise RowError(f"{steps} steps, but {len(labels)} labels")


def _label(value: Any, what: str, label_range: tuple[float, float]) -> float:
    """In 0..1: a boolean as it is, a number from its place in the range."""
    if isinstance(value, bool):
        return float(value)
    low, high = label_range
    if not is_finite(value) or not low <= value <= high:
        raise RowError(f"{what} is {show(value)}: it must be a number from {low:g} to {high:g}")
    return (value - low) / (high - low)


def _tokens(parsed: Parsed) -> Mapping[str, Any]:
    """Token positions of our own records: all three fields or none."""
    if not parsed.tokens:
        return {}
    positions = [parsed.tokens.get(name) for name in ("step_starts", "step_ends")]
    if "token_ids" not in parsed.tokens or any(
        not isinstance(p, list) or len(p) != len(parsed.steps) for p in positions
    ):
        raise RowError(
            "'token_ids', 'step_starts' and 'step_ends' belong together, one position of each per step"
        )
    return parsed.tokens
