"""What dialogues are about: MathDial rows, beginnings of dialogues, a generated grid."""

from __future__ import annotations

from mahalo_ray.config.rollouts import CasesConfig, GridCases, MathDialCases, PrefixCases
from mahalo_ray.data.quarantine import BadRow, TooManyBadRows
from mahalo_ray.data.records import Message
from mahalo_ray.data.row_files import Row, use_rows
from mahalo_ray.domains.tutoring.checks import final_number
from mahalo_ray.domains.tutoring.personas import AnswerKey, Case, Misunderstanding, Task


def load_cases(config: CasesConfig) -> tuple[list[Case], list[BadRow]]:
    """All cases in their order, and the rows that cannot be used; ValueError if there is no case at all."""
    match config:
        case GridCases():
            return _grid(config), []
        case MathDialCases():
            read = _mathdial
        case PrefixCases():
            read = _prefix
    cases: list[Case] = []
    bad: list[BadRow] = []

    def use(row: Row, file: str, line: int) -> None:
        cases.append(read(row, f"{len(cases)}"))

    use_rows(config.path, use, bad)
    if not cases:
        first = f"; the first: line {bad[0].line}: {bad[0].reason}" if bad else ""
        raise TooManyBadRows(f"none of the {len(bad)} rows of '{config.path}' can be used{first}")
    return cases, bad


def _grid(config: GridCases) -> list[Case]:
    return [
        Case(
            task=Task(
                id=f"{p}-{m}",
                topic=problem.topic,
                opening=(_opening(problem.problem, None),),
                problem=problem.problem,
            ),
            misunderstanding=Misunderstanding(misconception),
            key=None if problem.answer is None else AnswerKey(problem.answer),
        )
        for p, problem in enumerate(config.problems)
        for m, misconception in enumerate(config.misconceptions)
    ]


def _mathdial(row: Row, name: str) -> Case:
    """The topic is the problem: dialogues about one problem stay together in a split."""
    problem, work = _text(row, "question"), _text(row, "student_incorrect_solution")
    answer = final_number(_text(row, "ground_truth"))
    if answer is None:
        raise ValueError("'ground_truth' does not end with a number")
    confusion = row.get("teacher_described_confusion")
    return Case(
        task=Task(
            id=name,
            topic=f"problem-{row.get('qid', name)}",
            opening=(_opening(problem, work),),
            problem=problem,
        ),
        misunderstanding=Misunderstanding(confusion or "something in the solution below", work),
        profile=_text(row, "student_profile"),
        key=AnswerKey(answer),
    )


def _prefix(row: Row, name: str) -> Case:
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ValueError("'messages' is missing: a list of messages with role and content")
    opening = tuple(Message.model_validate(message) for message in messages)
    if opening[-1].role != "user" or any(message.role == "system" for message in opening):
        raise ValueError(
            "'messages' must hold the tutor (assistant) and the student (user), the student last"
        )
    identity = str(row.get("id", name))
    return Case(task=Task(id=identity, topic=str(row.get("topic") or identity), opening=opening))


def _opening(problem: str, work: str | None) -> Message:
    words = "Can you help me?" if work is None else f"This is what I did:\n{work}\nIs it right?"
    return Message(role="user", content=f"{problem}\n\n{words}")


def _text(row: Row, field: str) -> str:
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"'{field}' is missing or not a text")
    return value.strip()
