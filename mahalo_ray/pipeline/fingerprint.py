"""What a finished stage was made from: its fingerprint, and the files that record it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mahalo_ray.data import storage

MANIFEST = "manifest.json"
STARTED = "started.json"


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text. NaN is a ValueError."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)


def fingerprint(name: str, version: int, seed: int, config: Any, upstream: Mapping[str, str]) -> str:
    """sha256 (hex) over everything a stage's result depends on.

    `version` is the stage's own format version: raised when its code makes something else of the same input.
    `config` is the part of the configuration that matters to it, `upstream` the fingerprints it builds on.
    """
    parts = {"stage": name, "version": version, "seed": seed, "config": config, "upstream": dict(upstream)}
    return hashlib.sha256(canonical_json(parts).encode()).hexdigest()


@dataclass(frozen=True)
class Manifest:
    """Written last, so that a stage with a manifest is a finished one.

    `outputs` maps a name to a path inside the stage's folder; `seconds` is the wall time of the whole stage.
    """

    stage: str
    fingerprint: str
    outputs: dict[str, str]
    metrics: dict[str, Any]
    seconds: float

    def write(self, folder: str) -> None:
        """Write it into the stage's folder (atomic)."""
        storage.write_json(storage.join(folder, MANIFEST), asdict(self))

    @classmethod
    def read(cls, folder: str) -> Manifest | None:
        """The folder's manifest, None when there is none. Raises ValueError when it cannot be understood."""
        url = storage.join(folder, MANIFEST)
        if not storage.exists(url):
            return None
        try:
            return cls(**storage.read_json(url))
        except (TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{url} is damaged ({error}): delete it to run the stage again") from error


def write_started(folder: str, value: str) -> None:
    """Record the fingerprint of the attempt that is about to work in this folder."""
    storage.write_json(storage.join(folder, STARTED), {"fingerprint": value})


def read_started(folder: str) -> str | None:
    """The fingerprint of the last attempt begun in this folder, None when there was none."""
    url = storage.join(folder, STARTED)
    return str(storage.read_json(url)["fingerprint"]) if storage.exists(url) else None
