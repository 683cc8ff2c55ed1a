"""What one training stage needs, from configuration to worker: one frozen dataclass per recipe.

The pipeline (or a script) fills it in, Ray Train carries it to the workers, and `recipes.build_recipe` makes
the recipe there. Settings know no recipe: the driver makes settings too, and only workers need DeepSpeed.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

from mahalo_ray.config import (
    DomainConfig,
    ModelConfig,
    ObjectiveConfig,
    PolicyConfig,
    RewardConfig,
    SftConfig,
    TrainingConfig,
)
from mahalo_ray.config.section import Section
from mahalo_ray.data import storage

# Beyond these a policy of the miniature was falling apart (docs/training.md): nats per token, and how much
# higher a share of malformed turns is than at the start, if these are more than a few turns.
ALARMING_KL, ALARMING_TURNS, FEWEST_ALARMING_TURNS = 0.5, 0.1, 3

# (done, in all, of what: "steps", or what comes before the first; metrics of the last report)
ProgressFunction = Callable[[int, int, str, dict[str, float]], None]


@dataclass(frozen=True, kw_only=True)
class StageSettings(ABC):
    """What every stage has. Fields that end in `_url` are folders or fsspec URLs that all workers reach.

    `model_url`: the model that training starts from. `output_url`: folder of the finished model.
    """

    model_url: str
    output_url: str
    model: ModelConfig
    seed: int
    name: ClassVar[str]

    @property
    @abstractmethod
    def training(self) -> TrainingConfig:
        """The section that all recipes share."""

    @abstractmethod
    def inputs(self) -> list[str]:
        """Folders whose files shape the result."""

    def notes(self, metrics: Mapping[str, float]) -> list[str]:
        """What a user should hear about a finished stage."""
        return []

    def alarm(self, metrics: Mapping[str, float]) -> str | None:
        """What a user should hear about an unfinished stage, from the metrics of one report."""
        return None

    def absolute(self) -> Self:
        """The same with absolute local paths: workers run in other folders."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        urls: dict[str, Any] = {
            name: storage.absolute(value)
            for name, value in given.items()
            if name.endswith("_url") and value is not None
        }
        return replace(self, **urls)

    def identity(self) -> str:
        """A short hash of everything that shapes the result, input files included. The checkpoints of an
        unfinished run lie under it, so a checkpoint that is found belongs to these settings and data."""
        parts = [self.name, *(repr(_plain(getattr(self, field.name))) for field in fields(self))]
        parts += [storage.fingerprint(file) for url in self.inputs() for file in storage.list_files(url)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return value.shaping()
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _nothing_held_out(key: str, share: float, rows: float) -> list[str]:
    if share == 0 or rows > 0:
        return []
    return [
        f"nothing was held out although '{key}' is {share:g}, so there are no held-out metrics: rows of one "
        "prompt or dialogue stay together, and all of these were trained on. Raise it, or give the rows a "
        "'dialogue' of their own"
    ]


@dataclass(frozen=True, kw_only=True)
class SftSettings(StageSettings):
    """Supervised fine-tuning on Parquet examples (`EXAMPLE_SCHEMA`); a transformers folder results.

    With `model.scratch`, `model_url` holds config and tokenizer only and the model starts from random
    weights.
    """

    examples_url: str
    sft: SftConfig
    name: ClassVar[str] = "sft"

    @property
    def training(self) -> TrainingConfig:
        return self.sft.training

    def inputs(self) -> list[str]:
        return [self.examples_url, self.model_url]


@dataclass(frozen=True, kw_only=True)
class RewardSettings(StageSettings):
    """A process reward model from StepTrace records and, for objectives supervised by pairs, PreferencePair
    records; at least one of the two URLs is given.

    `step_separator` ends every step of a trace that carries no token ids (None: a step is a whole assistant
    turn). `reward.held_out_fraction` of the prompts is kept for metrics and calibration. `features_url`:
    folder for the head inputs of a frozen backbone, shared by all runs that name it (None: kept in memory).
    """

    traces_url: str | None = None
    pairs_url: str | None = None
    objectives: Sequence[ObjectiveConfig]
    reward: RewardConfig
    step_separator: str | None = None
    features_url: str | None = None
    name: ClassVar[str] = "reward"

    @property
    def training(self) -> TrainingConfig:
        return self.reward.training

    def notes(self, metrics: Mapping[str, float]) -> list[str]:
        share = self.reward.held_out_fraction
        return _nothing_held_out("reward.held_out_fraction", share, metrics["held_out/rows"])

    def inputs(self) -> list[str]:
        return [url for url in (self.traces_url, self.pairs_url, self.model_url) if url is not None]


@dataclass(frozen=True, kw_only=True)
class PolicySettings(StageSettings):
    """The method `policy.method` (MAH-DPO: one head per objective) on a folder of PreferencePair records; a
    MultiHeadCausalLM folder results.

    `model_url` is the reference, whose log-probs are stored in `pairs_url`/.reference, and the start too,
    unless `start_url` is the folder of a policy made from it that training goes on from. With
    `policy.extends` (a model folder here) heads of `objectives`, which it lacks, are added to that policy.
    `held_out_fraction` of the prompts is kept for the final metrics. `domain` says which
    turns are malformed (None: all that end are well-formed). `step_domain`: pairs are of steps that end where
    this domain of `decoding/stopping.py` says (None: of whole turns).
    """

    pairs_url: str
    start_url: str | None = None
    objectives: Sequence[str]
    policy: PolicyConfig
    held_out_fraction: float = 0.0
    domain: DomainConfig | None = None
    step_domain: str | None = None
    name: ClassVar[str] = "policy"

    @property
    def training(self) -> TrainingConfig:
        return self.policy.training

    def notes(self, metrics: Mapping[str, float]) -> list[str]:
        notes = _nothing_held_out(
            "pairs.held_out_fraction", self.held_out_fraction, metrics["held_out/pairs"]
        )
        if "stopped_at_step" in metrics:
            notes.append(
                f"the KL budget ('policy.max_kl': {self.policy.max_kl:g} nats per token) was reached at step "
                f"{metrics['stopped_at_step']:.0f}, so training ended there with the weights of step "
                f"{metrics['kept_step']:.0f}, and the pairs of later steps were not used. To use all pairs "
                "within the budget: lower both learning rates (halve them), or raise 'policy.beta'"
            )
        return notes

    def alarm(self, metrics: Mapping[str, float]) -> str | None:
        found = []
        kl = {name: value for name, value in metrics.items() if name.endswith("/kl")}
        if kl and max(kl.values()) > ALARMING_KL:
            worst = max(kl, key=lambda name: kl[name])
            found.append(f"the KL to the reference is {kl[worst]:.2f} nats per token ('{worst}')")
        rate, at_start = (metrics.get(f"malformed_turns{part}", 0.0) for part in ("", "_at_start"))
        more = rate - at_start
        if more > ALARMING_TURNS and more * self.policy.sampled_turns > FEWEST_ALARMING_TURNS:
            found.append(f"{rate:.0%} of sampled turns are malformed ({at_start:.0%} at the start)")
        if not found:
            return None
        anchor = "" if self.policy.chosen_anchor else "set 'policy.chosen_anchor' (to 1), "
        return (
            f"step {metrics['step']:.0f}: {', and '.join(found)}: the policy drifts apart, however good its "
            f"loss looks. To mend it, {anchor}lower both learning rates (to a third), raise 'policy.beta' or "
            "let 'policy.max_kl' end it in time; docs/training.md says how to choose"
        )

    def inputs(self) -> list[str]:
        start = (self.start_url, self.policy.extends)
        return [url for url in (self.pairs_url, self.model_url, *start) if url is not None]
