"""Guided decoding: at every step K candidates from the policy, scored by a process reward model, one goes on.

Both models keep their state: a prompt is encoded once by each, a candidate's tokens once, and nothing is ever
encoded again (MAHALO, arXiv 2510.01167, "continuing hidden state").
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mahalo_ray.data.templating import ChatFormat
from mahalo_ray.decoding.beam import BeamSearch, subtrees
from mahalo_ray.decoding.guidance import GuidedRequest, GuidedResult, ScoreScale, Step, totals
from mahalo_ray.decoding.policy import Policy, as_policy
from mahalo_ray.decoding.scorers import Guides, backbones_of
from mahalo_ray.decoding.session import GuidedSession
from mahalo_ray.decoding.stopping import Boundary, TokenTexts, boundary_for
from mahalo_ray.models.multi_head import MultiHeadCausalLM
from mahalo_ray.models.reward import ProcessRewardModel
from mahalo_ray.models.scoring import StepScorer


class GuidedDecoder:
    """Answers prompts with a policy, guided by one or several reward models (None: the policy alone).

    Process reward models read the policy's tokens as they are over a kept cache, so they must have its
    vocabulary; other scorers (`models.foreign`) read the text again at every step. `boundary`: a `Boundary`,
    or a domain's name ("math", "human_values", "tutoring"). The tokenizer defaults to that of the first
    process reward model. `max_branches` bounds the candidates decoded at once over all requests; more
    requests wait their turn.
    """

    def __init__(
        self,
        policy: Policy | MultiHeadCausalLM | PreTrainedModel,
        reward_model: StepScorer | Sequence[StepScorer] | None,
        boundary: Boundary | str,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_branches: int = 256,
        max_context: int | None = None,
    ) -> None:
        self.policy = as_policy(policy)
        given = [reward_model] if isinstance(reward_model, StepScorer) else reward_model or []
        self.reward_models = tuple(given)
        self.scale = ScoreScale.of(self.reward_models)
        self.boundary = boundary_for(boundary) if isinstance(boundary, str) else boundary
        tokenizer = shared_tokenizer(self.reward_models, tokenizer)
        self.format = ChatFormat(tokenizer)
        self.vocabulary = TokenTexts(tokenizer)
        self.max_branches = max_branches
        self.max_context = max_context
        self._backbones = backbones_of(self.reward_models)

    def session(self) -> GuidedSession:
        """An empty batch that requests can join at any time."""
        return GuidedSession(
            self.policy,
            self._guides(),
            self.boundary,
            self.format,
            self.vocabulary,
            self.max_branches,
            self.max_context,
        )

    def _guides(self) -> Guides | None:
        if not self.reward_models:
            return None
        models, backbones = self.reward_models, self._backbones
        return Guides(models, backbones, self.boundary, self.format, self.vocabulary)

    def generate(self, messages: Sequence[Any], **options: Any) -> GuidedResult:
        """Answer one conversation; options are the fields of `GuidedRequest` (weights, guidance,
        num_candidates...).
        """
        return self.generate_batch([GuidedRequest(messages, **options)])[0]

    def generate_each(self, requests: Sequence[GuidedRequest]) -> list[GuidedResult | ValueError]:
        """`generate_batch`, where a request that cannot be answered is its error and disturbs no other."""
        session = self.session()
        errors: dict[int, ValueError] = {}
        for number, request in enumerate(requests):
            try:
                session.check(request)
            except ValueError as error:
                errors[number] = error
        good = [number for number in range(len(requests)) if number not in errors]
        batch = [number for number in good if requests[number].strategy != "beam"]
        answered = dict(zip(batch, self.generate_batch([requests[n] for n in batch]), strict=True))
        for number in set(good) - set(batch):
            try:
                answered[number] = self._beam_search(requests[number])
            except ValueError as error:  # outgrew a reward model
                errors[number] = error
        return [answered[n] if n in answered else errors[n] for n in range(len(requests))]

    def generate_batch(self, requests: Sequence[GuidedRequest]) -> list[GuidedResult]:
        """Answer many conversations. Each answer is what `generate` would give for it alone.

        All strategies but beam search share one batch; beam searches run one after the other.
        """
        session = self.session()
        running = {
            number: [session.submit(part) for part in subtrees(request)]
            for number, request in enumerate(requests)
            if request.strategy != "beam"
        }
        while session.is_busy:
            session.advance()
        return [
            self._best(request, [part.result() for part in running[number]])
            if number in running
            else self._beam_search(request)
            for number, request in enumerate(requests)
        ]

    def _beam_search(self, request: GuidedRequest) -> GuidedResult:
        session = self.session()
        if session.guides is None:
            raise ValueError("strategy 'beam' needs a reward model; this decoder has none")
        return BeamSearch(session, session.guides, request).run()

    def _best(self, request: GuidedRequest, results: Sequence[GuidedResult]) -> GuidedResult:
        """Of the subtrees' responses the one whose last step scores best, with what all of them cost."""
        if len(results) == 1:
            return results[0]
        names = self.scale.objectives
        # A search that outgrew a reward model may have ended without a step to judge it by.
        judged = [r for r in results if r.steps and r.steps[-1].accepted.scores] or results[:1]
        best = judged[0]
        if len(judged) > 1:
            last = [[r.steps[-1].accepted.scores[name] for name in names] for r in judged]
            total = totals(torch.tensor(last), request.guidance_over(names), request, self.scale)
            best = judged[int(total.argmax())]
        return replace(
            best,
            policy_tokens=sum(r.policy_tokens for r in results),
            reward_tokens=sum(r.reward_tokens for r in results),
        )

    def stream(
        self, messages: Sequence[Any], tokens: bool = False, **options: Any
    ) -> Generator[Step, None, GuidedResult]:
        """Yield every accepted step as it is decided; its StopIteration value is the `GuidedResult`.

        `tokens`: yield every token; only possible without candidates to choose from (num_candidates 1 or
        strategy "none").
        """
        session = self.session()
        running = session.submit(GuidedRequest(messages, **options), token_by_token=tokens)
        while session.is_busy:
            session.advance()
            yield from running.new_steps()
        return running.result()


def shared_tokenizer(
    reward_models: Sequence[StepScorer], tokenizer: PreTrainedTokenizerBase | None
) -> PreTrainedTokenizerBase:
    """The policy's tokenizer, or that of a process reward model; ValueError if vocabularies differ."""
    own = [model.tokenizer for model in reward_models if isinstance(model, ProcessRewardModel)]
    known = [one for one in own if one is not None]
    chosen = tokenizer if tokenizer is not None else next(iter(known), None)
    if chosen is None:
        raise ValueError("give a tokenizer: the reward model does not carry one")
    if any(one is not chosen and one.get_vocab() != chosen.get_vocab() for one in known):
        raise ValueError(
            "the policy's and the reward model's tokenizers differ: guided decoding hands over token ids, so "
            "both must have the same vocabulary"
        )
    return chosen
