"""Configuration files: load, override, explain what is wrong and where, write resolved.

Whatever stands in a file, what comes of it is a validated document or a ConfigError that names the file, the
line and the key.
"""

from __future__ import annotations

import codecs
import difflib
import re
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
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
Key = tuple[str | int, ...]

_MOST_BYTES = 4_000_000
_MOST_VALUES = 100_000  # after every alias is written out: a file of a few lines can stand for billions
_MOST_LEVELS = 50
_MOST_KEY = 200
_MOST_ERRORS = 20  # that one message lists
_MOST_SHOWN = 80  # characters of a wrong value that a message repeats
_SECRET_KEYS = ("api_key_env",)  # somebody may have written the key itself there


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """A run's YAML file; see `load_document`."""
    return load_document(path, RunConfig, overrides)


def load_document(path: str | Path, kind: type[Document], overrides: list[str] | None = None) -> Document:
    """Read a YAML file, apply `a.b=c` overrides (values are YAML) and validate.

    Raises ConfigError naming the file, the line and every wrong key.
    """
    return read_document(Path(path), overrides).validate(kind)


@dataclass
class Draft:
    """A document as it was written, not validated yet.

    values: plain YAML values. places: where each key stands, `line 12` or `--set a.b=c`. source: what
    messages call the document.
    """

    source: str
    values: dict[str, Any] = field(default_factory=dict)
    places: dict[Key, str] = field(default_factory=dict)

    def validate(self, kind: type[Document]) -> Document:
        """The document as a section; ConfigError naming the source and every wrong key."""
        try:
            return kind.model_validate(self.values)
        except ValidationError as error:
            raise ConfigError(_explain(error, self, kind)) from error

    def put(self, key: tuple[str, ...], value: Any, place: str) -> None:
        """Set one key, in sections that are made where there are none; `place` says who set it."""
        node = self.values
        for depth, part in enumerate(key[:-1]):
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
            if not isinstance(node, dict):
                name = ".".join(key[: depth + 1])
                raise ConfigError(f"{place}: '{name}' of {self.source} is {_type_name(node)}, not a section")
        node[key[-1]] = value
        self.places[key] = place

    def place_of(self, location: Key) -> str | None:
        """Where the innermost known key of a location stands; parts that name no key (the members of a choice
        in pydantic's locations) are passed over."""
        known: Key = ()
        for part in location:
            if (*known, part) in self.places:
                known = (*known, part)
        return self.places.get(known)


def read_document(path: Path | None, overrides: list[str] | None) -> Draft:
    """A YAML file (None: an empty document) with overrides applied, not validated yet."""
    draft = Draft("the command") if path is None else _read_file(path)
    for override in overrides or []:
        _apply_override(draft, override)
    return draft


