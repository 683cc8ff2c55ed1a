"""Objectives and weights: what is traded off, and by how much."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """One sentence that says a name is unknown, suggests the nearest known one and lists them all."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    return f"unknown {kind} '{name}'.{hint} Known: {', '.join(names)}."


class Weights(Mapping[str, float]):
    """A point on the simplex: one weight >= 0 per objective, summing to 1. Immutable and hashable.

    Objectives that are not named weigh 0. Given values are divided by their sum, so `2,1` means `2/3, 1/3`.

    >>> weights = Weights.parse("accuracy=2,engagement=1")
    >>> round(weights["accuracy"], 3)
    0.667
    >>> weights.label()
    'accuracy=0.6667,engagement=0.3333'
    >>> Weights.balanced(["accuracy", "engagement"])
    Weights(accuracy=0.5,engagement=0.5)
    """

    __slots__ = ("_items",)

    def __init__(self, values: Mapping[str, float]) -> None:
        if not values:
            raise ValueError(
                "weights are empty: name at least one objective, e.g. 'accuracy=0.7,engagement=0.3'"
            )
        for name, value in values.items():
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"weight of '{name}' is {value}: weights must be finite numbers >= 0")
        largest = max(values.values())
        if largest > 1e100:  # the sum might not be finite
            values = {name: value / largest for name, value in values.items()}
        total = math.fsum(values.values())
        if total <= 0:
            raise ValueError(f"all weights are 0 ({', '.join(values)}): at least one must be above 0")
        if abs(total - 1) < 1e-12:
            total = 1.0  # divided before: writing weights out and reading them back changes no digit
        self._items = {name: float(value) / total for name, value in values.items()}

    @classmethod
    def parse(cls, text: str) -> Weights:
        """Read `accuracy=0.7,engagement=0.3`. Raises ValueError naming the part that cannot be read."""
        values: dict[str, float] = {}
        for part in filter(None, (piece.strip() for piece in text.split(","))):
            name, equals, number = (piece.strip() for piece in part.partition("="))
            if not name or not equals:
                raise ValueError(f"cannot read weight '{part}' in '{text}': write objective=number")
            if name in values:
                raise ValueError(f"objective '{name}' is given twice in '{text}'")
            try:
                values[name] = float(number)
            except ValueError:
                raise ValueError(f"weight of '{name}' in '{text}' is '{number}', not a number") from None
        return cls(values)

    @classmethod
    def one(cls, objective: str) -> Weights:
        """All the weight on one objective."""
        return cls({objective: 1.0})

    @classmethod
    def balanced(cls, objectives: Iterable[str]) -> Weights:
        """The same weight on every objective."""
        return cls(dict.fromkeys(objectives, 1.0))

    def over(self, objectives: Iterable[str]) -> tuple[float, ...]:
        """The weights in the order of `objectives`; an objective not among them is a ValueError."""
        order = tuple(objectives)
        for name in self._items:
            if name not in order:
                raise ValueError(unknown_name("objective", name, order))
        return tuple(self._items.get(name, 0.0) for name in order)

    def label(self) -> str:
        """Readable and parseable: `accuracy=0.7,engagement=0.3`."""
        return ",".join(f"{name}={value:.4g}" for name, value in self._items.items())

    def __getitem__(self, name: str) -> float:
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(frozenset(self._items.items()))

    def __repr__(self) -> str:
        return f"Weights({self.label()})"
