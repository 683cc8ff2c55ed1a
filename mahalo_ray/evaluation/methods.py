"""Play the methods of the comparison table (a policy at decoding weights, with or without guidance) against
the same simulated students, and measure outcomes and KL to SFT. No Ray here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mahalo_ray.config import DomainConfig, EvaluationConfig
from mahalo_ray.data import storage
from mahalo_ray.data.records import Dialogue
from mahalo_ray.decoding.engine import Engine
from mahalo_ray.decoding.guidance import Guidance
from mahalo_ray.decoding.kv_cache import RaggedCache
from mahalo_ray.decoding.policy import (
    DeviceConfig,
    HeadMix,
    MultiHeadPolicy,
    Policy,
    load_policy,
    load_reward_model,
)
from mahalo_ray.decoding.scorers import RewardModels
from mahalo_ray.decoding.stopping import boundary_for
from mahalo_ray.domains.protocol import load_domain, outcomes
from mahalo_ray.evaluation.results import MethodKind, MethodResult
from mahalo_ray.objectives import Weights
from mahalo_ray.rollouts.dialogues import DialogueBatch, TurnSelection, first_candidate
from mahalo_ray.rollouts.tutors import Conversation, PolicyTutor

KL_BATCH = 32  # dialogues read at a time
KL_CHUNK_LOGITS = 1 << 24  # logits held at a time, of each of two models
SAMPLE_DIALOGUES = 2


@dataclass(frozen=True)
class Method:
    """What is compared: a row of the table. `weights` None: the SFT model; `guidance` None: no guidance;
    `strength`: of a policy with heads, 0 at the SFT model's head, 1 at the policy's own; `temperature`: of
    sampling, None for that of the evaluation.

    `model_url` is a model of its own, made for `weights` (a baseline's, or one that a sweep trained; of one
    head, or decoded at `weights`); None: the run's policy, or SFT.
    """

    name: str
    kind: MethodKind
    weights: Weights | None = None
    guidance: Weights | None = None
    num_candidates: int = 1
    sweep: bool = False
    model_url: str | None = None
    strength: float = 1.0
    temperature: float | None = None

    def as_json(self) -> dict[str, Any]:
        """JSON values; `from_json` reads them. Without a temperature of its own a method has no such key, so
        that its results are found again under the name that they had before there was one."""
        fields = asdict(self)
        if self.temperature is None:
            del fields["temperature"]
        return {
            **fields,
            "weights": None if self.weights is None else dict(self.weights),
            "guidance": None if self.guidance is None else dict(self.guidance),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Method:
        """Read what `as_json` gave."""
        vectors = {
            name: None if values[name] is None else Weights(values[name]) for name in ("weights", "guidance")
        }
        return cls(**{**values, **vectors})


@dataclass(frozen=True)
class PolicyTraining:
    """How a policy that a sweep trained came to be. `model`: its folder, as a path in the sweep's own;
    `started_from`: the name of the policy that it went on from; `steps`: optimizer steps of its own;
    `steps_from_sft`: those of all policies before it as well."""

    model: str
    started_from: str
    steps: int
    steps_from_sft: int
    seconds: float


@dataclass(frozen=True)
class Played:
    """A method's result, a few of its dialogues to read, how long it took (0 where nobody measured), and, of
    a policy trained for it alone, that training."""

    result: MethodResult
    samples: list[Dialogue]
    seconds: float = 0.0
    training: PolicyTraining | None = None


class MethodPlayer:
    """Holds the models and plays one method after another against the same students."""

    def __init__(
        self,
        sft_url: str,
        policy_url: str,
        reward_url: str,
        placement: DeviceConfig,
        config: EvaluationConfig,
        seeds: Sequence[int],
        domain: DomainConfig,
        objectives: Sequence[str],
    ) -> None:
        """`seeds` are of problems of the domain; `objectives`: whose outcomes are kept."""
        self.sft, self.chat = load_policy(sft_url, placement)
        self.sft_url, self.policy_url, self.reward_url = sft_url, policy_url, reward_url
        self.placement = placement
        self.config = config
        self.seeds = list(seeds)
        self.domain, self.objectives = load_domain(domain), tuple(objectives)

    @cached_property
    def policy(self) -> Policy:
        """The run's own policy, loaded when a method first needs it."""
        return load_policy(self.policy_url, self.placement)[0]

    @cached_property
    def reward_models(self) -> RewardModels:
        """The reward model, loaded when a method is first guided."""
        reward = load_reward_model(self.reward_url, self.placement)
        return RewardModels(reward, boundary_for(self.domain.boundary), self.chat.tokenizer, self.sft.end_ids)

    def _decoder(self, method: Method) -> tuple[Policy, HeadMix]:
        """The model that speaks, its decoding weights and strength. A run's policy that was saved without its
        base head gets it from the run's SFT model. ValueError for a strength that there cannot be."""
        if method.weights is None:
            policy, mix = self.sft, HeadMix(None, method.strength)
        elif method.model_url is None:
            policy, mix = self.policy, HeadMix(method.weights, method.strength)
            if isinstance(policy, MultiHeadPolicy) and policy.model.base_head is None and mix.strength != 1:
                policy.model.set_base_head(storage.local_copy(self.sft_url))
        else:
            policy, _ = load_policy(method.model_url, self.placement)
            heads = policy.model.objectives if isinstance(policy, MultiHeadPolicy) else ()
            single = Weights.one(heads[0]) if heads else None
            mix = HeadMix(method.weights if len(heads) > 1 else single, method.strength)
        policy.check_mix(mix)
        return policy, mix

    def run(self, method: Method) -> Played:
        """Play all students once; the same students, with the same random draws, for every method."""
        policy, mix = self._decoder(method)
        engine = Engine(policy)
        sampling = self.config.sampling
        if method.temperature is not None:
            sampling = sampling.model_copy(update={"temperature": method.temperature})
        scorers = None if method.guidance is None else self.reward_models.follow()
        tutor = PolicyTutor(
            engine,
            self.chat,
            sampling,
            mix.weights,
            is_malformed=self.domain.is_malformed,
            strength=mix.strength,
            # Without guidance nothing is chosen at a step's end.
            boundary=boundary_for(self.domain.boundary, whole_answers=method.guidance is None),
        )
        batch = DialogueBatch(tutor, scorers=scorers)
        episodes = [self.domain.episode(seed) for seed in self.seeds]
        opened = batch.open(episodes, [f"{method.name}-{seed}" for seed in self.seeds], "evaluation")
        if method.guidance is None:
            batch.play(method.num_candidates, first_candidate)
        else:
            guidance = Guidance(self.reward_models.scale, method.guidance, "calibrated")
            batch.play(method.num_candidates, TurnSelection("best", guidance))
        ended = outcomes([conversation.student for conversation in opened], self.objectives)
        turns = sum(conversation.tutor_turns for conversation in opened)
        return Played(
            MethodResult(
                name=method.name,
                kind=method.kind,
                weights=None if method.weights is None else dict(method.weights),
                guidance=None if method.guidance is None else dict(method.guidance),
                num_candidates=method.num_candidates,
                strength=method.strength,
                temperature=method.temperature,
                student_ids=list(self.seeds),
                values={name: [outcome[name] for outcome in ended] for name in self.objectives},
                kl_to_reference=self._kl(policy, mix, method, opened),
                malformed_rate=sum(c.malformed for c in opened) / turns,
                tokens=engine.tokens_forwarded,
                sweep=method.sweep,
            ),
            [c.dialogue(method.name, self.objectives) for c in opened[:SAMPLE_DIALOGUES]],
        )

    def _kl(
        self,
        policy: Policy,
        mix: HeadMix,
        method: Method,
        conversations: Sequence[Conversation],
    ) -> float:
        """KL to SFT in nats per tutor token, over the method's own dialogues.

        Unguided, the mean over positions of KL(policy || SFT), exact over the whole vocabulary. Guided rows
        are sampled from neither: KL(guided || SFT) = E_guided[log guided/policy] + E_guided[log policy/SFT].
        The second part is measured on the tokens that were chosen. The first is at most log K - (K - 1) / K
        nats per turn for the best of K (Beirami et al., 2024, arXiv 2401.01879); that much is added.
        """
        sequences = [[token for turn in c.turns for token in turn.token_ids or []] for c in conversations]
        spoken = [
            [turn.speaker == "tutor" for turn in c.turns for _ in turn.token_ids or []] for c in conversations
        ]
        tokens = sum(map(sum, spoken))
        total = 0.0
        if policy is not self.sft:
            for start in range(0, len(sequences), KL_BATCH):
                batch = slice(start, start + KL_BATCH)
                divergence, log_ratio = _divergence(policy, mix, self.sft, sequences[batch], spoken[batch])
                total += divergence if method.guidance is None else log_ratio
        candidates = method.num_candidates
        if method.guidance is not None:
            turns = sum(c.tutor_turns for c in conversations)
            total += turns * (math.log(candidates) - (candidates - 1) / candidates)
        return total / tokens


