"""Guided decoding: at every step K candidates from the policy, scored by reward models, one goes on.

Both kinds of model keep their state: a prompt is encoded once by each, a candidate's tokens once, and nothing
is ever encoded again (MAHALO, arXiv 2510.01167, "continuing hidden state").
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mahalo_ray.decoding.cached_backbone import memory_errors_alike
from mahalo_ray.decoding.candidates import Candidates
from mahalo_ray.decoding.guidance import GuidedRequest, GuidedResult, Step, StepCandidate, TextOutgrown
from mahalo_ray.decoding.policy import Policy, as_policy, check_vocabulary
from mahalo_ray.decoding.sampling import draw_keys
from mahalo_ray.decoding.scorers import RewardModels
from mahalo_ray.decoding.session import GuidedSession, RequestState, score_steps
from mahalo_ray.decoding.stopping import Boundary, StopReason, StopRule
from mahalo_ray.models.multi_head import MultiHeadCausalLM
from mahalo_ray.models.scoring import StepScorer


def subtrees(request: GuidedRequest) -> list[GuidedRequest]:
    """Diverse verifier tree search as its independent greedy searches; any other request as itself."""
    if request.strategy != "dvts":
        return [request]
    count = request.num_candidates // request.beam_width
    return [
        replace(request, strategy="argmax", num_candidates=request.beam_width, seed=seed)
        for seed in derived_seeds(request.seed, count)
    ]


def derived_seeds(seed: int, count: int) -> list[int]:
    """`count` unrelated seeds from one."""
    keys: list[int] = draw_keys([seed], count, torch.device("cpu"))[0].tolist()
    return keys


class BeamSearch:
    """num_candidates / beam_width beams of one request; at every step the best of all their continuations go
    on.

    The first step has one beam, whose num_candidates continuations are compared. A beam that goes on in
    several ways is copied. A response that ends keeps its place among the beams.
    """

    def __init__(self, session: GuidedSession, request: GuidedRequest) -> None:
        self.session, self.request = session, request
        self.keep = request.num_candidates // request.beam_width
        self.guidance = request.guidance_by(session.models.scale)
        self.seeds = derived_seeds(request.seed, self.keep)
        self.policy_tokens = self.reward_tokens = 0

    def run(self) -> GuidedResult:
        """Until every kept beam has ended; the one whose last step scores best. ValueError if the text
        outgrows a reward model or cannot be scored."""
        root = self.session.submit(replace(self.request, strategy="argmax"))
        self.session.admit()
        if root.error is not None:
            raise root.error
        self.policy_tokens = len(root.prompt_ids)
        beams, ended, count = [root], list[RequestState](), self.request.num_candidates
        while beams:
            grown = self._step(beams, count, self.keep - len(ended))
            beams = [beam for beam in grown if beam.stop_reason is None]
            ended += [beam for beam in grown if beam.stop_reason is not None]
            count = self.request.beam_width
        best = ended[int(self._totals([beam.steps[-1].accepted for beam in ended]).argmax())]
        best.policy_tokens, best.reward_tokens = self.policy_tokens, self.reward_tokens
        best.cache_bytes = self.session.peak_bytes
        return best.result()

    def _totals(self, candidates: list[StepCandidate]) -> Tensor:
        names = self.guidance.scale.objectives
        return self.guidance.totals(torch.tensor([[c.scores[name] for name in names] for c in candidates]))

    def _candidates(
        self, beams: list[RequestState], count: int
    ) -> tuple[Candidates, list[list[StepCandidate]]]:
        """`count` scored continuations of every beam."""
        scorers = self.session.scorers
        before = scorers.tokens_forwarded
        sampled, candidates = self.session.sample(beams, [count] * len(beams))
        scored = []
        for own in score_steps(beams, candidates, scorers, self.guidance.scale):
            if isinstance(own, ValueError):
                raise own
            if any(candidate.total is None for candidate in own):
                raise TextOutgrown("the context is full: lower 'max_new_tokens'")
            scored.append(own)
        self.reward_tokens += scorers.tokens_forwarded - before
        self.policy_tokens += sampled.num_tokens
        return sampled, scored

    def _step(self, beams: list[RequestState], count: int, keep: int) -> list[RequestState]:
        """Each beam's continuations, the `keep` best of them all as beams; the others are dropped."""
        scorers, engine = self.session.scorers, self.session.engine
        sampled, candidates = self._candidates(beams, count)
        pool = [(b, k) for b, own in enumerate(candidates) for k in _distinct(own)]
        totals = self._totals([candidates[b][k] for b, k in pool])
        silent = [not (beams[b].text + candidates[b][k].text).strip() for b, k in pool]
        best = replace(self.guidance, temperature=None).order(totals, silent)
        chosen = [pool[i] for i in best[:keep]]
        grown: list[RequestState] = []
        for b, _ in chosen:
            first = all(beams[b].row != beam.row for beam in grown)
            grown.append(self._beam(beams[b], self.seeds[len(grown)], first))
        engine.accept(sampled.only([b for b, _ in chosen], [g.row for g in grown]), [k for _, k in chosen])
        scorers.accept([g.scorer_row for g in grown], [candidates[b][k] for b, k in chosen])
        for beam, (b, k) in zip(grown, chosen, strict=True):
            self.session.extend(beam, Step(candidates[b], k))
            if engine.length(beam.row) >= engine.max_context and beam.stop_reason is None:
                beam.stop_reason = StopReason.CONTEXT
        going_on = {beam.row for beam in grown if beam.stop_reason is None}
        gone = [beam for beam in [*beams, *grown] if beam.row not in going_on]
        engine.drop(list({beam.row for beam in gone}))
        scorers.drop(list({beam.scorer_row for beam in gone}))
        return grown

    def _beam(self, parent: RequestState, seed: int, first: bool) -> RequestState:
        """A beam that goes on from `parent`: in its rows, or in copies of them if another beam has them."""
        row, scorer_row = parent.row, parent.scorer_row
        if not first:
            (row,), (scorer_row,) = (
                self.session.engine.duplicate([row]),
                self.session.scorers.duplicate([scorer_row]),
            )
        return replace(
            parent,
            row=row,
            scorer_row=scorer_row,
            seed=seed,
            token_ids=list(parent.token_ids),
            steps=list(parent.steps),
        )


