"""What the figures of guided decoding say: medians, agreement, ratios, tables."""

from __future__ import annotations

import statistics
from typing import Any

from decoding_task import Outcome
from measuring import mib, table


def summary(runs: list[Outcome]) -> dict[str, Any]:
    """Medians; counts are the same in every repeat."""
    one = runs[0]
    seconds = statistics.median(run.seconds for run in runs)
    return {
        "seconds": seconds,
        "all_seconds": [run.seconds for run in runs],
        "seconds_per_output_token": seconds / len(one.token_ids),
        "output_tokens": len(one.token_ids),
        "policy_tokens": one.policy_tokens,
        "reward_tokens": one.reward_tokens,
        "policy_cache_bytes": one.policy_cache_bytes,
        "reward_cache_bytes": one.reward_cache_bytes,
        "cache_bytes_copied": one.cache_bytes_copied,
        "phases": {name: statistics.median(run.phases[name] for run in runs) for name in one.phases},
    }


def agree(other: Outcome, own: Outcome) -> dict[str, Any]:
    """Whether two ways gave the same answer, and how far their scores are apart where texts are the same."""
    same_until = 0
    for own_choice, other_choice in zip(own.choices, other.choices, strict=True):
        if own_choice != other_choice:
            break
        same_until += 1
    apart = [
        abs(x - y)
        for own_step, other_step in zip(own.scores[: same_until + 1], other.scores, strict=False)
        for own_scores, other_scores in zip(own_step, other_step, strict=True)
        for x, y in zip(own_scores, other_scores, strict=True)
    ]
    return {
        "same_tokens": own.token_ids == other.token_ids,
        "same_choices": own.choices == other.choices,
        "largest_score_difference": max(apart, default=0.0),
    }


def ratios(ways: dict[str, dict[str, Any]]) -> dict[str, float]:
    """How ours stands to the others."""
    own = ways.get("ours")
    found: dict[str, float] = {}
    if own is None:
        return found
    for name in ("published", "reencoded"):
        if name in ways:
            found[f"times as fast as {name}"] = ways[name]["seconds"] / own["seconds"]
            if own["reward_tokens"]:
                found[f"{name}: reward tokens over ours"] = ways[name]["reward_tokens"] / own["reward_tokens"]
    if "plain" in ways:
        found["time per output token over plain"] = (
            own["seconds_per_output_token"] / ways["plain"]["seconds_per_output_token"]
        )
    return found


_CACHE = ("policy_cache_bytes", "reward_cache_bytes", "cache_bytes_copied")


def report(results: dict[str, Any]) -> str:
    """Everything for the terminal."""
    about, sizes = results["machine"], results["sizes"]
    lines = [
        f"{sizes['steps']} steps of {sizes['step_tokens']} tokens, temperature {sizes['temperature']}, "
        f"{sizes['dtype']} on {sizes['device']}{', CUDA graphs' if sizes['cuda_graphs'] else ''}, "
        f"{sizes['clock']} time",
        f"{about['processor']}, {about['instructions']['torch']}, {about['threads']} threads, "
        f"{about['memory_gb_per_second']} GB/s from memory, load at the start "
        f"{about['load_average_at_start']}",
    ]
    for one in results["cells"]:
        lines += ["", _cell_report(one, about["memory_gb_per_second"])]
    for one in results.get("at_once", []):
        lines += [
            "",
            f"{one['model']}, prompt {one['prompt_tokens']}, K={one['candidates']}, {one['requests']} "
            f"requests: {one['tokens_per_second_all']:.1f} tokens/s all at once, "
            f"{one['tokens_per_second_one']:.1f} one "
            f"after the other: {one['throughput_ratio']:.2f} times; policy cache "
            f"{mib(one['policy_cache_bytes'])}",
        ]
    return "\n".join(lines)


def _cell_report(one: dict[str, Any], bandwidth: float) -> str:
    header = ["way", "s", "ms/token", "policy tokens", "PRM tokens", "policy cache", "PRM cache", "copied"]
    rows = [
        [
            name,
            f"{way['seconds']:.2f}",
            f"{1000 * way['seconds_per_output_token']:.1f}",
            str(way["policy_tokens"]),
            str(way["reward_tokens"]),
            *(mib(way[figure]) if way[figure] else "-" for figure in _CACHE),
        ]
        for name, way in one["ways"].items()
    ]
    title = (
        f"{one['model']} ({one['parameters'] / 1e6:.1f}M parameters), prompt {one['prompt_tokens']}, "
        f"K={one['candidates']}"
    )
    lines = [title, table(header, rows)]
    if "ours" in one["ways"]:
        phases = one["ways"]["ours"]["phases"]
        lines.append("ours: " + ", ".join(f"{name} {spent:.2f} s" for name, spent in phases.items()))
        held = one["ways"]["ours"]["policy_cache_bytes"] / one["cache_bytes_per_token"]
        needed = one["prompt_tokens"] + (one["steps"] + one["candidates"]) * one["step_tokens"]
        lines.append(f"ours: policy cache {held:.0f} tokens; prompt + answer + K steps are {needed}")
    limit = one["weight_bytes"] / (1e9 * bandwidth)
    lines += [
        f"{name}: {way['seconds_per_output_token'] / limit:.2f} times the {1000 * limit:.2g} ms in which the "
        "weights are read once"
        for name, way in one["ways"].items()
    ]
    lines += [f"{label}: {value:.2f}" for label, value in one["ratios"].items()]
    for name, found in one["agreement"].items():
        same = "the same answer" if found["same_tokens"] else "ANOTHER ANSWER"
        lines.append(f"{name}: {same}, scores {found['largest_score_difference']:.1e} apart at most")
    return "\n".join(lines)
