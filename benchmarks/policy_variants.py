"""One way to make pairs and train the policy against others, on a finished run's rollouts and students.

    python benchmarks/policy_variants.py RUN OUT/base.json
    python benchmarks/policy_variants.py RUN OUT/all.json --pairs '{"selection": "all"}' \
        --policy '{"beta": 0.5, "training": {"learning_rate": 3e-5}}'
    python benchmarks/policy_variants.py --table OUT/base.json OUT/all.json

The policy is trained in this process (no Ray) and played unguided at seven balances against students
that no stage of the run has met, or with `--students-of-report` against those of the run's own table. With
`"extends"` in `--policy` only the objectives that the extended policy lacks are trained. `--table` compares
files over the same students: hypervolume over (0, 0) with its interval and the paired difference to the
first file.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from finished_run import fresh_player, read_config, train_policy
from measuring import balances

from mahalo_ray.config import PairsConfig, RunConfig
from mahalo_ray.data.records import PreferencePair
from mahalo_ray.evaluation.methods import Method
from mahalo_ray.evaluation.results import ComparisonTable, MethodResult
from mahalo_ray.evaluation.statistics import percentile_interval
from mahalo_ray.pipeline.run import extended_policy
from mahalo_ray.rollouts.pair_building import CandidateShards, build_pairs
from mahalo_ray.training.policy_methods import new_objectives

SHARES = (1.0, 0.9, 0.7, 0.5, 0.3, 0.1, 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", nargs="?", help="a finished run of a miniature, which is only read")
    parser.add_argument("output", nargs="?", help="JSON file for the result")
    parser.add_argument("--pairs", default="{}", help="JSON over the run's `pairs`")
    parser.add_argument("--policy", default="{}", help="JSON over the run's `policy`")
    parser.add_argument("--model", help="play this policy instead of training one")
    parser.add_argument("--candidates", nargs="*", help="folders of candidate sets; default: the run's")
    parser.add_argument("--keep", help="folder for the trained policy")
    parser.add_argument("--students", type=int, default=240)
    parser.add_argument("--students-of-report", action="store_true", help="play those of the run's own table")
    parser.add_argument("--table", nargs="+", help="result files to compare")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.table:
        print_table(arguments.table)
        return
    result = measure(arguments)
    Path(arguments.output).write_text(json.dumps(result))
    print_table([arguments.output])


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Pairs, training and play of one variant."""
    config = read_config(arguments.run)
    began, result = time.monotonic(), {"pairs": {}, "metrics": {}}
    model = arguments.model
    if model is None:
        model = arguments.keep or tempfile.mkdtemp(prefix="policy-variant-")
        result |= train(config, arguments, model)
    result["train_s"] = time.monotonic() - began
    player = fresh_player(config, arguments.students, model, of_report=arguments.students_of_report)
    points = balances(config.objective_names, SHARES).items()
    methods = [Method(name, "weights", weights=weights, sweep=True) for name, weights in points]
    result["methods"] = [player.run(method).result.model_dump(mode="json") for method in methods]
    return result


def train(config: RunConfig, arguments: argparse.Namespace, folder: str) -> dict[str, Any]:
    """The policy of this variant, in `folder`; returns what its pairs and its training were like."""
    settings = PairsConfig.model_validate(config.pairs.model_dump() | json.loads(arguments.pairs))
    given = json.loads(arguments.policy)
    if "extends" in given:
        given["extends"] = extended_policy(given["extends"])
        trained = new_objectives(given["extends"], config.objective_names)
    else:
        trained = config.objective_names
    folders = arguments.candidates or [f"{arguments.run}/pair_rollouts/candidates"]
    pairs: list[PreferencePair] = []
    figures = {}
    for number, candidates in enumerate(folders):
        for objective in trained:
            made, report = build_pairs(CandidateShards(candidates), objective, settings)
            pairs += [pair.model_copy(update={"id": f"{number}/{pair.id}"}) for pair in made]
            figures[f"{number}/{objective}"] = report.describe()
            print(report.describe(), flush=True)
    config = config.model_copy(update={"pairs": settings})
    return {"pairs": figures, **train_policy(config, pairs, config.objective_names, folder, given)}


def print_table(files: list[str]) -> None:
    """One line per file."""
    documents = [json.loads(Path(file).read_text()) for file in files]
    methods = []
    for number, document in enumerate(documents):
        for method in document["methods"]:
            methods.append(MethodResult.model_validate({**method, "name": f"{number}/{method['name']}"}))
    names = list(methods[0].values)
    table = ComparisonTable(methods, names)
    size = len(documents[0]["methods"])
    base, base_samples = table.hypervolumes(range(size))
    print(
        "| variant | HV | minus the first | ends | KL | malformed | training |\n|---|---|---|---|---|---|---|"
    )
    for number, (file, document) in enumerate(zip(files, documents, strict=True)):
        own = methods[number * size : (number + 1) * size]
        volume, samples = table.hypervolumes(range(number * size, (number + 1) * size))
        low, high = percentile_interval(samples, 0.95)
        low_d, high_d = percentile_interval(samples - base_samples, 0.95)
        highest = [max(sum(m.values[name]) / len(m.values[name]) for m in own) for name in names]
        ends = " / ".join(f"{value:.3f}" for value in highest)
        kl = [m.kl_to_reference or 0.0 for m in own]
        malformed = [m.malformed_rate for m in own]
        print(
            f"| {Path(file).stem} | {volume:.4f} [{low:.3f}, {high:.3f}] "
            f"| {volume - base:+.4f} [{low_d:+.3f}, {high_d:+.3f}] | {ends} "
            f"| {min(kl):.2f} to {max(kl):.2f} | {min(malformed):.3f} to {max(malformed):.3f} "
            f"| {document['train_s']:.0f} s |",
            flush=True,
        )


if __name__ == "__main__":
    main()
