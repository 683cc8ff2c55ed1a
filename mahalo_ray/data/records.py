"""The three records everything exchanges, and their Arrow schemas.

Token ids, where present, are what the policy really read or sampled: they are never made again from text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar, Generic, Literal, Self, TypeVar

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from mahalo_ray.data import storage

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_IDS = pa.list_(pa.int32())
_TURN = pa.struct([("speaker", pa.string()), ("content", pa.string()), ("token_ids", _IDS)])
SCORES = pa.map_(pa.string(), pa.float64())
_CANDIDATE = pa.struct(
    [("content", pa.string()), ("token_ids", _IDS), ("labels", SCORES), ("scores", SCORES)]
)

# SFT examples: token ids as they will be read, and which of them to learn.
EXAMPLE_SCHEMA = pa.schema([("id", pa.string()), ("input_ids", _IDS), ("loss_mask", pa.list_(pa.bool_()))])


TokenIds = list[Annotated[int, Field(ge=0, lt=2**31)]]


class Message(BaseModel):
    """One chat message.

    >>> Message(role="user", content="What is 2 + 3?").role
    'user'
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: Literal["system", "user", "assistant"]
    content: str


class Record(BaseModel):
    """Base of the records: immutable, unknown fields are errors, rows of one Arrow schema."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    schema: ClassVar[pa.Schema]

    @classmethod
    def to_table(cls, records: Sequence[Self]) -> pa.Table:
        """The records as one Arrow table."""
        return pa.Table.from_pylist([record.model_dump() for record in records], schema=cls.schema)

    @classmethod
    def from_table(cls, table: pa.Table) -> list[Self]:
        """The rows of a table as records; map columns become dictionaries."""
        rows = table.to_pylist(maps_as_pydicts="strict")
        return [cls.model_validate(row) for row in rows]

    @classmethod
    def load(cls, folder: str) -> list[Self]:
        """Read all Parquet shards of a folder."""
        return cls.from_table(storage.read_table(folder))

    @classmethod
    def stream(cls, folder: str) -> Iterator[Self]:
        """The same one after another: only some rows are in memory at a time."""
        for table in storage.stream_tables(folder):
            yield from cls.from_table(table)

    @classmethod
    def read(cls, url: str) -> list[Self]:
        """Read one Parquet file."""
        return cls.from_table(storage.read_file(url))

    @classmethod
    def save(cls, records: Sequence[Self], url: str) -> None:
        """Write one Parquet file."""
        storage.write_table(url, cls.to_table(records))


R = TypeVar("R", bound=Record)
_ROWS_AS_OBJECTS = 1024


class RecordTable(Generic[R]):
    """Records in the order they were appended, kept as Arrow tables, which take a fraction of the memory of
    objects. Iterating makes objects of a few at a time."""

    def __init__(self, kind: type[R]) -> None:
        self._kind = kind
        self._tables: list[pa.Table] = []
        self._last: list[R] = []

    def append(self, record: R) -> None:
        """One record more."""
        self._last.append(record)
        if len(self._last) == _ROWS_AS_OBJECTS:
            self._tables.append(self._kind.to_table(self._last))
            self._last = []

    def __len__(self) -> int:
        return sum(map(len, self._tables)) + len(self._last)

    def __iter__(self) -> Iterator[R]:
        for table in self._tables:
            yield from self._kind.from_table(table)
        yield from self._last

    def table(self) -> pa.Table:
        """All records as one Arrow table."""
        return pa.concat_tables([*self._tables, self._kind.to_table(self._last)])


class PreferencePair(Record):
    """For one objective: which of two completions of a prompt is better.

    Pairs of one `split` never fall on both sides of a held-out split; without one, pairs of one `dialogue`;
    without that, pairs of one prompt.

    The policy's loss reads `weight` (the pair's share in the mean over its objective's pairs is weight / sum
    of weights) and `margin` (by how much the beta-scaled gain of chosen over rejected must exceed zero; see
    `dpo_loss`). `chosen_scores` and `rejected_scores` are the rewards of all objectives, where known.

    >>> pair = PreferencePair(
    ...     id="1",
    ...     objective="accuracy",
    ...     prompt=[{"role": "user", "content": "What is 2 + 3?"}],
    ...     chosen="5",
    ...     rejected="6",
    ...     source="example",
    ... )
    >>> PreferencePair.save([pair], "pairs.parquet")
    >>> PreferencePair.read("pairs.parquet") == [pair]
    True
    """

    id: str
    objective: str
    prompt: list[Message]
    chosen: str
    rejected: str
    chosen_score: float | None = None
    rejected_score: float | None = None
    source: str
    prompt_ids: TokenIds | None = None
    chosen_ids: TokenIds | None = None
    rejected_ids: TokenIds | None = None
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    margin: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    chosen_scores: dict[str, float] | None = None
    rejected_scores: dict[str, float] | None = None
    dialogue: str | None = None
    split: str | None = None

    schema: ClassVar[pa.Schema] = pa.schema(
        [
            ("id", pa.string()),
            ("objective", pa.string()),
            ("prompt", MESSAGES),
            ("chosen", pa.string()),
            ("rejected", pa.string()),
            ("chosen_score", pa.float64()),
            ("rejected_score", pa.float64()),
            ("source", pa.string()),
            ("prompt_ids", _IDS),
            ("chosen_ids", _IDS),
            ("rejected_ids", _IDS),
            ("weight", pa.float64()),
            ("margin", pa.float64()),
            ("chosen_scores", SCORES),
            ("rejected_scores", SCORES),
            ("dialogue", pa.string()),
            ("split", pa.string()),
        ]
    )


class StepTrace(Record):
    """A prompt, its steps, and per objective one label per step (None where unknown).

    With `token_ids`, `step_starts[t]` and `step_ends[t]` are the positions of the first and last token of
    step t in them. `group` names what is compared within (candidates of one prompt share it). Traces of one
    `dialogue` never fall on both sides of a held-out split; without one, traces of one group.

    >>> trace = StepTrace(
    ...     id="1",
    ...     group="sum",
    ...     prompt=[{"role": "user", "content": "What is 2 + 3?"}],
    ...     steps=["Two and three.", "That makes 5."],
    ...     labels={"accuracy": [None, 1.0]},
    ...     source="example",
    ... )
    >>> trace.labels["accuracy"][1]
    1.0
    """

    id: str
    group: str
    prompt: list[Message]
    steps: list[str]
    labels: dict[str, list[float | None]]
    outcome: dict[str, float] | None = None
    source: str
    token_ids: TokenIds | None = None
    step_starts: TokenIds | None = None
    step_ends: TokenIds | None = None
    dialogue: str | None = None
    answer: str | None = None

    schema: ClassVar[pa.Schema] = pa.schema(
        [
            ("id", pa.string()),
            ("group", pa.string()),
            ("prompt", MESSAGES),
            ("steps", pa.list_(pa.string())),
            ("labels", pa.map_(pa.string(), pa.list_(pa.float64()))),
            ("outcome", SCORES),
            ("source", pa.string()),
            ("token_ids", _IDS),
            ("step_starts", _IDS),
            ("step_ends", _IDS),
            ("dialogue", pa.string()),
            ("answer", pa.string()),
        ]
    )


class Turn(BaseModel):
    """One utterance. `token_ids` are the tokens as the policy read (student) or sampled (tutor) them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    speaker: Literal["tutor", "student"]
    content: str
    token_ids: TokenIds | None = None


