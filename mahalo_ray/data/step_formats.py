"""One function per format of step data: a row becomes what its traces hold. See `step_readers`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mahalo_ray.data.records import Message
from mahalo_ray.data.row_fields import (
    Refused,
    digest,
    list_of,
    messages_of,
    prompt_of,
    required,
    text_of,
    turns,
)
from mahalo_ray.data.row_files import Row

Labels = Mapping[str | None, Sequence[Any]]
OWN: str | None = None  # stands for the source's own objective

_EOM = "|EOM|"
_MATHDIAL_OUTCOMES = {"Yes": 1.0, "Yes, but I had to reveal the answer": 0.5, "No": 0.0}
_SIGNS = {"+": True, "-": False}
_PROMPT_FIELDS = ("prompt", "question", "problem", "input")
_ANSWER_FIELDS = ("answer", "ground_truth", "target", "solution")


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


def _trl(row: Row) -> list[Parsed]:
    labels = {OWN: list_of(row, "labels")}
    return [Parsed(prompt_of(required(row, "prompt")), list_of(row, "completions"), labels)]


def _mahalo(row: Row) -> list[Parsed]:
    values = {OWN: list_of(row, "step_value")}
    return [Parsed(turns(text_of(row, "question")), list_of(row, "response_steps"), values)]


def _steps(row: Row) -> list[Parsed]:
    """Our own records, and plain steps without labels."""
    prompt = asked(row)
    tokens = {
        name: row[name] for name in ("token_ids", "step_starts", "step_ends") if row.get(name) is not None
    }
    labels, outcome = _by_objective(row.get("labels")), _by_objective(row.get("outcome"))
    return [Parsed(prompt, list_of(row, "steps"), labels, outcome, reference_answer(row), tokens=tokens)]


def _by_objective(value: Any) -> Mapping[str | None, Any]:
    """Values per objective, as given; anything else is of the source's own objective."""
    if value is None:
        return {}
    return value if isinstance(value, Mapping) else {OWN: value}


def asked(row: Row) -> list[Message]:
    """The prompt, under any of its usual names."""
    name = next((name for name in _PROMPT_FIELDS if row.get(name) is not None), "prompt")
    value = required(row, name)
    return turns(value) if isinstance(value, str) and value.strip() else prompt_of(value)


def reference_answer(row: Row) -> str | None:
    """The reference answer as text, under any of its usual names."""
    value = next((row[name] for name in _ANSWER_FIELDS if row.get(name) is not None), None)
    return None if value is None else str(value)


def _processbench(row: Row) -> list[Parsed]:
    steps = list_of(row, "steps")
    labels = _first_wrong(steps, required(row, "label"), "label")
    verdict = row.get("final_answer_correct")
    return [_math(text_of(row, "problem"), steps, labels, verdict)]


def _big_bench_mistake(row: Row) -> list[Parsed]:
    steps, index = list_of(row, "steps"), row.get("mistake_index")
    labels = _first_wrong(steps, -1 if index is None else index, "mistake_index")
    verdict = None
    if row.get("answer") is not None and row.get("target") is not None:
        verdict = str(row["answer"]).strip() == str(row["target"]).strip()
    target = None if row.get("target") is None else str(row["target"])
    return [_math(text_of(row, "input"), steps, labels, verdict, target)]


def _math(
    problem: str, steps: list[Any], labels: Sequence[Any], verdict: Any, answer: str | None = None
) -> Parsed:
    outcome = {} if verdict is None else {OWN: verdict}
    return Parsed(prompt_of(problem), steps, {OWN: labels}, outcome, answer)


def _first_wrong(steps: Sequence[Any], index: Any, name: str) -> list[bool | None]:
    """Right before the first wrong step, wrong there, unknown after it."""
    if isinstance(index, bool) or not isinstance(index, int) or not -1 <= index < len(steps):
        raise Refused(
            f"'{name}' is {index!r}: it must be a step's number (0 to {len(steps) - 1}), or say none"
        )
    if index == -1:
        return [True] * len(steps)
    return [*([True] * index), False, *([None] * (len(steps) - index - 1))]


def _model_solutions(row: Row) -> list[Parsed]:
    """GSM8K's example model solutions: fields with a solution and whether its answer is right."""
    problem, answer = text_of(row, "question"), reference_answer(row)
    found = []
    for name, solution in row.items():
        if _is_solution(solution):
            steps = [line for line in text_of(solution, "solution").split("\n") if line.strip()]
            outcome = {OWN: solution["is_correct"]}
            found.append(Parsed(prompt_of(problem), steps, {}, outcome, answer, part=name))
    return found


