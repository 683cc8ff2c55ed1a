"""Every row accounted for: read, quarantined with file, line and reason, or left out by name.

`use_rows` is the loop under every reader: it reads the rows of all files of a path one after another and
counts what becomes of each in a `ReadReport`.
"""

from __future__ import annotations

import itertools
import posixpath
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Generic, NamedTuple, Protocol, Self, TypeVar

import pyarrow as pa

from mahalo_ray.data import storage
from mahalo_ray.data.row_fields import Row, RowError
from mahalo_ray.data.row_files import FileError, UnreadableRow, find_files, read_rows

SCHEMA = pa.schema(
    [("file", pa.string()), ("line", pa.int64()), ("reason", pa.string()), ("row", pa.string())]
)
_SHOWN = 5
_SHOWN_FILES = 20
_KEPT_CHARACTERS = 2000


class RowLeftOut(Exception):
    """Why a row is not wanted, though nothing is wrong with it."""


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
        try:
            text = str(row)
        except (RecursionError, ValueError):  # nested too deeply, or a number of thousands of digits
            text = "(cannot be shown)"
        return cls(_printable(file), line, _printable(reason), _printable(text[:_KEPT_CHARACTERS]))


def _printable(text: str) -> str:
    """Text that Arrow and a terminal can hold: halves of characters as their numbers."""
    return text.encode("utf-8", "backslashreplace").decode()


@dataclass
class FileReport:
    """What became of one file: `rows` = `read` + `quarantined` + all of `left_out` (reason -> rows).

    `not_read`: why the file, or what comes after these rows, could not be read.
    """

    rows: int = 0
    read: int = 0
    quarantined: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    not_read: str | None = None


@dataclass
class ReadReport:
    """What became of every file and row of one or several sources, for people and for JSON.

    A row counts as quarantined when nothing of it can be used; `bad` has an entry for every unusable row, and
    for every unusable part of a row that is otherwise used.
    """

    files: dict[str, FileReport] = field(default_factory=dict)
    bad: list[BadRow] = field(default_factory=list)

    def add(self, other: ReadReport) -> None:
        """The files and bad rows of another report too; a file in both gets both counts."""
        for file, report in other.files.items():
            mine = self.files.setdefault(file, FileReport())
            mine.rows, mine.read = mine.rows + report.rows, mine.read + report.read
            mine.quarantined += report.quarantined
            mine.not_read = mine.not_read or report.not_read
            for reason, rows in report.left_out.items():
                mine.left_out[reason] = mine.left_out.get(reason, 0) + rows
        self.bad += other.bad

    @property
    def rows(self) -> int:
        """Rows that are there, in all files that could be read."""
        return sum(report.rows for report in self.files.values())

    def as_json(self) -> dict[str, Any]:
        """Totals, and the counts of every file."""
        reports = self.files.values()
        return {
            "rows": self.rows,
            "read": sum(report.read for report in reports),
            "quarantined": sum(report.quarantined for report in reports),
            "left_out": sum(sum(report.left_out.values()) for report in reports),
            "files_not_read": sum(report.not_read is not None for report in reports),
            "files": {_printable(file): asdict(report) for file, report in self.files.items()},
        }

    def describe(self) -> list[str]:
        """The same as lines for people (see `describe_account`)."""
        return describe_account(self.as_json())


def describe_account(account: Mapping[str, Any]) -> list[str]:
    """`ReadReport.as_json` as lines: one for a file (at most twenty, incomplete ones first), and totals."""
    files = account["files"]
    incomplete = {f: r for f, r in files.items() if r["read"] < r["rows"] or r["not_read"] is not None}
    lines = [f"{file}: {_describe_file(report)}" for file, report in {**incomplete, **files}.items()]
    more = len(lines) - _SHOWN_FILES
    if more > 0:
        lines = [*lines[:_SHOWN_FILES], f"... and {more} more files"]
    return [
        *lines,
        f"rows: {account['rows']} = {account['read']} read + {account['quarantined']} quarantined + "
        f"{account['left_out']} left out; files not read: {account['files_not_read']} of {len(files)}",
    ]


def _describe_file(report: Mapping[str, Any]) -> str:
    if report["not_read"] is not None and not report["rows"]:
        return f"not read: {report['not_read']}"
    counts = [f"{report['read']} of {report['rows']} rows read"]
    if report["quarantined"]:
        counts.append(f"{report['quarantined']} quarantined")
    counts += [f"{rows} left out ({reason})" for reason, rows in report["left_out"].items()]
    if report["not_read"] is not None:
        counts.append(f"the rest not read: {report['not_read']}")
    return ", ".join(counts)


class TooManyBadRows(ValueError):
    """More rows than allowed cannot be used; the message names the first ones."""