class Dialogue(Record):
    """One tutoring conversation with its outcome per objective.

    `ended`: what ended it (student, turns, stop, max_tokens). `persona`: the simulated student's traits, and
    `checks`: whether it kept to them (see `domains/tutoring/moves.py`).

    >>> dialogue = Dialogue(
    ...     id="1",
    ...     topic="sums",
    ...     turns=[{"speaker": "student", "content": "2 + 3?"}, {"speaker": "tutor", "content": "Count on."}],
    ...     outcome={"accuracy": 1.0},
    ...     seed=0,
    ...     source="example",
    ... )
    >>> dialogue.turns[1].speaker
    'tutor'
    """

    id: str
    topic: str
    turns: list[Turn]
    outcome: dict[str, float]
    seed: int
    source: str
    ended: str | None = None
    persona: dict[str, str] | None = None
    checks: dict[str, float] | None = None

    schema: ClassVar[pa.Schema] = pa.schema(
        [
            ("id", pa.string()),
            ("topic", pa.string()),
            (
                "turns",
                pa.list_(
                    pa.struct([("speaker", pa.string()), ("content", pa.string()), ("token_ids", _IDS)])
                ),
            ),
            ("outcome", SCORES),
            ("seed", pa.int64()),
            ("source", pa.string()),
            ("ended", pa.string()),
            ("persona", pa.map_(pa.string(), pa.string())),
            ("checks", SCORES),
        ]
    )


