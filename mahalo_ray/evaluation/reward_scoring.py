"""Held-out traces and pairs through a reward model, ours or a foreign one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

from torch import nn

from mahalo_ray.data.records import PreferencePair, StepTrace
from mahalo_ray.data.scored import ScoredPair, ScoredTrace
from mahalo_ray.decoding.products import FastProducts
from mahalo_ray.models.foreign import SequenceClassifierScorer
from mahalo_ray.models.scoring import StepScorer, TraceScorer
from mahalo_ray.models.traces import TokenTrace
from mahalo_ray.training.pairs import split_key
from mahalo_ray.training.traces import token_trace


class Scored(NamedTuple):
    """`cut`: traces that lost steps, and pairs that lost the beginning of their prompt, to the model's
    context."""

    traces: list[ScoredTrace]
    pairs: list[ScoredPair]
    cut: int


def score_rows(
    scorer: StepScorer,
    traces: Sequence[StepTrace],
    pairs: Sequence[PreferencePair],
    batch_size: int = 16,
) -> Scored:
    """Scores of all steps, and of both responses of pairs of the scorer's objectives.

    Traces longer than a model's context are cut at a step boundary; what has no step left is left out. A
    sequence classifier refuses what it cannot read (ValueError).
    """
    pairs = [pair for pair in pairs if pair.objective in scorer.objectives]
    if isinstance(scorer, TraceScorer):
        return _by_tokens(scorer, traces, pairs, batch_size)
    assert isinstance(scorer, SequenceClassifierScorer)
    asked = [(trace.prompt, trace.steps) for trace in traces]
    asked += [(pair.prompt, [text]) for pair in pairs for text in (pair.chosen, pair.rejected)]
    scores = scorer.score_batch(asked, batch_size)
    count = [[len(scorer.tokenizer(step)["input_ids"]) for step in trace.steps] for trace in traces]
    found = [
        _scored_trace(trace, tokens, own)
        for trace, tokens, own in zip(traces, count, scores[: len(traces)], strict=True)
    ]
    return Scored(found, _scored_pairs(pairs, scores[len(traces) :]), 0)


def _by_tokens(
    scorer: TraceScorer, traces: Sequence[StepTrace], pairs: Sequence[PreferencePair], batch_size: int
) -> Scored:
    limit, cut = scorer.max_length, 0
    kept: list[tuple[StepTrace, TokenTrace]] = []
    for trace in traces:
        tokens = token_trace(trace, scorer.encoder)
        steps = sum(end < limit for end in tokens.ends)
        cut += steps < len(tokens.ends)
        if steps:
            kept.append(
                (trace, TokenTrace(tokens.input_ids[:limit], tokens.starts[:steps], tokens.ends[:steps]))
            )
    answers = []
    for pair in pairs:
        both = [_answer(pair, name, scorer) for name in ("chosen", "rejected")]
        cut += any(len(tokens.input_ids) > limit for tokens in both)
        answers += [_keep_end(tokens, limit) for tokens in both]
    with FastProducts(cast(nn.Module, scorer))():
        values = scorer.score_traces([tokens for _, tokens in kept] + answers, batch_size)
    scores = [{name: own[:, h].tolist() for h, name in enumerate(scorer.objectives)} for own in values]
    found = []
    for (trace, tokens), own in zip(kept, scores[: len(kept)], strict=True):
        lengths = [end - start + 1 for start, end in zip(tokens.starts, tokens.ends, strict=True)]
        found.append(_scored_trace(trace, lengths, own))
    return Scored(found, _scored_pairs(pairs, scores[len(kept) :]), cut)


def _answer(pair: PreferencePair, name: str, scorer: TraceScorer) -> TokenTrace:
    ids = {"chosen": pair.chosen_ids, "rejected": pair.rejected_ids}[name]
    if ids is None or pair.prompt_ids is None:
        return scorer.encoder.encode(pair.prompt, [{"chosen": pair.chosen, "rejected": pair.rejected}[name]])
    start = len(pair.prompt_ids)
    return TokenTrace(pair.prompt_ids + ids, [start], [start + len(ids) - 1])


def _keep_end(tokens: TokenTrace, limit: int) -> TokenTrace:
    """A pair's response with as much of the prompt's end as fits."""
    surplus = max(0, len(tokens.input_ids) - limit)
    start = max(0, tokens.starts[0] - surplus)
    return TokenTrace(tokens.input_ids[surplus:], [start], [tokens.ends[0] - surplus])


def _scored_trace(trace: StepTrace, tokens: Sequence[int], scores: dict[str, list[float]]) -> ScoredTrace:
    steps = len(tokens)
    labels = {name: values[:steps] for name, values in trace.labels.items()}
    # A trace that was cut has not reached its outcome.
    outcome = trace.outcome if steps == len(trace.steps) else None
    return ScoredTrace(
        id=trace.id,
        group=trace.group,
        dialogue=trace.dialogue or trace.group,
        turns_before=sum(message.role == "assistant" for message in trace.prompt),
        tokens=list(tokens),
        scores=scores,
        labels=labels,
        outcome=outcome,
    )


def _scored_pairs(
    pairs: Sequence[PreferencePair], scores: Sequence[dict[str, list[float]]]
) -> list[ScoredPair]:
    """Scores come in the order chosen, rejected, chosen ..."""
    return [
        ScoredPair(
            id=pair.id,
            dialogue=split_key(pair),
            objective=pair.objective,
            chosen=chosen[pair.objective][0],
            rejected=rejected[pair.objective][0],
        )
        for pair, chosen, rejected in zip(pairs, scores[0::2], scores[1::2], strict=True)
    ]
