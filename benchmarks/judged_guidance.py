"""Guided against unguided replies under a judge that guided nothing.

    python benchmarks/judged_guidance.py MODEL PAIRS --output judged.json

MODEL is a causal language model's folder, PAIRS a file of preference pairs. Dialogues are split in three: one
part trains the reward model that guides, one another that judges, the third gives the prompts that are
answered (its pairs also tell how often each of the two ranks chosen above rejected). Both are heads on the
frozen model, from other data and other seeds; what the two share is the backbone.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measuring import machine, write_results
from torch import Tensor

from mahalo_ray.data.pair_readers import ReadPairs, read_pairs
from mahalo_ray.data.records import PreferencePair
from mahalo_ray.decoding.cpu_matmul import OneDNNLinears
from mahalo_ray.decoding.guidance import GuidedRequest
from mahalo_ray.decoding.guided import GuidedDecoder
from mahalo_ray.decoding.stopping import TurnBoundary
from mahalo_ray.evaluation.statistics import mean_interval
from mahalo_ray.models import ProcessRewardModel
from mahalo_ray.models.backbone import load_causal_lm, load_tokenizer
from mahalo_ray.models.scoring import pad_traces

OBJECTIVE = "quality"
PARTS = ("guide", "judge", "prompts")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", help="folder of a causal language model")
    parser.add_argument("pairs", help="preference pairs, as for 'data.pairs'")
    parser.add_argument("--train", type=int, default=80, help="pairs for each reward model")
    parser.add_argument("--prompts", type=int, default=20, help="prompts to answer")
    parser.add_argument("--candidates", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=96, help="of a reply")
    parser.add_argument("--longest", type=int, default=448, help="leave pairs with more tokens out")
    parser.add_argument("--seeds", type=int, default=1, help="replies per prompt")
    parser.add_argument("--output", type=Path, required=True, help="results as JSON")
    options = parser.parse_args(arguments)
    base = load_causal_lm(options.model, torch.float32, None)
    models = {
        part: ProcessRewardModel.from_base(
            base, {OBJECTIVE: "preference"}, tuning="frozen", inputs=["last", "pooled"], seed=seed,
            step_separator=None, tokenizer=load_tokenizer(options.model),
        )
        for seed, part in enumerate(PARTS[:2], start=1)
    }  # fmt: skip
    parts = _parts(options, models["guide"])
    held_out = features_of(models["guide"], parts["prompts"])
    results: dict[str, Any] = {"benchmark": "judged_guidance", "machine": machine(), "accuracy": {}}
    results["sizes"] = {name: len(pairs) for name, pairs in parts.items()}
    for name, model in models.items():
        train_head(model, features_of(model, parts[name]), seed=len(name))
        margins = margins_of(model, held_out)
        results["accuracy"][name] = {
            "train": float((margins_of(model, features_of(model, parts[name][:20])) > 0).float().mean()),
            "held_out": float((margins > 0).float().mean()),
        }
        print(f"{name}: {results['accuracy'][name]}", file=sys.stderr, flush=True)
    results |= _compared(base, models, parts["prompts"][: options.prompts], options)
    write_results(options.output, results)
    print(report(results))


def _parts(options: argparse.Namespace, model: ProcessRewardModel) -> dict[str, list[PreferencePair]]:
    """Three parts of the pairs that share no dialogue, shorter ones only."""
    found = ReadPairs()
    read_pairs(options.pairs, "auto", [OBJECTIVE], OBJECTIVE, None, "pairs", found)
    parts: dict[str, list[PreferencePair]] = {name: [] for name in PARTS}
    for pair in found.pairs:
        digest = hashlib.blake2b((pair.dialogue or pair.id).encode(), digest_size=4).digest()
        part = PARTS[int.from_bytes(digest, "big") % 3]
        if len(parts[part]) < (options.train if part != "prompts" else max(options.prompts, 40)):
            length = max(len(trace.input_ids) for trace in _traces(model, [pair]))
            if length <= options.longest:
                parts[part].append(pair)
    return parts


def _traces(model: ProcessRewardModel, pairs: Sequence[PreferencePair]) -> list[Any]:
    """Chosen and rejected in turn."""
    return [model.encoder.encode(p.prompt, [text]) for p in pairs for text in (p.chosen, p.rejected)]


@torch.no_grad()
def features_of(model: ProcessRewardModel, pairs: Sequence[PreferencePair]) -> Tensor:
    """Head inputs [pairs, 2, F] of chosen and rejected: the frozen backbone reads each text once."""
    rows = []
    with OneDNNLinears(model.backbone)():
        for trace in _traces(model, pairs):
            rows.append(model.features(*pad_traces([trace], 0))[0, 0])
    return torch.stack(rows).unflatten(0, (-1, 2))


def margins_of(model: ProcessRewardModel, features: Tensor) -> Tensor:
    scores = model.heads(features)[..., 0]
    margins: Tensor = scores[:, 0] - scores[:, 1]
    return margins


def train_head(model: ProcessRewardModel, features: Tensor, seed: int, epochs: int = 60) -> None:
    """Bradley-Terry on the head alone, in shuffled batches of 16."""
    torch.manual_seed(seed)
    optimiser = torch.optim.AdamW(model.heads.parameters(), lr=3e-4, weight_decay=0.1)
    for _ in range(epochs):
        for batch in torch.randperm(len(features)).split(16):
            optimiser.zero_grad()
            (-F.logsigmoid(margins_of(model, features[batch]))).mean().backward()
            optimiser.step()


def _compared(
    base: Any, models: dict[str, ProcessRewardModel], pairs: list[PreferencePair], options: argparse.Namespace
) -> dict[str, Any]:
    """Replies with K candidates and with one, scored by both reward models."""
    decoder = GuidedDecoder(base, models["guide"], TurnBoundary(), max_branches=100)
    replies: dict[str, list[str]] = {}
    for name, candidates in (("unguided", 1), ("guided", options.candidates)):
        requests = [
            GuidedRequest(
                pair.prompt, num_candidates=candidates, seed=seed,
                max_new_tokens=options.max_tokens, max_step_tokens=options.max_tokens,
            )
            for pair in pairs
            for seed in range(options.seeds)
        ]  # fmt: skip
        replies[name] = [result.text for result in decoder.generate_batch(requests)]
    prompts = [pair.prompt for pair in pairs for _ in range(options.seeds)]
    found: dict[str, Any] = {"replies": replies, "prompts": len(pairs), "seeds": options.seeds}
    for part, model in models.items():
        scores = {
            name: _scores(model, [(p, [t or "."]) for p, t in zip(prompts, texts, strict=True)])
            for name, texts in replies.items()
        }
        spread = float(torch.tensor(scores["unguided"]).std())
        gains = [(a - b) / spread for a, b in zip(scores["guided"], scores["unguided"], strict=True)]
        # Replies to one prompt are not independent: means over its seeds are resampled.
        per_prompt = torch.tensor(gains).unflatten(0, (-1, options.seeds)).mean(dim=1).tolist()
        found[f"gain_under_{part}"] = mean_interval(per_prompt).model_dump()
        found[f"wins_under_{part}"] = sum(g > 0 for g in gains) / len(gains)
    return found


def _scores(model: ProcessRewardModel, asked: list[Any]) -> list[float]:
    with OneDNNLinears(model.backbone)():
        return [scores[OBJECTIVE][0] for scores in model.score_batch(asked)]


def report(results: dict[str, Any]) -> str:
    lines = [
        f"{name}: ranks {one['held_out']:.0%} of {results['sizes']['prompts']} held-out pairs rightly, "
        f"{one['train']:.0%} of its own"
        for name, one in results["accuracy"].items()
    ]
    for part in PARTS[:2]:
        gain = results[f"gain_under_{part}"]
        lines.append(
            f"guided over unguided under the {part}: {gain['value']:+.2f} [{gain['low']:+.2f}, "
            f"{gain['high']:+.2f}] standard deviations of unguided scores, over {results['prompts']} "
            f"prompts; higher in {results[f'wins_under_{part}']:.0%}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
