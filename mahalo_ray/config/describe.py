"""Configurations explained from their schema: commented files to begin with, and the docs' reference page.

Both are made of the fields' docstrings, types, ranges and defaults: nothing is written twice.
"""

from __future__ import annotations

import inspect
import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mahalo_ray.config.label_config import LabelConfig
from mahalo_ray.config.loading import ConfigError
from mahalo_ray.config.rollout_config import DialoguesConfig, GenerateConfig
from mahalo_ray.config.run_config import ROLLOUT_SECTIONS, RunConfig
from mahalo_ray.config.section import MAX_COUNT, Section
from mahalo_ray.objectives import unknown_name

_WIDTH = 110
_SHORT = 40  # characters of a default that the reference page shows in full


@dataclass(frozen=True)
class DocumentKind:
    """One kind of configuration file: the verbs that read it, its schema, values to begin with (those a user
    has to choose), and keys that this kind makes no use of."""

    title: str
    verbs: str
    schema: type[Section]
    start: dict[str, Any]
    unused: tuple[str, ...] = ()


_ENDPOINT = {"base_url": "http://localhost:8000/v1", "model": "MODEL"}
DOCUMENTS = {
    "run": DocumentKind(
        "a run that plays dialogues in the tutoring miniature",
        "`mahalo run` and the verbs of its stages",
        RunConfig,
        {
            "name": "my_run",
            "output": "runs/my_run",
            "objectives": [
                {"name": "accuracy", "supervision": "rollout_value"},
                {"name": "engagement", "supervision": "judged_prefix"},
            ],
            "model": {"scratch": {}},
            "reward_rollouts": {"continuations": 3},
            "sweep": {
                "weights": [{"accuracy": 0.75, "engagement": 0.25}, {"accuracy": 0.25, "engagement": 0.75}]
            },
            "guided": {
                "weights": {"accuracy": 0.5, "engagement": 0.5},
                "guidance": {"accuracy": 0.5, "engagement": 0.5},
            },
        },
        unused=("data",),
    ),
    "dataset": DocumentKind(
        "a run on preference pairs (or step traces) of your own",
        "`mahalo policy`, and `mahalo reward` with traces",
        RunConfig,
        {
            "name": "my_pairs",
            "output": "runs/my_pairs",
            "data": {"pairs": [{"path": "pairs.jsonl", "objective_field": "objective"}]},
            "objectives": [
                {"name": "helpful", "supervision": "pairwise"},
                {"name": "honest", "supervision": "pairwise"},
            ],
            "model": {"base": "MODEL_FOLDER"},
        },
        unused=ROLLOUT_SECTIONS,
    ),
    "dialogues": DocumentKind(
        "tutor-student dialogues, their candidates and pairs",
        "`mahalo dialogues`",
        DialoguesConfig,
        {
            "name": "my_dialogues",
            "output": "runs/my_dialogues",
            "tutor": {"kind": "model", "path": "MODEL_FOLDER"},
            "student": {"kind": "endpoint", "endpoint": _ENDPOINT},
            "cases": {"kind": "prefixes", "path": "beginnings.jsonl"},
            "play": {"turns": 4},
        },
    ),
    "label": DocumentKind(
        "labels for the steps of traces, and the calibration of judges",
        "`mahalo label` and `mahalo calibrate`",
        LabelConfig,
        {
            "name": "my_labels",
            "output": "runs/my_labels",
            "domain": "math",
            "objectives": [{"name": "accuracy", "supervision": "rollout_value"}],
            "judges": {"accuracy": {"kind": "checker"}},
            "input": {"traces": [{"path": "solutions.jsonl"}]},
            "continuations": {"policy": "MODEL_FOLDER"},
        },
    ),
    "generate": DocumentKind(
        "answers to many prompts by guided decoding",
        "`mahalo generate PROMPTS --config`",
        GenerateConfig,
        {
            "prompts": "prompts.jsonl",
            "output": "runs/answers",
            "policy": "RUN_OR_MODEL_FOLDER",
            "rewards": [{"model": "RUN_OR_MODEL_FOLDER"}],
        },
    ),
}


def document_kind(name: str) -> DocumentKind:
    """The kind of this name; ConfigError with the nearest known one."""
    if name not in DOCUMENTS:
        raise ConfigError(unknown_name("kind of configuration", name, DOCUMENTS))
    return DOCUMENTS[name]


def kind_of(document: Mapping[str, Any]) -> str:
    """The kind of a document by its keys: the one that knows most of them."""
    known = {name: set(kind.schema.model_fields) for name, kind in DOCUMENTS.items()}
    if document.get("data") is not None:
        return "dataset"
    shared = {name: known[name] & set(document) for name in ("run", "dialogues", "label", "generate")}
    return max(shared, key=lambda name: len(shared[name]))


