"""A room uses only the rooms above it, and torch code does not know Ray."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import mahalo_ray

PACKAGE = Path(mahalo_ray.__file__).parent

# From the ground up. What stands in one line may not use each other.
ORDER = [
    ["objectives", "logprobs", "errors", "seeding"],
    ["config"],
    ["endpoints"],
    ["data"],
    ["domains", "metrics"],
    ["models"],
    ["losses"],
    ["decoding"],
    ["training"],
    ["planning"],
    ["rollouts"],
    ["evaluation"],
    ["sweeps"],
    ["serving"],
    ["pipeline"],
    ["cli"],
]
RANK = {room: level for level, rooms in enumerate(ORDER) for room in rooms}

# Rooms that only compute: what they may not import.
WITHOUT_RAY = {room for rooms in ORDER[:8] for room in rooms}  # up to and with decoding
TORCH_ONLY = {"losses", "logprobs"}


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def modules() -> Iterator[tuple[str, Path, int, str]]:
    """(room, file, line, imported module) of every import statement in the package."""
    for file in sorted(PACKAGE.rglob("*.py")):
        room = room_of(file)
        if room == "__init__":
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), str(file))):
            if isinstance(node, ast.Import):
                yield from ((room, file, node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file}:{node.lineno}: imports inside the package are absolute"
                assert node.module is not None
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                yield from ((room, file, node.lineno, name) for name in names)


def test_every_room_has_its_place() -> None:
    rooms = {
        room_of(file) for file in PACKAGE.rglob("*.py") if file.relative_to(PACKAGE).parts != ("__init__.py",)
    }
    assert rooms <= set(RANK), f"put {rooms - set(RANK)} into the order"
    assert set(RANK) <= rooms, f"{set(RANK) - rooms} are no longer there"


def test_rooms_use_only_rooms_above_them() -> None:
    wrong = []
    for room, file, line, name in modules():
        parts = name.split(".")
        if parts[0] != "mahalo_ray" or len(parts) < 2 or parts[1] not in RANK:
            continue
        if parts[1] != room and RANK[parts[1]] >= RANK[room]:
            wrong.append(f"{file.relative_to(PACKAGE)}:{line}: {room} uses {parts[1]}")
    assert wrong == []


def test_torch_code_does_not_know_ray() -> None:
    wrong = [
        f"{file.relative_to(PACKAGE)}:{line}: {name}"
        for room, file, line, name in modules()
        if room in WITHOUT_RAY and name.split(".")[0] in ("ray", "deepspeed")
    ]
    # Under ZeRO-3 a head's rows are gathered by DeepSpeed: the one place that has to know of it.
    assert [w for w in wrong if not w.startswith("models/sharding.py")] == []


def test_losses_know_torch_alone() -> None:
    allowed = {"__future__", "collections", "dataclasses", "enum", "functools", "math", "torch", "typing"}
    wrong = [
        f"{file.name}:{line}: {name}"
        for room, file, line, name in modules()
        if room in TORCH_ONLY
        and name.split(".")[0] not in allowed
        and not any(name.startswith(f"mahalo_ray.{module}") for module in TORCH_ONLY)
    ]
    assert wrong == []
