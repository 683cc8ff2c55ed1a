"""Rows that cannot be used: kept with file, line and reason, and an error when they are too many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import pyarrow as pa

from mahalo_ray.data import storage

QUARANTINE = "quarantine.parquet"
SCHEMA = pa.schema(
    [("file", pa.string()), ("line", pa.int64()), ("reason", pa.string()), ("row", pa.string())]
)
_SHOWN = 5
_KEPT_CHARACTERS = 2000


@dataclass(frozen=True)
class BadRow:
    """`line` counts from 1: lines of JSON Lines, elements of a JSON array, rows of Parquet. `row`: its
    beginning."""

    file: str
    line: int
    reason: str
    row: str

    @classmethod
    def of(cls, file: str, line: int, reason: str, row: object) -> BadRow:
        """With the row cut to what a person needs to recognise it."""
        return cls(file, line, reason, str(row)[:_KEPT_CHARACTERS])


class TooManyBadRows(ValueError):
    """More rows than allowed cannot be used; the message names the first ones."""


def quarantine(
    bad: Sequence[BadRow], rows: int, max_fraction: float, url: str, key: str = "data.max_bad_fraction"
) -> None:
    """Write the bad rows of `rows` to `url` (also when there are none); TooManyBadRows above `max_fraction`
    of them, which the configuration calls `key`."""
    storage.write_table(url, pa.Table.from_pylist([asdict(row) for row in bad], schema=SCHEMA))
    if len(bad) <= max_fraction * rows:
        return
    first = "\n".join(f"  {row.file}, line {row.line}: {row.reason}" for row in bad[:_SHOWN])
    more = f"\n  ... and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
    raise TooManyBadRows(
        f"{len(bad)} of {rows} rows cannot be used, more than the allowed share of {max_fraction:g} "
        f"('{key}'):\n{first}{more}\nAll of them are in {url}"
    )
