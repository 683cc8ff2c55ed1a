"""Deterministic seeds, hashed from what they are for: the same on every machine and in every process."""

from __future__ import annotations

import hashlib


def derived_seed(*parts: object) -> int:
    """A 63-bit seed from any printable parts, the same on every machine."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def unit_draw(*parts: object) -> float:
    """A uniform draw in [0, 1) from any printable parts."""
    return derived_seed(*parts) / 2**63


def endpoint_seed(seed: int) -> int:
    """The seed cut to 31 bits, the largest that every OpenAI-compatible server accepts."""
    return seed % 2**31
