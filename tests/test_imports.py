"""The structure of the package: layers import downwards only, no circles, no file that belongs in its only
importer, one meaning per name, and torch code that does not know Ray."""

from __future__ import annotations

import ast
from collections import Counter, defaultdict
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import mahalo_ray

PACKAGE = Path(mahalo_ray.__file__).parent

# From the ground up. Layers of one line may not import each other.
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
RANK = {layer: level for level, layers in enumerate(ORDER) for layer in layers}
WITHOUT_RAY = {layer for layers in ORDER[:8] for layer in layers}  # up to and with decoding
TORCH_ONLY = {"losses", "logprobs"}

LONGEST_FILE = 700  # lines; most files have 150 to 600

# Files that one file of their own package imports, and why they stand apart from it.
APART = {
    "cli/commands.py": "keeps what the verbs import out of `mahalo --version`",
    "cli/sweep_commands.py": "with the other verbs it would pass the longest file",
    "decoding/cached_scorer.py": "with the scorers it would pass the longest file",
    "decoding/token_loop.py": "with the engine it would pass the longest file",
    "domains/maths/explanations.py": "a judge that configurations name, of any text",
    "rollouts/continuations.py": "with the labelling job it would pass the longest file",
    "serving/app.py": "runs in a replica: keeps FastAPI out of the launcher",
    "serving/backend.py": "runs in a replica: keeps torch out of the launcher",
    "serving/remote_scorer.py": "runs in a replica: keeps torch out of the launcher",
    "serving/upstream.py": "how replicas are asked, apart from what the proxy answers itself",
    "training/policy_metrics.py": "with the recipe it would pass the longest file",
    "training/recipes.py": "runs on workers: keeps DeepSpeed out of the driver",
    "training/reward_recipe.py": "an entry of the registry of recipes",
    "training/sft_recipe.py": "an entry of the registry of recipes",
    "training/tracking.py": "keeps experiment trackers out of runs that report to none",
}


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


FILES = {module_name(file): file for file in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(file.read_text(encoding="utf-8"), str(file)) for name, file in FILES.items()}


def layer_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports() -> Iterator[tuple[str, int, str]]:
    """(importing module, line, imported name) of every import statement, wherever it stands."""
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                yield from ((module, node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{module}:{node.lineno}: imports inside the package are absolute"
                assert node.module is not None
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                yield from ((module, node.lineno, name) for name in names)


def edges() -> dict[str, set[str]]:
    """Module -> modules of the package that it imports."""
    found: dict[str, set[str]] = {module: set() for module in FILES}
    for module, _, name in imports():
        imported = name if name in FILES else name.rpartition(".")[0]
        if imported in FILES and imported != module:
            found[module].add(imported)
    return found


def test_every_layer_has_its_place() -> None:
    layers = {layer_of(file) for name, file in FILES.items() if name != "mahalo_ray"}
    assert layers <= set(RANK), f"put {layers - set(RANK)} into the order"
    assert set(RANK) <= layers, f"{set(RANK) - layers} are no longer there"


def test_layers_import_only_layers_below_them() -> None:
    wrong = []
    for module, line, name in imports():
        parts = name.split(".")
        layer = layer_of(FILES[module])
        if module == "mahalo_ray" or parts[0] != "mahalo_ray" or len(parts) < 2 or parts[1] not in RANK:
            continue
        if parts[1] != layer and RANK[parts[1]] >= RANK[layer]:
            wrong.append(f"{module}:{line}: {layer} imports {parts[1]}")
    assert wrong == []


def test_no_files_import_each_other_in_a_circle() -> None:
    # The root's names are loaded on first use: importing the package imports none of it.
    graph = {module: found for module, found in edges().items() if module != "mahalo_ray"}
    graph = {module: found - {"mahalo_ray"} for module, found in graph.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None


def test_a_file_with_one_importer_in_its_package_is_part_of_it() -> None:
    importers: dict[str, set[str]] = defaultdict(set)
    for module, imported in edges().items():
        for name in imported:
            importers[name].add(module)
    alone = set()
    for name, users in importers.items():
        file = FILES[name]
        only = FILES[next(iter(users))]
        # An importer in another package, or the package's own __init__, makes a file part of the interface.
        if (
            len(users) == 1
            and only.parent == file.parent != PACKAGE
            and "__init__.py"
            not in (
                file.name,
                only.name if layer_of(file) != "cli" else "",
            )
        ):
            alone.add(file.relative_to(PACKAGE).as_posix())
    assert alone == set(APART)


def test_names_have_one_meaning() -> None:
    stems = Counter(file.stem for file in FILES.values() if file.name != "__init__.py")
    assert [stem for stem, count in stems.items() if count > 1] == []
    classes: dict[str, list[str]] = defaultdict(list)
    for module, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                classes[node.name].append(module)
    assert {name: where for name, where in classes.items() if len(where) > 1} == {}


def test_no_file_is_too_long_to_read() -> None:
    lengths = {name: len(file.read_text(encoding="utf-8").splitlines()) for name, file in FILES.items()}
    assert {name: length for name, length in lengths.items() if length > LONGEST_FILE} == {}


def test_torch_code_does_not_know_ray() -> None:
    wrong = [
        f"{module}:{line}: {name}"
        for module, line, name in imports()
        if layer_of(FILES[module]) in WITHOUT_RAY and name.split(".")[0] in ("ray", "deepspeed")
    ]
    # Under ZeRO-3 a head's rows are gathered by DeepSpeed: the one place that has to know of it.
    assert [w for w in wrong if not w.startswith("mahalo_ray.models.sharding")] == []


def test_losses_know_torch_alone() -> None:
    standard = {
        "__future__",
        "collections",
        "contextlib",
        "dataclasses",
        "enum",
        "functools",
        "math",
        "typing",
    }
    allowed = {*standard, "torch"}
    own = tuple(f"mahalo_ray.{module}" for module in TORCH_ONLY)
    wrong = [
        f"{module}:{line}: {name}"
        for module, line, name in imports()
        if layer_of(FILES[module]) in TORCH_ONLY
        and name.split(".")[0] not in allowed
        and not name.startswith(own)
    ]
    assert wrong == []
