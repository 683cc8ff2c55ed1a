"""What playing dialogues costs: dialogues in flight, actors with a slow student, kept caches, a long queue.

    python benchmarks/rollouts.py --output rollouts.json
    python benchmarks/rollouts.py --quick          # does it run?

Tutors are models with random weights; students answer from a list, or from a server on this machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from measuring import machine, write_results
from rollout_driver import actors, queue
from rollout_engine import in_flight, kept_cache
from rollout_shards import shards
from shapes import ABOUT_1M, SMOLLM2_135M, TINY

SHAPES = {"1m": ABOUT_1M, "135m": SMOLLM2_135M}


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    results: dict[str, Any] = {"benchmark": "rollouts", "machine": machine(), "quick": options.quick}
    shape, device = TINY if options.quick else SHAPES[options.model], torch.device(options.device)
    parts = {
        "in_flight": lambda: in_flight(shape, options.quick, device),
        "kept_cache": lambda: kept_cache(shape, options.quick, device),
        "queue": lambda: queue([100, 1000] if options.quick else [1000, 10_000, 100_000]),
        "shards": lambda: shards(20 if options.quick else 400),
        "actors": lambda: actors([1, 2] if options.quick else [1, 2, 4, 8], options.quick),
    }
    for name in options.parts:
        results[name] = parts[name]()
        write_results(options.output, results)
    print(f"written to {options.output}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one round")
    parser.add_argument(
        "--parts", nargs="+", default=["in_flight", "kept_cache", "queue", "shards", "actors"]
    )
    parser.add_argument("--model", choices=list(SHAPES), default="1m", help="of in_flight and kept_cache")
    parser.add_argument("--device", default="cpu", help="of in_flight and kept_cache: cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of this process")
    parser.add_argument("--output", type=Path, default=Path("rollouts.json"))
    return parser


if __name__ == "__main__":
    main()
