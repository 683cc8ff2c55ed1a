"""The claims of several finished runs side by side, as a Markdown table.

    python benchmarks/claims_by_seed.py runs/quickstart runs/seed1 runs/seed2

One column per run (its seed), one row per claim: paired difference with its interval, and whether it holds.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(folders: list[str]) -> None:
    """Print the table; runs must have made the same claims."""
    reports = [json.loads((Path(folder) / "report" / "results.json").read_text()) for folder in folders]
    print("| claim | " + " | ".join(f"seed {report['measurement']['seed']}" for report in reports) + " |")
    print("|---|" + "---|" * len(reports))
    for claims in zip(*(report["claims"] for report in reports), strict=True):
        assert len({claim["key"] for claim in claims}) == 1, "the runs made different claims"
        indent = "" if claims[0]["required"] else "– "
        print(f"| {indent}{claims[0]['statement']} | " + " | ".join(map(cell, claims)) + " |")
    print("| hypervolume of the sweep | " + " | ".join(map(volume, reports)) + " |")


def cell(claim: dict[str, Any]) -> str:
    """`+0.076 [+0.059, +0.094]`, or how many points are on the front; a failing claim says so."""
    verdict = "" if claim["holds"] else " **does not hold**"
    if claim["key"] == "front":
        return claim["evidence"].split(" distinct")[0] + verdict
    difference = claim["difference"]
    return f"{difference['value']:+.3f} [{difference['low']:+.3f}, {difference['high']:+.3f}]{verdict}"


def volume(report: dict[str, Any]) -> str:
    """The sweep's hypervolume with its interval."""
    sweep = report["hypervolume"]["sweep"]
    return f"{sweep['value']:.3f} [{sweep['low']:.3f}, {sweep['high']:.3f}]"


if __name__ == "__main__":
    main(sys.argv[1:])