def commented_config(name: str) -> str:
    """A configuration of this kind as YAML that loads: every key with its description, range and default.

    Sections that may be left out, and the other members of a choice, stand there as comments.
    """
    kind = document_kind(name)
    document = kind.schema.model_validate(kind.start)
    head = (
        f"Configuration of {kind.title}, for {kind.verbs}. Change the values that you care about; a key that "
        "is left out has its default. Keys marked 'choose' have none."
    )
    lines = [f"# {line}" for line in textwrap.wrap(head, _WIDTH - 2)]
    for field, info in kind.schema.model_fields.items():
        if field not in kind.unused:
            lines += ["", *_field(kind.schema, field, info, getattr(document, field))]
    return "\n".join(lines) + "\n"


def _field(section: type[Section], name: str, info: FieldInfo, value: Any) -> list[str]:
    """The lines of one key: comment, key and value, and what could stand there instead as comments."""
    text = " ".join((info.description or "").split())
    notes = [_range_text(section, name)]
    if info.is_required():
        notes.append("choose")
    elif not field_sections(info) and value != info.get_default(call_default_factory=True):
        notes.append(f"default: {_yaml(_plain(info.get_default(call_default_factory=True)))}")
    note = "; ".join(filter(None, notes))
    comment = f"{text} [{note}]" if note else text
    lines = [f"# {line}" for line in textwrap.wrap(comment, _WIDTH - 10)]
    return lines + _value(name, value) + _alternatives(name, info, value)


def _value(name: str, value: Any) -> list[str]:
    if isinstance(value, Section):
        return [f"{name}:", *_indented(_body(value))]
    if isinstance(value, list) and value and isinstance(value[0], Section):
        lines = [f"{name}:", *_indented(_item(_body(value[0])))]
        given = [item.model_dump(mode="json", exclude_unset=True) for item in value[1:]]
        return lines + [f"  - {_yaml(item)}" for item in given]
    if isinstance(value, dict) and value and isinstance(next(iter(value.values())), Section):
        inner = [line for key, section in value.items() for line in _value(key, section)]
        return [f"{name}:", *_indented(inner)]
    return [f"{name}: {_yaml(_plain(value))}"]


def _body(section: Section) -> list[str]:
    fields = type(section).model_fields
    return [
        line
        for name, info in fields.items()
        for line in _field(type(section), name, info, getattr(section, name))
    ]


def _alternatives(name: str, info: FieldInfo, value: Any) -> list[str]:
    """Sections that could stand here and do not, commented out."""
    shown = type(value) if isinstance(value, Section) else None
    if isinstance(value, list | dict) and value:
        values = list(value.values()) if isinstance(value, dict) else value
        shown = type(values[0])
    lines = []
    for section in field_sections(info):
        if section is shown or (shown is not None and not _kind_of(section)):
            continue
        block = _blank(section)
        if _is_list(info):
            block = _item(block)
        elif isinstance(value, dict):
            block = ["NAME:", *_indented(block)]
        lines += [f"# {line}" for line in (f"{name}:", *_indented(block))]
    return lines


def _blank(section: type[Section]) -> list[str]:
    """The keys of a section that nobody has filled in: nothing stands where a value has to be chosen."""
    lines = []
    for name, info in section.model_fields.items():
        if info.is_required():
            inner = field_sections(info)
            block = _blank(inner[0]) if inner else []
            nested = [f"{name}:", *_indented(_item(block) if inner and _is_list(info) else block)]
            note = _range_text(section, name)
            text = f"{' '.join((info.description or '').split())} [{note + '; ' if note else ''}choose]"
            lines += [f"# {line}" for line in textwrap.wrap(text, _WIDTH - 16)] + nested
        else:
            lines += _field(section, name, info, info.get_default(call_default_factory=True))
    return lines


def _item(body: list[str]) -> list[str]:
    """The lines of a mapping as an item of a list: the dash stands before the first key."""
    first = next(index for index, line in enumerate(body) if not line.startswith("#"))
    return [("- " if index == first else "  ") + line for index, line in enumerate(body)]