def dump_config(config: Section) -> str:
    """The resolved config as YAML, every default written out; loads back to the same config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _read_file(path: Path) -> Draft:
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"no config file at '{path}'") from None
    except IsADirectoryError:
        raise ConfigError(f"'{path}' is a folder: give the YAML file itself") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"cannot read the config file '{path}': {reason}") from error
    if len(content) > _MOST_BYTES:
        raise ConfigError(f"{path} is larger than {_MOST_BYTES // 1_000_000} MB: it is no configuration")
    draft = Draft(str(path))
    values = _parse(_decode(content, draft.source), draft.source, draft.places)
    if not isinstance(values, dict):
        what = "nothing: it is empty" if values is None else _type_name(values)
        raise ConfigError(f"{path} must hold a mapping of sections, not {what}")
    draft.values = values
    return draft


_OTHER_ENCODINGS = {  # UTF-32 first: its little-endian mark begins with that of UTF-16
    "UTF-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
    "UTF-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}


def _decode(content: bytes, source: str) -> str:
    for encoding, marks in _OTHER_ENCODINGS.items():
        if content.startswith(marks):
            raise ConfigError(f"{source} is {encoding} text: save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{source}, line {line}: not UTF-8 text (byte {content[error.start]:#04x}): save it as UTF-8"
        ) from None


def _parse(text: str, source: str, places: dict[Key, str] | None = None) -> Any:
    """The plain values of a YAML text; `places` is filled with the line of every key."""
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None:
            return None
        _check_size(root)
        if places is not None:
            places.update(_lines(root, ()))
        return _copied(loader.construct_document(root))
    except _Unusable as error:
        raise ConfigError(f"{source}, line {error.line}: {error}") from error
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"{source} is not valid YAML{_where(error)}: {_yaml_problem(error)}") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(
            f"{source}, line {line}: the control character {error.character:#04x} is not allowed"
        ) from error


class _Unusable(ValueError):
    """Valid YAML that no configuration may hold."""

    def __init__(self, node: yaml.Node, message: str) -> None:
        super().__init__(message)
        self.line = node.start_mark.line + 1


class _Loader(yaml.SafeLoader):
    """YAML whose keys are texts, each of them once in its mapping, and whose values are those of JSON."""

    level = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.level += 1
        if self.level > _MOST_LEVELS:
            raise yaml.composer.ComposerError(
                None, None, f"more than {_MOST_LEVELS} levels inside each other", self.peek_event().start_mark
            )
        node: yaml.Node | None = super().compose_node(parent, index)
        self.level -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        first: dict[Hashable, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag not in (_TEXT, _MERGE):
                shown = key.value if isinstance(key, yaml.ScalarNode) else "a list or mapping"
                raise _Unusable(
                    key, f"the key {shown} is not a text: write '{shown}' in quotes if it is a name"
                )
            line = key.start_mark.line + 1
            if len(key.value) > _MOST_KEY:
                raise _Unusable(key, f"a key has more than {_MOST_KEY} characters")
            if key.value in first:
                raise _Unusable(
                    key, f"the key '{key.value}' is given twice, first in line {first[key.value]}"
                )
            first[key.value] = line
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if node.tag not in _JSON_TAGS:
            kind = node.tag.removeprefix("tag:yaml.org,2002:")
            raise _Unusable(
                node, f"a value of the kind '{kind}' is not used here: write it in quotes if it is text"
            )
        try:
            value = super().construct_object(node, deep)
        except (ValueError, OverflowError) as error:  # numbers of thousands of digits
            raise _Unusable(node, f"cannot read the value: {error}") from error
        if isinstance(value, int | float) and _OTHER_BASE.match(str(node.value)):
            raise _Unusable(
                node, f"YAML reads {node.value} as {value}: write {value}, or '{node.value}' if it is text"
            )
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise _Unusable(node, "the number does not fit into 64 bits")
        if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
            raise _Unusable(node, "the text holds half of a character (a lone surrogate)")
        return value


# Numbers to base 8 and 60 that do not look like it: 010 is 8, 1:30 is 90.
_OTHER_BASE = re.compile(r"[-+]?(0[0-7_]+$|[0-9][0-9_]*:)")
_TEXT, _MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"
_JSON_TAGS = {
    _MERGE,
    *(f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "seq", "map")),
}


def _check_size(root: yaml.Node) -> None:
    """Refuse a document that is too large or too deep when every alias is written out, or that holds itself.

    An anchor stands before its aliases, so each node is measured once, and the recursion is as deep as the
    text.
    """
    measured: dict[int, tuple[int, int]] = {}
    open_nodes: set[int] = set()

    def measure(node: yaml.Node) -> tuple[int, int]:
        """Values and levels of a node."""
        if id(node) in open_nodes:
            raise _Unusable(node, "an alias stands for something that it is part of")
        if id(node) not in measured:
            open_nodes.add(id(node))
            inner = [measure(child) for child in _children(node)]
            values = 1 + sum(size for size, _ in inner)
            levels = 1 + max((level for _, level in inner), default=0)
            open_nodes.discard(id(node))
            if values > _MOST_VALUES or levels > _MOST_LEVELS:
                raise _Unusable(
                    node,
                    f"with every alias written out there are more than {_MOST_VALUES} values, or more than "
                    f"{_MOST_LEVELS} levels",
                )
            measured[id(node)] = values, levels
        return measured[id(node)]

    measure(root)


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _lines(node: yaml.Node, key: Key) -> Iterator[tuple[Key, str]]:
    """The line of every key and list item."""
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            yield (*key, name.value), f"line {name.start_mark.line + 1}"
            yield from _lines(value, (*key, name.value))
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield (*key, index), f"line {item.start_mark.line + 1}"
            yield from _lines(item, (*key, index))


def _copied(value: Any) -> Any:
    """A copy that shares nothing: what an anchor is used for twice may be overridden once."""
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


def _where(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    return "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"


def _yaml_problem(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or error.context or "it cannot be read"
    if "'\\t'" in problem:
        return f"{problem} (YAML indents with spaces, never with tabs)"
    return problem


def _type_name(value: Any) -> str:
    names = {list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)


def _apply_override(draft: Draft, override: str) -> None:
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"cannot read override '{override}': write --set section.key=value")
    node: Any = draft.values
    location: Key = ()
    for depth, key in enumerate(keys[:-1]):
        if isinstance(node, list):
            node = _list_item(node, key, override)
            location = (*location, int(key))
        else:
            if node.get(key) is None:
                node[key] = {}
            node = node[key]
            location = (*location, key)
        if not isinstance(node, dict | list):
            raise ConfigError(
                f"override '{override}': '{'.'.join(keys[: depth + 1])}' is a value, not a section"
            )
    value = _parse(text, f"override '{override}'")
    last: str | int = keys[-1]
    if isinstance(node, list):
        _list_item(node, keys[-1], override)
        last = int(keys[-1])
    node[last] = value
    location = (*location, last)
    for known in [known for known in draft.places if known[: len(location)] == location]:
        del draft.places[known]
    for length in range(1, len(location) + 1):
        draft.places.setdefault(location[:length], f"--set {override}")
    draft.places[location] = f"--set {override}"


def _list_item(items: list[Any], key: str, override: str) -> Any:
    if not re.fullmatch(r"[0-9]{1,9}", key) or int(key) >= len(items):
        raise ConfigError(f"override '{override}': '{key}' is not an index below {len(items)}")
    return items[int(key)]


def _explain(error: ValidationError, draft: Draft, kind: type[BaseModel]) -> str:
    lines = []
    for item in error.errors():
        location = item["loc"]
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message = unknown_name("key", str(location[-1]), _known_keys(location[:-1], kind))
        elif item["type"] == "literal_error":
            message += _given(item["input"], location) + _nearest_choice(
                item["input"], item["ctx"]["expected"]
            )
        else:
            message += _given(item["input"], location)
        place = draft.place_of(location) or draft.place_of(_quoted_key(message))
        shown = ".".join(str(part) for part in location) or "(top level)"
        lines.append(f"  {shown}{f' ({place})' if place else ''}: {message}")
    if len(lines) > _MOST_ERRORS:
        lines[_MOST_ERRORS:] = [f"  ... and {len(lines) - _MOST_ERRORS} more"]
    return f"{draft.source} cannot be used:\n" + "\n".join(lines)


def _given(value: Any, location: Key) -> str:
    if isinstance(value, dict) or (location and location[-1] in _SECRET_KEYS):
        return ""
    shown = repr(value)
    return f" (got {shown if len(shown) <= _MOST_SHOWN else shown[:_MOST_SHOWN] + '...'})"


def _quoted_key(message: str) -> Key:
    """The key that a message about a whole section begins with: `'sweep.weights[1]': unknown ...`."""
    match = re.match(r"'([\w.\[\]]+)'", message)
    parts = re.findall(r"\w+", match.group(1)) if match else []
    return tuple(int(part) if part.isdecimal() else part for part in parts)


def _nearest_choice(value: Any, expected: str) -> str:
    """` Did you mean 'trl'?` where one of the quoted choices in pydantic's text is close to the value."""
    close = difflib.get_close_matches(str(value), re.findall(r"'([^']*)'", expected), n=1)
    return f". Did you mean '{close[0]}'?" if close else ""


def _known_keys(location: Key, kind: type[BaseModel]) -> list[str]:
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
            ] or candidates
    return list(candidates[0].model_fields)


def _tag(section: type[BaseModel]) -> str | None:
    info = section.model_fields.get("kind")
    return None if info is None or info.default is PydanticUndefined else str(info.default)


def _sections_of(info: FieldInfo) -> list[type[BaseModel]]:
    candidates: list[Any] = [info.annotation]
    sections = []
    while candidates:
        annotation = candidates.pop()
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            sections.append(annotation)
        candidates.extend(getattr(annotation, "__args__", ()))
    return sections
