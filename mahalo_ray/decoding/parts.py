"""Where keys and values of branches lie, and buffers that grow."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Part:
    """Own keys and values of some lines of branches, per layer [lines, Hkv, K, T, D]."""

    keys: list[Tensor]
    values: list[Tensor]

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))


@dataclass(frozen=True)
class Place:
    """One branch of a part."""

    part: Part
    line: int
    branch: int


def grown(current: int, needed: int, least: int = 1) -> int:
    """A new size for a buffer that must hold `needed`: an eighth, and `least`, larger at least, so that
    copying stays rare and little is held for nothing.
    """
    return current if needed <= current else max(needed, current + max(current // 8, least))


def resized(old: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`old` in the corner of a larger zero tensor."""
    new = old.new_zeros(shape)
    new[tuple(slice(0, size) for size in old.shape)] = old
    return new
