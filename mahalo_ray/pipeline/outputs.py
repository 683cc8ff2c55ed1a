"""Which output folders may be written: new ones, empty ones, and those that carry mahalo's own sign.

Nothing is deleted or overwritten in a folder that something else made: runs clear the folders of their
stages, and write files with common names (`config.yaml`, `pairs/`, `policy/`).
"""

from __future__ import annotations

import json
import os
import posixpath
from collections.abc import Iterable, Iterator

from fsspec.implementations.local import LocalFileSystem
from pydantic import BaseModel

from mahalo_ray.config import ConfigError
from mahalo_ray.data import storage

SIGN = "mahalo-output.json"  # at the top of an output folder
STAGE_SIGNS = ("started.json", "manifest.json")  # in the folder of a stage or job, each with a fingerprint
_IGNORED = ("run.lock", "lost+found", ".")  # names that begin so may lie in a folder that counts as empty
_SHOWN = 3
_READ_ONLY = ("http", "https", "github", "hf", "data", "zip", "tar", "git")
_NAME_BYTES = 255  # of one file's or folder's name, on every file system in use

# Fields of configurations that name a file, folder or model to read.
_INPUT_FIELDS = (
    *("path", "base", "model", "policy", "extends", "reward", "tokenizer"),
    *("prompts", "rubric", "ratings"),
)


def check_output(output: str, stages: Iterable[str] = ()) -> None:
    """ConfigError unless `output` is new, empty or mahalo's own, and so is every stage's folder in it.

    An output without the sign is mahalo's own where a folder of its `stages` is: signs came later than runs.
    """
    check_writable(output)
    folders = [storage.join(output, stage) for stage in stages]
    own = storage.exists(storage.join(output, SIGN)) or any(map(_is_signed, [output, *folders]))
    for folder in folders if own else [output]:
        if (names := _names(folder)) and not _is_signed(folder):
            shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
            raise ConfigError(
                f"'output': '{folder}' holds files that mahalo did not make ({shown}), and a run writes and "
                "clears folders there: name a new or empty folder"
            )


def check_new(output: str) -> None:
    """ConfigError unless `output` is absent or an empty folder that can be written."""
    check_writable(output)
    fs, path = storage.filesystem(output)
    if fs.exists(path) and fs.ls(path, detail=False):
        raise ConfigError(f"'{output}' exists already: give a new folder")


def check_writable(output: str) -> None:
    """ConfigError for an output that no folder can be made of, as far as can be told without writing."""
    if not output.strip():
        raise ConfigError("'output' is empty: name a new folder")
    fs, path = storage.filesystem(output)
    protocols = [fs.protocol] if isinstance(fs.protocol, str) else fs.protocol
    if readonly := [name for name in protocols if name in _READ_ONLY]:
        raise ConfigError(f"'output': '{output}': nothing can be written to {readonly[0]}: name a folder")
    if isinstance(fs, LocalFileSystem):
        _check_local(output, path)
    elif fs.exists(path) and not fs.isdir(path):
        raise ConfigError(f"'output': '{output}' is a file: name a new folder")


def _check_local(output: str, path: str) -> None:
    there = path
    while not os.path.lexists(there):
        there, name = os.path.split(there)
        if len(os.fsencode(name)) > _NAME_BYTES:
            raise ConfigError(f"'output': '{name[:40]}...' is too long for the name of a folder")
    if not os.path.isdir(there):
        raise ConfigError(f"'output': '{there}' is a file: name a new folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(
            f"'output': '{output}' cannot be written (see the rights of '{there}', and whether its disk is "
            "read-only): name another folder"
        )


def sign_output(output: str) -> None:
    """Mark a checked output as mahalo's own."""
    url = storage.join(output, SIGN)
    if not storage.exists(url):
        storage.write_json(url, {"made_by": "mahalo", "note": "mahalo may clear folders beside this file"})


def check_inputs(config: BaseModel, output: str) -> None:
    """ConfigError if something that the configuration reads lies in the output folder, which is written. The
    endpoint's further models may: it reads finished stages."""
    root = _real(output)
    for key, value in _inputs(config):
        if key.startswith("serve."):
            continue
        if posixpath.join(_real(value), "").startswith(posixpath.join(root, "")) and storage.exists(value):
            raise ConfigError(
                f"'{key}': '{value}' lies in the output folder '{output}', where files are written and "
                "cleared: give another 'output'"
            )


def _inputs(section: BaseModel, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(key, value) of everything in a configuration that names something to read."""
    for name, value in section:
        key = f"{prefix}{name}"
        items = (
            value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        )
        if isinstance(value, str) and name in _INPUT_FIELDS:
            yield key, value
        elif isinstance(value, BaseModel):
            yield from _inputs(value, f"{key}.")
        for at, item in items:
            if isinstance(item, BaseModel):
                yield from _inputs(item, f"{key}.{at}.")


def _real(url: str) -> str:
    """A local path without links; a URL as it is."""
    return os.path.realpath(storage.absolute(url)) if storage.is_local(url) else url.rstrip("/")


def _is_signed(folder: str) -> bool:
    """Whether a stage or job has begun in this folder."""
    for name in STAGE_SIGNS:
        url = storage.join(folder, name)
        if storage.exists(url):
            try:
                document = storage.read_json(url)
            except (json.JSONDecodeError, UnicodeDecodeError):
                continue
            if isinstance(document, dict) and "fingerprint" in document:
                return True
    return False


def _names(folder: str) -> list[str]:
    """What lies directly in a folder; nothing if it is absent."""
    fs, path = storage.filesystem(folder)
    if not fs.exists(path):
        return []
    if not fs.isdir(path):
        return [posixpath.basename(path)]
    names = (posixpath.basename(name.rstrip("/")) for name in fs.ls(path, detail=False))
    return sorted(name for name in names if not name.startswith(_IGNORED))