@torch.no_grad()
def _divergence(
    policy: Policy,
    mix: HeadMix,
    reference: Policy,
    sequences: Sequence[list[int]],
    spoken: Sequence[list[bool]],
) -> tuple[float, float]:
    """Sums over the spoken tokens: KL(policy || reference) at the position that predicts the token, and
    log policy(token) / reference(token).

    Logits are made for as many positions at a time as `KL_CHUNK_LOGITS` allows: whole batches times large
    vocabularies do not fit a GPU.
    """
    width = max(map(len, sequences))
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    mask = torch.zeros(len(sequences), width, dtype=torch.bool)
    for row, (tokens, flags) in enumerate(zip(sequences, spoken, strict=True)):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(flags)] = torch.tensor(flags)
    lengths = np.array([len(tokens) for tokens in sequences])
    rows, positions = mask.nonzero(as_tuple=True)
    tokens_said = ids[rows, positions]
    ours = _predictions(policy, [mix] * len(sequences), ids, lengths, rows, positions)
    theirs = _predictions(reference, [HeadMix()] * len(sequences), ids, lengths, rows, positions)
    divergence = log_ratio = 0.0
    chunk = max(1, KL_CHUNK_LOGITS // policy.vocab_size)
    for start in range(0, len(rows), chunk):
        part = slice(start, start + chunk)
        ours_logps, theirs_logps = ours(part), theirs(part)
        difference = ours_logps - theirs_logps
        divergence += float((ours_logps.exp() * difference).sum())
        chosen = tokens_said[part, None].to(difference.device)
        log_ratio += float(difference.gather(1, chosen).sum())
    return divergence, log_ratio


def _predictions(
    policy: Policy,
    mixes: Sequence[HeadMix],
    ids: Tensor,
    lengths: np.ndarray,
    rows: Tensor,
    positions: Tensor,
) -> Callable[[slice], Tensor]:
    """A function of a slice of the n tokens at (`rows`, `positions`): log-probs [slice, V] of what predicts
    them."""
    cache = RaggedCache()
    view = cache.append(cache.add(len(ids)), lengths, ids.shape[1])
    device = policy.device
    every = torch.arange(len(ids), device=device)
    hidden = policy.reader(mixes)(ids.to(device), view.positions(ids.shape[1], device), view, every)
    rows, positions = rows.to(device), positions.to(device)
    states, head = hidden[rows, positions - 1], policy.head(mixes)
    return lambda part: torch.log_softmax(head(states[part], rows[part]).float(), dim=-1)
