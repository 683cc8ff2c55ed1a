"""What continuations say about a step: targets, and when they have said enough. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence

from scipy.stats import beta

from mahalo_ray.config.label import AdaptiveConfig


def value_target(verdicts: Sequence[float], steps_after: Sequence[int], reward: float, gamma: float) -> float:
    """`rollout_value`: the mean over M completed responses of r_t + gamma^(n-t) * z.

    verdicts: z of each; steps_after: n - t of each, the steps it took from step t to its end.
    """
    assert verdicts and len(verdicts) == len(steps_after)
    returns = [reward + gamma**after * z for z, after in zip(verdicts, steps_after, strict=True)]
    return sum(returns) / len(returns)


def majority_target(verdicts: Sequence[float]) -> float:
    """`judged_rollouts`: 1 if more than half of the completed responses are positive."""
    assert verdicts
    return float(sum(verdicts) > len(verdicts) / 2)


def is_decided(verdicts: Sequence[float], settings: AdaptiveConfig) -> bool:
    """Whether more verdicts (0 or 1 each) are worth drawing, by the Beta(1, 1) prior's posterior of their
    mean."""
    positives = sum(verdicts)
    posterior = beta(1 + positives, 1 + len(verdicts) - positives)
    if settings.threshold is not None:
        below = posterior.cdf(settings.threshold)
        if max(below, 1 - below) >= settings.confidence:
            return True
    if settings.max_width is None:
        return False
    low, high = posterior.interval(settings.confidence)
    return bool(high - low < settings.max_width)
