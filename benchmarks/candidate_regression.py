"""Trains a policy on all candidates of a prompt at once, at sampled balances: scores regressed, no pairs.

    python benchmarks/candidate_regression.py runs/quickstart OUT/model
    python benchmarks/candidate_regression.py runs/quickstart OUT/model --share 0.5 --scale 3
    python benchmarks/which_dial.py runs/quickstart OUT/front.json --policy OUT/model --label "regression:"

For a prompt with candidates y_1 .. y_K a balance w is drawn, half near the ends (Beta(1/2, 1/2)). With
h_k = log pi_w(y_k) - log ref(y_k), pi_w the mixture of heads by w, and t_k = scale * sum_i w_i s_ki / sigma_i
the loss is mean_k ((h_k - mean h) - (t_k - mean t))^2. At its least pi_w is proportional to ref exp(t): what
guidance with these weights approaches with many candidates. Prompts are read once for their candidates.
One process, no Ray, no ZeRO: what this way of training is worth, beside the `policy` stage of a run.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from measuring import machine
from torch import Tensor
from transformers import AutoTokenizer

from mahalo_ray.config import RunConfig
from mahalo_ray.data.records import CandidateSet
from mahalo_ray.models import MultiHeadCausalLM
from mahalo_ray.pipeline.artifacts import run_model
from mahalo_ray.rollouts.pair_building import CandidateShards
from mahalo_ray.rollouts.tutors import BRANCH

HELD_OUT = 0.05  # of the dialogues
SORTED = 16  # batches whose prompts are sorted by length, so that little is padding
WARM_UP = 0.03
CORRELATED = 96  # held-out prompts that are measured


@dataclass(frozen=True)
class Prompt:
    """A moment of a dialogue. scores [K, objectives]."""

    tokens: list[int]
    candidates: list[list[int]]
    scores: np.ndarray


@dataclass(frozen=True)
class Batch:
    """B prompts, each followed by its K candidates, packed; L tokens in the longest candidate.

    ids, positions [B, T]; mask [B, 1, T, T], added to attention's logits: a candidate sees its prompt and
    itself. labels, sources [B, K, L]: tokens, and where the state that predicts each is; present [B, K, L].
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor
    labels: Tensor
    sources: Tensor
    present: Tensor
    scores: Tensor

    @classmethod
    def of(cls, prompts: Sequence[Prompt]) -> Batch:
        size, count = len(prompts), max(len(p.candidates) for p in prompts)
        longest = max(len(p.tokens) for p in prompts)
        width = longest + max(sum(map(len, p.candidates)) for p in prompts)
        most = max(len(tokens) for p in prompts for tokens in p.candidates)
        ids, positions = torch.zeros(2, size, width, dtype=torch.long)
        owner = torch.full((size, width), -1)  # 0: the prompt; k: candidate k; -1: padding
        labels, sources = torch.zeros(2, size, count, most, dtype=torch.long)
        present = torch.zeros(size, count, most, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            start, length = longest - len(prompt.tokens), len(prompt.tokens)
            ids[row, start:longest] = torch.tensor(prompt.tokens)
            positions[row, start:longest] = torch.arange(length)
            owner[row, start:longest] = 0
            place = longest
            for k, tokens in enumerate(prompt.candidates):
                end = place + len(tokens)
                ids[row, place:end] = labels[row, k, : len(tokens)] = torch.tensor(tokens)
                positions[row, place:end] = length + torch.arange(len(tokens))
                owner[row, place:end] = k + 1
                sources[row, k, 0] = longest - 1
                sources[row, k, 1 : len(tokens)] = torch.arange(place, end - 1)
                present[row, k, : len(tokens)] = True
                place = end
        seen = (owner[:, None, :] == 0) | (owner[:, :, None] == owner[:, None, :])
        seen &= (owner[:, None, :] >= 0) & torch.ones(width, width, dtype=torch.bool).tril()
        seen |= torch.eye(width, dtype=torch.bool)
        mask = torch.zeros(size, 1, width, width).masked_fill(~seen[:, None], torch.finfo(torch.float32).min)
        scores = torch.from_numpy(np.stack([p.scores for p in prompts])).float()
        return cls(ids, positions, mask, labels, sources, present, scores)

    def logps(self, model: MultiHeadCausalLM, weights: Tensor) -> Tensor:
        """Log-probs [B, K] in nats of the candidates under the heads mixed by weights [B, H]."""
        hidden = model.backbone(
            input_ids=self.ids,
            attention_mask=self.mask,
            position_ids=self.positions,
            use_cache=False,
            return_dict=True,
        ).last_hidden_state
        row, k, place = self.present.nonzero(as_tuple=True)
        states = hidden[row, self.sources[row, k, place]]
        logits = model.logits(states, weights[row])
        logps = torch.log_softmax(logits, -1).gather(1, self.labels[row, k, place][:, None])[:, 0]
        size, count = self.present.shape[:2]
        sums = logps.new_zeros(size * count).index_add(0, row * count + k, logps)
        return sums.reshape(size, count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", help="a run with SFT, reward model and scored candidates; only read")
    parser.add_argument("output", type=Path, help="folder for the policy")
    parser.add_argument("--share", type=float, default=0.95, help="of the dialogues that is trained on")
    parser.add_argument("--scale", type=float, default=2.0, help="nats per standard deviation of the scores")
    parser.add_argument("--batch", type=int, default=24, help="prompts per step")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--learning-rates", type=float, nargs=2, default=(1e-4, 6e-4), help="backbone, heads")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = RunConfig.model_validate(yaml.safe_load(Path(arguments.run, "config.yaml").read_text()))
    torch.manual_seed(config.seed)
    draws = np.random.default_rng(config.seed)
    prompts, held_out = read(arguments.run, config.objective_names, arguments.share, draws)
    spread = torch.tensor(np.sqrt(np.mean([p.scores.var(0) for p in prompts], axis=0))).float()
    print(f"{len(prompts)} prompts, spread of the scores within a prompt {spread.tolist()}", flush=True)
    sft = run_model(arguments.run, "sft")
    names = config.objective_names
    model = MultiHeadCausalLM.from_base(sft, names, seed=config.seed, keep_base_head=True)
    reference = MultiHeadCausalLM.from_base(sft, names[:1], noise=0.0)
    target = Target(reference, spread, arguments.scale)
    batches = list(plan(prompts, arguments.batch, arguments.epochs, draws))
    train(model, target, batches, arguments.learning_rates, draws)
    correlations = {share: target.correlation(model, held_out, share) for share in (1.0, 0.5, 0.0)}
    print(f"correlation of log-ratios with scores, held-out, by share of {names[0]}: {correlations}")
    model.save_pretrained(arguments.output, AutoTokenizer.from_pretrained(sft))
    about = {"machine": machine(), "arguments": {k: str(v) for k, v in vars(arguments).items()}}
    Path(arguments.output, "training.json").write_text(json.dumps({**about, "held_out": correlations}))


def read(
    run: str, objectives: Sequence[str], share: float, draws: np.random.Generator
) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts of so many dialogues (and their branches), and held-out ones."""
    by_dialogue: dict[str, list[Prompt]] = {}
    for moment in CandidateShards(f"{run}/pair_rollouts/candidates"):
        by_dialogue.setdefault(moment.dialogue.partition(BRANCH)[0], []).append(_prompt(moment, objectives))
    names = sorted(by_dialogue)
    draws.shuffle(names)
    aside = int(HELD_OUT * len(names))
    used = names[aside : aside + int(share * len(names))]
    prompts = [prompt for name in used for prompt in by_dialogue[name]]
    return prompts, [prompt for name in names[:aside] for prompt in by_dialogue[name]][:CORRELATED]


def _prompt(moment: CandidateSet, objectives: Sequence[str]) -> Prompt:
    scores = [[(candidate.scores or {})[name] for name in objectives] for candidate in moment.candidates]
    return Prompt(list(moment.prompt_ids), [list(c.token_ids) for c in moment.candidates], np.array(scores))


def plan(
    prompts: Sequence[Prompt], size: int, epochs: int, draws: np.random.Generator
) -> Iterator[list[Prompt]]:
    """Batches of prompts of like length, in random order."""
    for _ in range(epochs):
        order = draws.permutation(len(prompts))
        batches = []
        for start in range(0, len(order), size * SORTED):
            part = sorted(order[start : start + size * SORTED], key=lambda i: len(prompts[i].tokens))
            batches += [part[i : i + size] for i in range(0, len(part) - size + 1, size)]
        for number in draws.permutation(len(batches)):
            yield [prompts[i] for i in batches[number]]


@dataclass(frozen=True)
class Target:
    """What the log-ratios are regressed on. spread [H]: of the scores within a prompt."""

    reference: MultiHeadCausalLM
    spread: Tensor
    scale: float

    def centred(self, model: MultiHeadCausalLM, batch: Batch, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Log-ratios and targets [B, K], each prompt's mean taken out."""
        with torch.no_grad():
            base = batch.logps(self.reference, torch.ones(len(batch.ids), 1))
        ratios = batch.logps(model, weights) - base
        wanted = self.scale * (batch.scores / self.spread * weights[:, None]).sum(-1)
        return ratios - ratios.mean(1, keepdim=True), wanted - wanted.mean(1, keepdim=True)

    @torch.no_grad()
    def correlation(self, model: MultiHeadCausalLM, prompts: Sequence[Prompt], share: float) -> float:
        """Of log-ratios and targets within prompts, at one balance."""
        batch = Batch.of(prompts)
        ratios, wanted = self.centred(model, batch, torch.tensor([[share, 1 - share]] * len(prompts)))
        return float(torch.corrcoef(torch.stack([ratios.flatten(), wanted.flatten()]))[0, 1])


def train(
    model: MultiHeadCausalLM,
    target: Target,
    batches: Sequence[Sequence[Prompt]],
    rates: Sequence[float],
    draws: np.random.Generator,
) -> None:
    """One step per batch; warm-up, then a cosine."""
    groups = [{"params": list(model.backbone_parameters())}, {"params": list(model.head_parameters())}]
    optimiser = torch.optim.AdamW(groups, weight_decay=0.0)
    began, losses = time.monotonic(), []
    for step, prompts in enumerate(batches):
        height = min(1.0, (step + 1) / max(1, WARM_UP * len(batches)))
        height *= 0.5 * (1 + math.cos(math.pi * step / len(batches)))
        for group, rate in zip(optimiser.param_groups, rates, strict=True):
            group["lr"] = rate * height
        shares = draws.beta(0.5, 0.5, len(prompts))
        weights = torch.tensor(np.stack([shares, 1 - shares], axis=1)).float()
        loss = F.mse_loss(*target.centred(model, Batch.of(prompts), weights))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimiser.step()
        losses.append(loss.item())
        if (step + 1) % 50 == 0 or step + 1 == len(batches):
            mean, seconds = np.mean(losses[-50:]), time.monotonic() - began
            print(f"step {step + 1} of {len(batches)}, loss {mean:.3f}, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
