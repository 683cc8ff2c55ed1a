"""What the figures of a policy step say: medians, ratios, losses that must agree, a table."""

from __future__ import annotations

import statistics
from typing import Any

from measuring import mib, table


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over all timed steps and processes."""
    seconds = [value for run in runs for value in run["seconds"]]
    above = statistics.median(run["peak"] - run["base"] for run in runs)
    fixed = runs[0]["gradients"] + runs[0]["optimizer"]
    return {
        "seconds": statistics.median(seconds),
        "all_seconds": seconds,
        "forward_backward": statistics.median(value for run in runs for value in run["forward_backward"]),
        "loss": runs[0]["losses"][0],
        "weights": runs[0]["weights"],
        "gradients_and_optimizer": fixed,
        "above_weights": above,
        "workspace": above - fixed,
    }


def ratios(variants: dict[str, dict[str, Any]]) -> dict[str, float]:
    """How many times faster, how much of the memory: for every pair of variants that has a reading."""
    found: dict[str, float] = {}

    def compare(label: str, ours_name: str, other_name: str) -> None:
        if ours_name in variants and other_name in variants:
            own, other = variants[ours_name], variants[other_name]
            found[f"{label}: times as fast"] = other["seconds"] / own["seconds"]
            for figure in ("above_weights", "workspace"):
                found[f"{label}: share of {figure}"] = own[figure] / other[figure]

    for kind in ("full", "low_rank", "recomputed", "lora", "lora_recomputed"):
        for heads in sorted(
            {int(name.rpartition("=")[2]) for name in variants if name.startswith("textbook")}
        ):
            label = f"{kind} against textbook, H={heads}"
            compare(label, f"ours, {kind}, H={heads}", f"textbook, H={heads}")
        trl_names = [name for name in variants if name.startswith("TRL")]
        if trl_names:
            best = min(trl_names, key=lambda name: variants[name]["seconds"])
            compare(f"{kind}, H=1 against {best}", f"ours, {kind}, H=1", best)
        one = variants.get(f"ours, {kind}, H=1")
        for name, own in variants.items():
            if one is not None and name.startswith(f"ours, {kind}") and own is not one:
                heads = int(name.rpartition("=")[2])
                found[f"{kind}, H={heads}: time over that of H=1"] = own["seconds"] / one["seconds"]
    return found


def checks(variants: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Differences of losses that must be the same number."""
    found = {}
    for name, figures in variants.items():
        if name.startswith("textbook"):
            partners = [f"ours, full, {name.partition(', ')[2]}"]
        elif name.startswith("TRL"):
            partners = ["ours, full, H=1", "ours, low_rank, H=1"]
        else:
            continue
        for partner in partners:
            if partner in variants:
                difference = abs(figures["loss"] - variants[partner]["loss"])
                found[f"loss of {name} against {partner}"] = difference
    return found


def report(results: dict[str, Any]) -> str:
    """Everything for the terminal."""
    sizes, about = results["sizes"], results["machine"]
    header = ["variant", "step s", "fwd+bwd s", "weights", "above weights", "workspace", "loss"]
    rows = [
        [
            name,
            f"{one['seconds']:.3f}",
            f"{one['forward_backward']:.3f}",
            *(mib(one[figure]) for figure in ("weights", "above_weights", "workspace")),
            f"{one['loss']:.6f}",
        ]
        for name, one in results["variants"].items()
    ]
    lines = [
        f"{sizes['preset']}, {sizes['pairs']} pairs, {sizes['dtype']} on {sizes['device']}; chosen "
        f"{sizes['lengths_chosen']}, rejected {sizes['lengths_rejected']} tokens, prompts "
        f"{sizes['prompt_tokens']}",
        f"{about['processor']}, {about['threads']} threads, load at the start "
        f"{about['load_average_at_start']}",
        f"median of {results['rounds'] * results['steps_per_round']} steps; reference log-probs once: "
        f"{results['reference_seconds']:.1f} s",
        "",
        table(header, rows),
        "",
        *(f"{label}: {value:.2f}" for label, value in results["ratios"].items()),
        "",
        *(f"{label}: {value:.1e} apart" for label, value in results["checks"].items()),
    ]
    return "\n".join(lines)