def _indented(lines: Sequence[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def _plain(value: Any) -> Any:
    """A default as JSON values."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_unset=True)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return dict(value) if hasattr(value, "keys") else value


def _yaml(value: Any) -> str:
    if isinstance(value, str) and "\n" in value:
        return json.dumps(value)
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _kind_of(section: type[Section]) -> Any:
    """The value of `kind` that chooses this section among others; None if there is no such choice."""
    info = section.model_fields.get("kind")
    return None if info is None else info.default


def _is_list(info: FieldInfo) -> bool:
    return _mentions(info.annotation, list)


def _mentions(annotation: Any, kind: type) -> bool:
    return getattr(annotation, "__origin__", None) is kind or any(
        _mentions(argument, kind) for argument in get_args(annotation)
    )


def field_sections(info: FieldInfo) -> list[type[Section]]:
    """The sections that a field may hold, alone or in a list or mapping."""
    return list(_sections_in(info.annotation))


def _sections_in(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections_in(argument)


def _range_text(section: type[Section], name: str) -> str:
    """Type and range of a field in words, from the JSON schema: `whole number, at least 1`."""
    schema = section.model_json_schema()
    return _words(schema["properties"][name], schema.get("$defs", {}))


def _words(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    if "$ref" in schema:
        return ""  # a section: its own keys follow
    for several in ("anyOf", "oneOf"):
        if several in schema:
            words = [_words(member, definitions) for member in schema[several]]
            return "; or ".join(dict.fromkeys(filter(None, words)))
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return "one of " + ", ".join(f"`{value}`" for value in schema["enum"])
    match schema.get("type"):
        case "integer":
            return "whole number" + _limits(schema)
        case "number":
            return "number" + _limits(schema)
        case "string":
            return "text"
        case "boolean":
            return "`true` or `false`"
        case "null":
            return "`null`"
        case "array":
            items = schema.get("items") or (schema.get("prefixItems") or [{}])[0]
            return ("two of: " if "prefixItems" in schema else "list of: ") + (
                _words(items, definitions) or "sections"
            )
        case "object":
            inner = _words(schema.get("additionalProperties") or {}, definitions)
            return "mapping of names to " + (inner or "sections")
    return ""


def _limits(schema: dict[str, Any]) -> str:
    if "minimum" in schema and schema.get("maximum", MAX_COUNT) < MAX_COUNT:
        return f" from {schema['minimum']:g} to {schema['maximum']:g}"
    words = []
    for key, word in (("exclusiveMinimum", "above"), ("minimum", "at least")):
        if key in schema:
            words.append(f"{word} {schema[key]:g}")
    for key, word in (("exclusiveMaximum", "below"), ("maximum", "at most")):
        if key in schema and schema[key] < MAX_COUNT:
            words.append(f"{word} {schema[key]:g}")
    return "".join(f", {word}" for word in words)


def reference_page() -> str:
    """The page of the docs that lists every key of every document, as Markdown."""
    lines = [
        "# Configuration reference",
        "",
        "Every key of every kind of document, made from the schema (`mahalo_ray/config/`). `mahalo config "
        "KIND` prints the same as a file to begin with; [Configuration](configuration.md) explains how "
        "documents are read, and which keys matter.",
        "",
        "A key without a default has to be given. Lengths are tokens, times seconds, sizes global unless "
        "their name says `per_device` or `per_actor`.",
    ]
    places = _places()
    schemas = {kind.schema: name for name, kind in reversed(DOCUMENTS.items())}
    for section, used in places.items():
        kinds = [kind for kind in DOCUMENTS.values() if kind.schema is section]
        if kinds:
            title = " and ".join(kind.title for kind in kinds)
            lines += ["", f"## `{schemas[section]}`: {title}", "", _doc(section)]
        else:
            lines += ["", f"### {section.__name__}", "", f"At {', '.join(f'`{place}`' for place in used)}."]
            lines += ["", _doc(section)]
            lines += _defaults_by_place(section)
        lines += ["", "| key | value | default | meaning |", "|---|---|---|---|"]
        for name, info in section.model_fields.items():
            lines.append(f"| `{name}` | {_cell(section, name, info)} | {_default(info)} | {_meaning(info)} |")
    return "\n".join(lines) + "\n"


def _doc(section: type[Section]) -> str:
    text, _, _ = inspect.cleandoc(section.__doc__ or "").partition(">>>")
    return " ".join(text.split())


def _meaning(info: FieldInfo) -> str:
    return " ".join((info.description or "").split()).replace("|", "\\|")


def _cell(section: type[Section], name: str, info: FieldInfo) -> str:
    inner = [f"[{s.__name__}](#{s.__name__.lower()})" for s in dict.fromkeys(field_sections(info))]
    words = _range_text(section, name)
    if not inner:
        return words.replace("|", "\\|")
    joined = " or ".join(inner)
    if words.startswith(("list of: sections", "mapping of names to sections")):
        return words.replace("sections", joined, 1)
    return f"{joined}; or {words}" if words else joined


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return ""
    text = _yaml(_plain(info.get_default(call_default_factory=True)))
    if field_sections(info) and text in ("{}",):
        return "its own"
    return f"`{text}`" if len(text) <= _SHORT else "see the section"


def _places() -> dict[type[Section], list[str]]:
    """Every section, in the order of the documents, with the paths where it stands."""
    places: dict[type[Section], list[str]] = {}

    def visit(section: type[Section], path: str) -> None:
        for name, info in section.model_fields.items():
            for inner in dict.fromkeys(field_sections(info)):
                place = f"{path}.{name}" if path else name
                known = places.setdefault(inner, [])
                if place not in known:
                    known.append(place)
                visit(inner, place)

    for kind in DOCUMENTS.values():
        if kind.schema not in places:
            places[kind.schema] = []
            visit(kind.schema, "")
    return places


def _defaults_by_place(section: type[Section]) -> list[str]:
    """Where a parent gives this section other defaults than the table's."""
    notes = []
    for parent in _places():
        for name, info in parent.model_fields.items():
            default = info.default
            if isinstance(default, section) and type(default) is section and default.model_fields_set:
                given = ", ".join(
                    f"`{key}: {_yaml(_plain(getattr(default, key)))}`"
                    for key in section.model_fields
                    if key in default.model_fields_set
                )
                notes.append(f"In {parent.__name__}.{name}: {given}.")
    return ["", "Other defaults: " + " ".join(sorted(notes))] if notes else []
