"""Would it pay to drop half of the candidates before they are finished, by the reward model's scores so far?

    python benchmarks/early_rejection.py runs/quickstart

The candidates that a finished run has sampled for its pairs (K of each prompt, scored when they were whole)
are scored again when only a share of their tokens was there. At each balance: the rank correlation of both
scores among the candidates of a prompt, and what the best survivor's final score lacks of the best of all
K, in standard deviations within a prompt. Beside it, what the same tokens buy without rejection: fewer
candidates, all of them finished (their expected best is linear between whole numbers of them).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import islice
from math import comb

import numpy as np
from measuring import table
from scipy.stats import spearmanr

from mahalo_ray.data.records import CandidateSet
from mahalo_ray.decoding.policy import DeviceConfig, load_reward_model
from mahalo_ray.models.reward import ProcessRewardModel
from mahalo_ray.models.scoring import TokenTrace
from mahalo_ray.pipeline.artifacts import run_model
from mahalo_ray.rollouts.pair_building import CandidateShards

PARTS = (0.25, 0.5, 0.75)  # of a candidate's tokens, when half of the candidates are dropped
SHARES = (1.0, 0.5, 0.0)  # of the first objective in the weighted sum
BATCH = 256  # candidates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", help="a finished run with two objectives, which is only read")
    parser.add_argument("--prompts", type=int, default=1000)
    arguments = parser.parse_args()
    model = load_reward_model(run_model(arguments.run, "reward"), DeviceConfig())
    shards = CandidateShards(f"{arguments.run}/pair_rollouts/candidates")
    counts = {len(moment.candidates) for moment in islice(shards, 1)}
    moments = [m for m in islice(shards, arguments.prompts) if {len(m.candidates)} == counts]
    tokens = np.array([[len(c.token_ids) for c in m.candidates] for m in moments], dtype=float)
    whole = score_parts(model, moments, 1.0)
    rows = []
    for part in PARTS:
        early = score_parts(model, moments, part)
        for share in SHARES:
            weights = np.array([share, 1 - share])
            rows.append([f"{part:g}", f"{share:g}", *compare(early @ weights, whole @ weights, tokens, part)])
    header = [
        "part",
        "share",
        "rank correlation",
        "lost by dropping half",
        "tokens",
        "lost by fewer candidates",
    ]
    print(f"{len(moments)} prompts of {counts.pop()} candidates, balance: share of {model.objectives[0]}")
    print(table(header, rows))


def score_parts(model: ProcessRewardModel, moments: Sequence[CandidateSet], part: float) -> np.ndarray:
    """Scores [prompts, K, objectives] of the candidates' first tokens, in standard deviations within a
    prompt."""
    traces = []
    for moment in moments:
        start = len(moment.prompt_ids)
        for candidate in moment.candidates:
            read = candidate.token_ids[: max(1, round(part * len(candidate.token_ids)))]
            traces.append(TokenTrace([*moment.prompt_ids, *read], [start], [start + len(read) - 1]))
    scores = np.concatenate([scores.numpy() for scores in model.score_traces(traces, BATCH)])
    scores = scores.reshape(len(moments), -1, scores.shape[-1])
    return scores / np.sqrt(scores.var(axis=1).mean(axis=0))


def compare(early: np.ndarray, whole: np.ndarray, tokens: np.ndarray, part: float) -> list[str]:
    """A row of the table, from scores and tokens [prompts, K]."""
    varied = [(a, b) for a, b in zip(early, whole, strict=True) if np.ptp(a) > 0 and np.ptp(b) > 0]
    correlations = [spearmanr(a, b).statistic for a, b in varied]
    count = whole.shape[1]
    survivors = np.argsort(-early, axis=1)[:, : (count + 1) // 2]
    best = whole.max(axis=1)
    lost = best - np.take_along_axis(whole, survivors, axis=1).max(axis=1)
    finished = np.take_along_axis(tokens, survivors, axis=1).sum()
    used = (part * (tokens.sum() - finished) + finished) / tokens.sum()
    ordered = np.sort(whole, axis=1)
    fewer = [
        float((best - ordered @ chances_of_best(count, number)).mean()) for number in range(1, count + 1)
    ]
    instead = float(np.interp(used * count, np.arange(1, count + 1), fewer))
    return [
        f"{np.mean(correlations):.2f}",
        f"{lost.mean():.3f} ± {1.96 * lost.std() / len(lost) ** 0.5:.3f}",
        f"{used:.0%}",
        f"{instead:.3f}",
    ]


def chances_of_best(count: int, number: int) -> np.ndarray:
    """Chance [count] of each rank, worst first, to be the best of `number` candidates drawn by chance."""
    return np.array([comb(rank, number - 1) for rank in range(count)]) / comb(count, number)


if __name__ == "__main__":
    main()