def _is_solution(value: Any) -> bool:
    return isinstance(value, Mapping) and value.get("is_correct") is not None


def _mathdial(row: Row) -> list[Parsed]:
    """One trace per teacher turn: what was said before is the prompt, whether the student came to solve the
    problem is the outcome (1, 0.5 if the teacher had to reveal the answer, 0)."""
    verdict = required(row, "self-correctness")
    if verdict not in _MATHDIAL_OUTCOMES:
        raise Refused(f"'self-correctness' is {verdict!r}: known are {', '.join(_MATHDIAL_OUTCOMES)}")
    problem = text_of(row, "question")
    if row.get("student_incorrect_solution") is not None:
        problem += f"\n\n{text_of(row, 'student_incorrect_solution')}"
    said = [Message(role="user", content=problem), *_mathdial_turns(text_of(row, "conversation"))]
    conversation = _merged(said)
    dialogue = digest(conversation[:1]) if row.get("qid") is None else str(row["qid"])
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
            raise Refused(f"a turn of 'conversation' names no speaker: {turn[:40]!r}")
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
    said = messages_of([_plain(message) for message in list_of(row, name)])
    question = next((text_of(row, name) for name in _PROMPT_FIELDS if row.get(name) is not None), None)
    opened = question is None and len(said) > 1 and said[1].content.strip() not in _SIGNS
    if opened:
        question, said = said[0].content, said[1:]
    steps, signs = said[::2], [message.content.strip() for message in said[1::2]]
    unknown = next((sign for sign in signs if sign not in _SIGNS), None)
    if unknown is not None or not steps:
        raise Refused(f"'{name}' must have a step and its sign (+ or -) in turn, not {str(unknown)[:40]!r}")
    first = steps[0].content
    if question is None:
        question, marker, rest = first.partition("Step 1")
        if not marker or not question.strip():
            raise Refused(f"'{name}' opens with question and step in one message, and no 'Step 1' parts them")
        first = marker + rest
    texts = [first.removeprefix(question).strip(), *(message.content for message in steps[1:])]
    return [Parsed(prompt_of(question.strip()), texts, {OWN: [_SIGNS[sign] for sign in signs]})]


def _plain(message: Any) -> Any:
    """Messages in ShareGPT's names."""
    if not isinstance(message, Mapping) or "from" not in message:
        return message
    roles = {"human": "user", "gpt": "assistant"}
    return {"role": roles.get(message["from"], message["from"]), "content": message.get("value")}


def _rated(row: Row) -> list[Parsed]:
    """A dialogue that people rated: its last assistant message is the step, what comes after it is left out.

    `messages`, `question` with turns, or prompt and `response`; `rating` or `ratings` per objective, in the
    row or its metadata.
    """
    metadata = row.get("metadata")
    rated = {**metadata, **row} if isinstance(metadata, Mapping) else row
    ratings = rated.get("ratings")
    if ratings is not None and not isinstance(ratings, Mapping):
        raise Refused(f"'ratings' is {type(ratings).__name__}: numbers per objective are wanted")
    outcome = {OWN: required(rated, "rating")} if ratings is None else dict(ratings)
    if row.get("response") is not None:
        said = turns(text_of(row, "question")) if "question" in row else prompt_of(required(row, "prompt"))
        said = [*said, Message(role="assistant", content=text_of(row, "response"))]
    else:
        said = messages_of(row["messages"]) if "messages" in row else turns(text_of(row, "question"))
    last = next((at for at in reversed(range(len(said))) if said[at].role == "assistant"), 0)
    if last == 0:
        raise Refused("no assistant message follows a message of the user")
    return [Parsed(said[:last], [said[last].content], {}, outcome)]


FORMATS: dict[str, Callable[[Row], list[Parsed]]] = {
    "trl": _trl,
    "mahalo": _mahalo,
    "processbench": _processbench,
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
    if any(_is_solution(value) for value in row.values()):
        return "model_solutions"
    if isinstance(row.get("metadata"), Mapping) and {"rating", "ratings"} & set(row["metadata"]):
        return "rated"
    raise Refused(f"its fields ({', '.join(row)}) are those of no known format: {', '.join(FORMATS)}")
