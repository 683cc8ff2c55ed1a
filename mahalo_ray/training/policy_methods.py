"""What distinguishes the policy's methods: which pairs, under which head, with which weight, beta and margin.

MAH-DPO (MAHALO, arXiv 2510.01167) and its baselines run through one recipe; all they differ in is here.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mahalo_ray.config import PolicyConfig
from mahalo_ray.data.records import PreferencePair
from mahalo_ray.losses import modpo_margin
from mahalo_ray.models import MultiHeadCausalLM
from mahalo_ray.models.folder import model_folder, read_metadata


def new_objectives(extends: str, names: Sequence[str]) -> tuple[str, ...]:
    """Those of `names` that the policy in the folder `extends` has no head for: the ones that are trained.

    ValueError if that is none, or if the folder holds no policy.
    """
    there = read_metadata(model_folder(extends), MultiHeadCausalLM.kind)["objectives"]
    new = tuple(name for name in names if name not in there)
    if not new:
        raise ValueError(
            f"'policy.extends': the policy in '{extends}' has a head for each of {', '.join(names)} already: "
            "name the objective that is new in 'objectives'"
        )
    return new


def of_objectives(policy: PolicyConfig, names: Sequence[str]) -> PolicyConfig:
    """The same settings where these are all objectives: without the values of others."""
    values: dict[str, object] = {"alpha": {k: v for k, v in policy.alpha.items() if k in names}}
    if isinstance(policy.beta, dict):
        values["beta"] = {k: v for k, v in policy.beta.items() if k in names}
    return policy.model_copy(update=values)


@dataclass(frozen=True)
class MethodPlan:
    """L = sum_i alpha_i * mean over the pairs of objective i of the DPO loss with beta_i under head_of_i.

    `alpha`, `beta` [objectives] and `head_of` [objectives] (a number into `heads`) follow `objectives`, the
    ones whose pairs are trained on.
    """

    objectives: tuple[str, ...]
    heads: tuple[str, ...]
    head_of: Tensor
    alpha: Tensor
    beta: Tensor


def plan_method(policy: PolicyConfig, objectives: Sequence[str]) -> MethodPlan:
    """The plan of `policy.method` where these are all objectives. The one head of DPO is named after its
    objective, that of scalarised DPO and MODPO after the method."""
    policy.check_objectives(objectives)
    mixture: Mapping[str, float] = policy.mixture or {}  # scalarised and modpo have one
    trained = policy.trained_objectives(objectives)
    alpha = [1.0] * len(trained)
    beta = [policy.beta_of(name) for name in trained]
    heads: tuple[str, ...] = (policy.method,)
    if policy.method == "mah_dpo":
        heads, alpha = tuple(objectives), [policy.alpha.get(name, 1.0) for name in trained]
    elif policy.method == "dpo":
        heads = trained
    elif policy.method == "scalarised":
        alpha = [mixture[name] for name in trained]
    else:
        beta = [beta[0] / mixture[trained[0]]]
    head_of = torch.tensor([heads.index(name) if name in heads else 0 for name in trained])
    return MethodPlan(trained, heads, head_of, torch.tensor(alpha), torch.tensor(beta))


# Raised when a method computes something else from the same settings and pairs: policies made before are made
# again. modpo 2: its margin is made of standardised rewards.
METHOD_VERSIONS = {"mah_dpo": 1, "dpo": 1, "scalarised": 1, "modpo": 2}


def modpo_margins(policy: PolicyConfig, pairs: Iterable[PreferencePair]) -> npt.NDArray[np.float64]:
    """What MODPO (Zhou et al. 2024, arXiv 2310.03708) adds to the pairs' own margins [N]: the weighted
    differences of the other objectives' standardised rewards.

    MODPO's rewards are Bradley-Terry rewards: their unit is the log-odds of a preference, as is the unit of
    what the pairs themselves say. Scores of a reward model have whatever unit their objective has (a chance
    of success, a logit), so every objective's are divided by their spread within a prompt first.

    Raises ValueError naming a pair without the rewards, or an objective whose rewards never differ.
    """
    weights = {name: value for name, value in (policy.mixture or {}).items() if value > 0}
    names = list(weights)
    trained = names.index(policy.objective or "")
    scores = standardised_rewards(pairs, names, policy.objective)
    return modpo_margin(scores[0], scores[1], list(weights.values()), trained).numpy()


def standardised_rewards(
    pairs: Iterable[PreferencePair], names: Sequence[str], unused: str | None = None
) -> Tensor:
    """Rewards [2, N, H] of the chosen and rejected answers of N pairs for these objectives, each in standard
    deviations within a prompt. `unused`: an objective whose rewards are not needed (NaN without them).

    Raises ValueError naming a pair without the rewards, or an objective whose rewards never differ.
    """
    chosen, rejected = array("d"), array("d")
    for pair in pairs:
        chosen.extend(_rewards(pair, pair.chosen_scores, names, unused))
        rejected.extend(_rewards(pair, pair.rejected_scores, names, unused))
    scores = torch.tensor([chosen, rejected], dtype=torch.float64).reshape(2, -1, len(names))
    return scores / _within_prompt_spread(scores, names, unused) if len(chosen) else scores


def _within_prompt_spread(scores: Tensor, names: Sequence[str], unused: str | None) -> Tensor:
    """Standard deviation [H] of the rewards [2, N, H] of one prompt, from two completions of each: half the
    mean squared difference is their variance. 1 for the objective that is not used."""
    spread = ((scores[0] - scores[1]) ** 2).mean(dim=0).div(2).sqrt()
    for number, name in enumerate(names):
        if name == unused:
            spread[number] = 1.0
        elif spread[number] == 0:
            raise ValueError(
                f"the '{name}' rewards of chosen and rejected are the same in all pairs: no margin can be "
                "made of them"
            )
    return spread


def _rewards(
    pair: PreferencePair, scores: dict[str, float] | None, names: Sequence[str], unused: str | None
) -> list[float]:
    """Rewards [H] of one completion."""
    known = scores or {}
    for name in names:
        if name != unused and name not in known:
            raise ValueError(
                f"pair '{pair.id}' has no '{name}' reward of its completions ('chosen_scores', "
                "'rejected_scores'), which the margin is made of: build the pairs from scored candidates"
            )
    return [known.get(name, float("nan")) for name in names]
