"""Searches that follow several partial responses of one request at once."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mahalo_ray.decoding.guidance import GuidedRequest, GuidedResult, Step, StepCandidate, TextOutgrown
from mahalo_ray.decoding.sampling import draw_keys
from mahalo_ray.decoding.session import GuidedSession, RequestState, score_steps
from mahalo_ray.decoding.stopping import StopReason
from mahalo_ray.decoding.token_loop import Candidates


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