def quarantine(
    bad: Sequence[BadRow],
    rows: int,
    max_fraction: float,
    url: str,
    key: str = "data.max_bad_fraction",
    unit: str = "rows",
) -> None:
    """Write the bad rows of `rows` to `url` (also when there are none); TooManyBadRows above `max_fraction`
    of them, which the configuration calls `key`. `unit`: what is counted, where a row may hold several."""
    storage.write_table(url, pa.Table.from_pylist([asdict(row) for row in bad], schema=SCHEMA))
    if len(bad) <= max_fraction * rows:
        return
    first = "\n".join(f"  {row.file}, line {row.line}: {row.reason}" for row in bad[:_SHOWN])
    more = f"\n  ... and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
    raise TooManyBadRows(
        f"{len(bad)} of {rows} {unit} cannot be used, more than the allowed share of {max_fraction:g} "
        f"('{key}'):\n{first}{more}\nAll of them are in {url}"
    )


class Place(NamedTuple):
    """Where a row stands: `name` is the file's path within its source, unique there."""

    file: str
    name: str
    line: int

    def __str__(self) -> str:
        return f"{self.name}:{self.line}"


@dataclass
class UniqueIds:
    """Ids of records: unique within a file, and made so over all files that are read together.

    Two files that both count from 0 are no error: an id that another file has too gets the record's place
    before it.
    """

    taken: set[str] = field(default_factory=set)
    _file: tuple[str, str] | None = None
    _in_file: set[str] = field(default_factory=set)

    def claim(self, own: str, place: Place, source: str = "") -> str:
        """The id to use for a record that names itself `own`; RowError if its file has that id already."""
        file = (source, place.file)
        if file != self._file:
            self._file, self._in_file = file, set()
        if own in self._in_file:
            raise RowError(f"another row of this file has the id '{own}' too")
        self._in_file.add(own)
        unique = own
        if unique in self.taken:
            unique = f"{posixpath.join(source, place.name)}:{own}"
        for number in itertools.count(2):
            if unique not in self.taken:
                break
            unique = f"{posixpath.join(source, place.name)}:{own}#{number}"
        self.taken.add(unique)
        return unique


Kept = TypeVar("Kept", bound="Identified")


class Identified(Protocol):
    """A record with an id of its own."""

    @property
    def id(self) -> str: ...

    def model_copy(self, *, update: Mapping[str, Any]) -> Self:
        """The same with other fields."""
        ...


@dataclass
class ReadRecords(Generic[Kept]):
    """Records that were read from one or several sources, and what became of every row in `report`.

    `take`: what is done with a record, instead of keeping it in `kept`; a RowError that it raises puts the
    row into the quarantine. `taken`: how many there were.
    """

    kept: list[Kept] = field(default_factory=list)
    report: ReadReport = field(default_factory=ReadReport)
    taken: int = 0
    take: Callable[[Kept], None] | None = None
    ids: UniqueIds = field(default_factory=UniqueIds)

    @property
    def bad(self) -> list[BadRow]:
        """The rows, and the parts of rows, that cannot be used."""
        return self.report.bad

    @property
    def rows(self) -> int:
        """All rows that are there."""
        return self.report.rows

    def add(self, record: Kept, place: Place, source: str) -> None:
        """One record more; its id is made unique (see `UniqueIds`)."""
        unique = self.ids.claim(record.id, place, source)
        record = record if unique == record.id else record.model_copy(update={"id": unique})
        (self.take or self.kept.append)(record)
        self.taken += 1


def use_rows(path: str, use: Callable[[Row, Place], None], report: ReadReport) -> None:
    """Call `use(row, place)` for every row of `path` (see `find_files`) and count what becomes of it.

    A RowError raised by `use` puts the row into the quarantine, a RowLeftOut leaves it out; otherwise it
    counts as read. A file of a folder that cannot be read is named in the report. ValueError when there is
    nothing to read, or no file that can be read.
    """
    files, others = find_files(path)
    for file, reason in others.items():
        report.files.setdefault(file, FileReport(not_read=reason))
    errors = []
    for file, name in files:
        counts = report.files.setdefault(file, FileReport())
        try:
            for line, row in read_rows(file):
                counts.rows += 1
                try:
                    if isinstance(row, RowError):
                        raise row
                    use(row, Place(file, name, line))
                    counts.read += 1
                except RowLeftOut as why:
                    counts.left_out[str(why)] = counts.left_out.get(str(why), 0) + 1
                except RowError as error:
                    counts.quarantined += 1
                    shown = error.row if isinstance(error, UnreadableRow) else row
                    report.bad.append(BadRow.of(file, line, str(error), shown))
                except (RecursionError, OverflowError) as error:
                    counts.quarantined += 1
                    deep = isinstance(error, RecursionError)
                    reason = "nested too deeply" if deep else "a number is too large"
                    report.bad.append(BadRow.of(file, line, reason, row))
        except FileError as error:
            counts.not_read = str(error)
            errors.append(error)
    if errors and len(errors) == len(files):
        more = f" (and {len(errors) - 1} other files)" if len(errors) > 1 else ""
        raise FileError(f"{errors[0]}{more}")
