"""What a reward model said of rows it was not trained on, beside what is true of them: the input of every
figure."""

from __future__ import annotations

from typing import ClassVar

import pyarrow as pa

from mahalo_ray.data.records import Record

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