class Candidate(BaseModel):
    """One sampled tutor turn: `labels` from continuations and the judge, `scores` from a reward model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    content: str
    token_ids: TokenIds
    labels: dict[str, float] | None = None
    scores: dict[str, float] | None = None


class CandidateSet(Record):
    """The K candidate turns of one moment in one dialogue; `chosen` went on."""

    id: str
    dialogue: str
    topic: str
    turn: int
    prompt: list[Message]
    prompt_ids: TokenIds
    candidates: list[Candidate]
    chosen: int

    schema: ClassVar[pa.Schema] = pa.schema(
        [
            ("id", pa.string()),
            ("dialogue", pa.string()),
            ("topic", pa.string()),
            ("turn", pa.int32()),
            ("prompt", MESSAGES),
            ("prompt_ids", _IDS),
            ("candidates", pa.list_(_CANDIDATE)),
            ("chosen", pa.int32()),
        ]
    )


class ShardWriter(Generic[R]):
    """Writes records to a folder, a Parquet file of `rows` at a time: no more of them are in memory."""

    def __init__(self, kind: type[R], folder: str, rows: int = 4096) -> None:
        self.written = 0
        self._kind, self._folder, self._rows = kind, folder, rows
        self._waiting: list[R] = []
        self._shards = 0

    def add(self, record: R) -> None:
        """One record more."""
        self._waiting.append(record)
        self.written += 1
        if len(self._waiting) == self._rows:
            self.flush()

    def flush(self) -> None:
        """Write what is waiting; to be called after the last record."""
        if self._waiting:
            name = f"part-{self._shards:06d}.parquet"
            self._kind.save(self._waiting, storage.join(self._folder, name))
            self._waiting = []
            self._shards += 1


# Files of a trained reward model's folder.
HELD_OUT_TRACES, HELD_OUT_PAIRS = "held_out_traces.parquet", "held_out_pairs.parquet"

_PER_STEP = pa.map_(pa.string(), pa.list_(pa.float64()))


class ScoredTrace(Record):
    """A trace's scores and labels per objective and step (labels None where unknown), and its outcome.

    `group`: the prompt; `dialogue`: what is not independent of it (else the group); `turns_before`: assistant
    messages in the prompt; `tokens`: length of every step.
    """

    id: str
    group: str
    dialogue: str
    turns_before: int
    tokens: list[int]
    scores: dict[str, list[float]]
    labels: dict[str, list[float | None]]
    outcome: dict[str, float] | None = None

    schema: ClassVar[pa.Schema] = pa.schema(
        [
            ("id", pa.string()),
            ("group", pa.string()),
            ("dialogue", pa.string()),
            ("turns_before", pa.int32()),
            ("tokens", pa.list_(pa.int32())),
            ("scores", _PER_STEP),
            ("labels", _PER_STEP),
            ("outcome", pa.map_(pa.string(), pa.float64())),
        ]
    )


class ScoredPair(Record):
    """Scores of both responses of a preference pair, under the pair's objective. `dialogue`: what
    is not independent of it (else its prompt)."""

    id: str
    dialogue: str
    objective: str
    chosen: float
    rejected: float

    schema: ClassVar[pa.Schema] = pa.schema(
        [
            ("id", pa.string()),
            ("dialogue", pa.string()),
            ("objective", pa.string()),
            ("chosen", pa.float64()),
            ("rejected", pa.float64()),
        ]
    )
