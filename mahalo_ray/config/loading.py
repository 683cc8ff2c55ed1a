"""Configuration files: load, override, explain what is wrong, write resolved."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from mahalo_ray.config.run_config import RunConfig
from mahalo_ray.config.section import ConfigError, Section
from mahalo_ray.objectives import unknown_name

Document = TypeVar("Document", bound=Section)


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """A run's YAML file; see `load_document`."""
    return load_document(path, RunConfig, overrides)


def load_document(path: str | Path, kind: type[Document], overrides: list[str] | None = None) -> Document:
    """Read a YAML file, apply `a.b=c` overrides (values are YAML) and validate.

    Raises ConfigError naming the file and every wrong key.
    """
    return validate_document(read_document(Path(path), overrides), kind, str(path))


def read_document(path: Path | None, overrides: list[str] | None) -> dict[str, Any]:
    """A YAML file (None: an empty document) with overrides applied, not validated yet."""
    document: Any = {}
    if path is not None:
        if not path.is_file():
            raise ConfigError(f"no config file at '{path}'")
        try:
            document = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{path} must hold a mapping of sections, not {type(document).__name__}")
    for override in overrides or []:
        _apply_override(document, override)
    return document


def validate_document(document: dict[str, Any], kind: type[Document], source: str) -> Document:
    """The document as a section; ConfigError naming `source` and every wrong key."""
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        raise ConfigError(_explain(error, source, kind)) from error


def dump_config(config: Section) -> str:
    """The resolved config as YAML, every default written out; loads back to the same config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _apply_override(document: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"cannot read override '{override}': write --set section.key=value")
    node: Any = document
    for depth, key in enumerate(keys[:-1]):
        if isinstance(node, list):
            node = _list_item(node, key, override)
            continue
        if node.get(key) is None:
            node[key] = {}
        node = node[key]
        if not isinstance(node, dict | list):
            raise ConfigError(
                f"override '{override}': '{'.'.join(keys[: depth + 1])}' is a value, not a section"
            )
    value = yaml.safe_load(text)
    if isinstance(node, list):
        _list_item(node, keys[-1], override)
        node[int(keys[-1])] = value
    else:
        node[keys[-1]] = value


def _list_item(items: list[Any], key: str, override: str) -> Any:
    if not key.isdigit() or int(key) >= len(items):
        raise ConfigError(f"override '{override}': '{key}' is not an index below {len(items)}")
    return items[int(key)]


def _explain(error: ValidationError, source: str, kind: type[BaseModel]) -> str:
    lines = []
    for item in error.errors():
        location = ".".join(str(part) for part in item["loc"]) or "(top level)"
        if item["type"] == "extra_forbidden":
            known = _known_keys(item["loc"][:-1], kind)
            lines.append(f"  {location}: {unknown_name('key', str(item['loc'][-1]), known)}")
        else:
            given = "" if isinstance(item["input"], dict) else f" (got {item['input']!r})"
            hint = (
                _nearest_choice(item["input"], item["ctx"]["expected"])
                if item["type"] == "literal_error"
                else ""
            )
            lines.append(f"  {location}: {item['msg'].removeprefix('Value error, ')}{given}{hint}")
    return f"{source} cannot be used:\n" + "\n".join(lines)


def _nearest_choice(value: Any, expected: str) -> str:
    """ " Did you mean 'trl'?" where one of the quoted choices in pydantic's text is close to the value."""
    close = difflib.get_close_matches(str(value), re.findall(r"'([^']*)'", expected), n=1)
    return f". Did you mean '{close[0]}'?" if close else ""


def _known_keys(location: tuple[int | str, ...], kind: type[BaseModel]) -> list[str]:
    """Fields of the section at a location. Of a union told apart by `kind`, the location names the member."""
    candidates = [kind]
    for part in location:
        if isinstance(part, int):
            continue
        chosen = [section for section in candidates if _tag(section) == part]
        if chosen:
            candidates = chosen
        else:
            candidates = [
                s for c in candidates if part in c.model_fields for s in _sections_of(c.model_fields[part])
            ]
    assert candidates, f"{location} holds no section"
    return list(candidates[0].model_fields)


def _tag(section: type[BaseModel]) -> str | None:
    field = section.model_fields.get("kind")
    return None if field is None or field.default is PydanticUndefined else str(field.default)


def _sections_of(field: FieldInfo) -> list[type[BaseModel]]:
    candidates: list[Any] = [field.annotation]
    found = []
    while candidates:
        annotation = candidates.pop()
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            found.append(annotation)
        candidates.extend(getattr(annotation, "__args__", ()))
    return found