def _distinct(candidates: list[StepCandidate]) -> list[int]:
    """The first of every group of candidates with the same tokens: equal beams would search twice."""
    first: dict[tuple[int, ...], int] = {}
    for k, candidate in enumerate(candidates):
        first.setdefault(tuple(candidate.token_ids), k)
    return list(first.values())


class GuidedDecoder:
    """Answers prompts with a policy, guided by one or several reward models (None: the policy alone).

    Process reward models with the policy's tokenizer and chat template read its tokens as they are over a
    kept cache; all others (`models.classifiers` too) read the text again at every step. `boundary`: a
    `Boundary`, or a domain's name ("math", "human_values", "tutoring"). The tokenizer defaults to that of the
    first process reward model. `max_branches` bounds the candidates decoded at once over all requests; more
    requests wait their turn.

    >>> from mahalo_ray import GuidedDecoder, MultiHeadCausalLM, ProcessRewardModel, Weights
    >>> policy = MultiHeadCausalLM.from_base("model", ["accuracy", "engagement"]).eval()
    >>> reward_model = ProcessRewardModel.from_base("model", {"accuracy": "value"}).eval()
    >>> decoder = GuidedDecoder(policy, reward_model, boundary="math")
    >>> result = decoder.generate(
    ...     [{"role": "user", "content": "What is 2 + 3?"}],
    ...     weights=Weights.parse("accuracy=0.7,engagement=0.3"),
    ...     num_candidates=2,
    ...     max_new_tokens=8,
    ...     seed=1,
    ... )
    >>> 1 <= len(result.token_ids) <= 8 and len(result.steps) >= 1
    True
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
        self._models = RewardModels(reward_model, boundary, tokenizer, self.policy.end_ids)
        check_vocabulary(self._models.format, self.policy.vocab_size)
        self.reward_models, self.scale = self._models.models, self._models.scale
        self.boundary, self.format = self._models.boundary, self._models.format
        self.vocabulary = self._models.vocabulary
        self.vocabulary.table(StopRule(self.boundary))  # decoded now and not in a request's time
        self.max_branches, self.max_context = max_branches, max_context

    def session(self) -> GuidedSession:
        """An empty batch that requests can join at any time."""
        return GuidedSession(self.policy, self._models, self.max_branches, self.max_context)

    def generate(self, messages: Sequence[Any], **options: Any) -> GuidedResult:
        """Answer one conversation; options are the fields of `GuidedRequest` (weights, guidance,
        num_candidates...).
        """
        return self.generate_batch([GuidedRequest(messages, **options)])[0]

    def generate_batch(self, requests: Sequence[GuidedRequest]) -> list[GuidedResult]:
        """Answer many conversations. Each answer is what `generate` would give for it alone. Raises the
        ValueError of the first request that cannot be answered.

        All strategies but beam search share one batch; beam searches run one after the other.
        """
        results = []
        for result in self._generate(requests, stop_at_error=True):
            if isinstance(result, ValueError):
                raise result
            results.append(result)
        return results

    def generate_each(self, requests: Sequence[GuidedRequest]) -> list[GuidedResult | ValueError]:
        """`generate_batch`, where a request that cannot be answered is its error and disturbs no other."""
        return self._generate(requests, stop_at_error=False)

    def _generate(
        self, requests: Sequence[GuidedRequest], stop_at_error: bool
    ) -> list[GuidedResult | ValueError]:
        session = self.session()
        errors: dict[int, ValueError] = {}
        states: dict[int, list[RequestState]] = {}
        for number, request in enumerate(requests):
            try:
                prompt = session.check(request)
                if request.strategy != "beam":
                    states[number] = [session.submit(part, prompt=prompt) for part in subtrees(request)]
            except ValueError as error:
                if stop_at_error:
                    raise
                errors[number] = error
        while session.is_busy:
            session.advance()
        results: list[GuidedResult | ValueError] = []
        for number, request in enumerate(requests):
            try:
                if number in errors:
                    results.append(errors[number])
                elif number in states:
                    results.append(self._best(request, [state.result() for state in states[number]]))
                else:
                    results.append(self._beam_search(request))
            except ValueError as error:
                results.append(error)
        return results

    def _beam_search(self, request: GuidedRequest) -> GuidedResult:
        try:
            with memory_errors_alike():
                return BeamSearch(self.session(), request).run()
        except torch.OutOfMemoryError:
            raise ValueError("the search needs more memory than there is: ask for fewer candidates") from None

    def _best(self, request: GuidedRequest, results: Sequence[GuidedResult]) -> GuidedResult:
        """Of the subtrees' answers the one whose last step scores best, with what all of them cost."""
        if len(results) == 1:
            return results[0]
        names = self.scale.objectives
        # A search that outgrew a reward model may have ended without a step to judge it by.
        judged = [r for r in results if r.steps and r.steps[-1].accepted.scores] or results[:1]
        best = judged[0]
        if len(judged) > 1:
            last = [[r.steps[-1].accepted.scores[name] for name in names] for r in judged]
            totals = request.guidance_by(self.scale).totals(torch.tensor(last))
            best = judged[int(totals.argmax())]
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
        strategy "none"). A token that only begins a character has an empty text: the character comes with
        the token that completes it.
        """
        session = self.session()
        state = session.submit(GuidedRequest(messages, **options), token_by_token=tokens)
        while session.is_busy:
            session.advance()
            yield from state.new_steps()
        return state.result()
