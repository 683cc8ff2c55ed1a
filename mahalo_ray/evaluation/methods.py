"""Methods played against fresh students: a policy, its decoding weights, perhaps guidance. No Ray here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from mahalo_ray.config import EvaluationConfig
from mahalo_ray.data.records import Dialogue
from mahalo_ray.decoding.engine import Engine
from mahalo_ray.decoding.kv_cache import RaggedCache
from mahalo_ray.decoding.policy import DeviceConfig, MultiHeadPolicy, Policy, load_policy, load_reward_model
from mahalo_ray.domains.tutoring.student import OBJECTIVES, Episode
from mahalo_ray.evaluation.results import MethodKind, MethodResult
from mahalo_ray.models import ProcessRewardModel
from mahalo_ray.objectives import Weights
from mahalo_ray.rollouts.dialogues import Conversation, DialogueBatch, first_candidate, play
from mahalo_ray.rollouts.scoring import CachedScorer, GuidedChoice
from mahalo_ray.rollouts.tutors import PolicyTutor

KL_BATCH = 32
SAMPLE_DIALOGUES = 2


@dataclass(frozen=True)
class Method:
    """What is compared: a row of the table. `weights` None: the SFT model; `guidance` None: no guidance.

    `model_url` is a baseline's own model, of one head, made for `weights`; None: the run's policy, or SFT.
    """

    name: str
    kind: MethodKind
    weights: Weights | None = None
    guidance: Weights | None = None
    num_candidates: int = 1
    sweep: bool = False
    model_url: str | None = None


@dataclass(frozen=True)
class Played:
    """A method's result, and a few of its dialogues to read."""

    result: MethodResult
    samples: list[Dialogue]


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
    ) -> None:
        self.sft, self.chat = load_policy(sft_url, placement)
        self.policy_url, self.reward_url, self.placement = policy_url, reward_url, placement
        self.config = config
        self.seeds = list(seeds)

    @cached_property
    def policy(self) -> Policy:
        """The run's own policy, loaded when a method first needs it."""
        return load_policy(self.policy_url, self.placement)[0]

    @cached_property
    def reward(self) -> ProcessRewardModel:
        """The reward model, loaded when a method is first guided."""
        return load_reward_model(self.reward_url, self.placement)

    def _decoder(self, method: Method) -> tuple[Policy, Weights | None]:
        """The model that speaks and its decoding weights."""
        if method.weights is None:
            return self.sft, None
        if method.model_url is None:
            return self.policy, method.weights
        policy, _ = load_policy(method.model_url, self.placement)
        if isinstance(policy, MultiHeadPolicy):
            return policy, Weights.one(policy.model.objectives[0])
        return policy, None

    def run(self, method: Method) -> Played:
        """Play all students once; the same students, with the same random draws, for every method."""
        policy, weights = self._decoder(method)
        engine = Engine(policy)
        batch = DialogueBatch(PolicyTutor(engine, self.chat, self.config.sampling, weights))
        episodes = [Episode.from_seed(seed) for seed in self.seeds]
        opened = batch.open(episodes, [f"{method.name}-{seed}" for seed in self.seeds], "evaluation")
        if method.guidance is None:
            play(batch, method.num_candidates, first_candidate)
        else:
            scorer = CachedScorer(self.reward, opened)
            play(batch, method.num_candidates, GuidedChoice(scorer, method.guidance))
        outcomes = [conversation.student.outcome() for conversation in opened]
        turns = sum(conversation.tutor_turns for conversation in opened)
        return Played(
            MethodResult(
                name=method.name,
                kind=method.kind,
                weights=None if method.weights is None else dict(method.weights),
                guidance=None if method.guidance is None else dict(method.guidance),
                num_candidates=method.num_candidates,
                student_ids=list(self.seeds),
                values={name: [outcome[name] for outcome in outcomes] for name in OBJECTIVES},
                kl_to_reference=self._kl(policy, weights, method, opened),
                malformed_rate=sum(c.malformed for c in opened) / turns,
                tokens=engine.tokens_forwarded,
                sweep=method.sweep,
            ),
            [conversation.dialogue(method.name) for conversation in opened[:SAMPLE_DIALOGUES]],
        )

    def _kl(
        self, policy: Policy, weights: Weights | None, method: Method, opened: Sequence[Conversation]
    ) -> float:
        """KL to SFT in nats per tutor token, over the method's own dialogues.

        The policy's part is exact per position (whole vocabulary). Choosing the best of K adds at most
        log K - (K - 1) / K nats per turn (Beirami et al., 2024, arXiv 2401.01879), which is added for guided
        methods: theirs is an upper bound.
        """
        sequences = [[token for turn in c.turns for token in turn.token_ids or []] for c in opened]
        spoken = [[turn.speaker == "tutor" for turn in c.turns for _ in turn.token_ids or []] for c in opened]
        tokens = sum(map(sum, spoken))
        total = 0.0
        if policy is not self.sft:
            for at in range(0, len(sequences), KL_BATCH):
                part = slice(at, at + KL_BATCH)
                total += _summed_kl(policy, weights, self.sft, sequences[part], spoken[part])
        candidates = method.num_candidates
        if method.guidance is not None:
            turns = sum(c.tutor_turns for c in opened)
            total += turns * (math.log(candidates) - (candidates - 1) / candidates)
        return total / tokens


def _summed_kl(
    policy: Policy,
    weights: Weights | None,
    reference: Policy,
    sequences: Sequence[list[int]],
    spoken: Sequence[list[bool]],
) -> float:
    """Sum over spoken tokens of KL(policy || reference) at the position that predicts them."""
    width = max(map(len, sequences))
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    mask = torch.zeros(len(sequences), width, dtype=torch.bool)
    for row, (tokens, flags) in enumerate(zip(sequences, spoken, strict=True)):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(flags)] = torch.tensor(flags)
    lengths = np.array([len(tokens) for tokens in sequences])
    ours = _log_probs(policy, [weights] * len(sequences), ids, lengths, mask)
    theirs = _log_probs(reference, [None] * len(sequences), ids, lengths, mask)
    return float((ours.exp() * (ours - theirs)).sum())


@torch.no_grad()
def _log_probs(
    policy: Policy, weights: Sequence[Weights | None], ids: Tensor, lengths: np.ndarray, mask: Tensor
) -> Tensor:
    """Log-probs [n, V] at the positions that predict the tokens of `mask` [B, T], in row order."""
    cache = RaggedCache()
    view = cache.append(cache.add(len(ids)), lengths, ids.shape[1])
    ids = ids.to(policy.device)
    hidden = policy.hidden_states(ids, view.positions(ids.shape[1], policy.device), view)
    rows, positions = mask.to(policy.device).nonzero(as_tuple=True)
    logits = policy.head(weights)(hidden[rows, positions - 1], rows)
    return torch.log_softmax(logits.float(), dim=-1)
