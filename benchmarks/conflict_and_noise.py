"""What conflict between objectives, noise in the reward model and many objectives do to each method.

    python benchmarks/conflict_and_noise.py

A world in which every figure is exact: a prompt is two tokens, an answer one token of 32, so that what a
policy reaches is a sum over answers and nothing is sampled to measure it. Rewards are random functions of a
prompt's and an answer's features, with mean 0 and spread 1 over the base model's answers; two objectives
correlate by cos(pi c), so that they order a share c of the pairs of answers in opposite ways. The reward
model sees rewards plus noise of its own for every prompt and answer, as much as swaps a share of all pairs;
pairs, regression and guidance use what it sees.

Every method has the same base (a small transformer), prompts, and number of pairs. Reported is the weighted
reward, averaged over balances and prompts that no training has met, in standard deviations over the base; and
the KL to the base. Guidance draws K answers of the base and takes the best-scored, whatever it costs.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from measuring import table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from mahalo_ray.losses import dpo_loss
from mahalo_ray.models import MultiHeadCausalLM

SIDE, ANSWERS, FEATURES = 16, 32, 3  # a prompt is one of SIDE x SIDE
STEPS, BATCH, BETA = 200, 256, 0.5
CANDIDATES = 5


@dataclass(frozen=True)
class Setting:
    """`conflict` and `noise`: shares of the pairs of answers."""

    objectives: int = 2
    conflict: float = 0.5
    noise: float = 0.0


class World:
    """true, seen [prompts, ANSWERS, H]: rewards, and what the reward model makes of them."""

    def __init__(self, setting: Setting, seed: int) -> None:
        torch.manual_seed(seed)
        random = np.random.default_rng(seed)
        self.prompts = torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE))
        config = LlamaConfig(
            vocab_size=max(SIDE, ANSWERS),
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=8,
            initializer_range=0.2,
            tie_word_embeddings=False,
        )
        self.base = LlamaForCausalLM(config).eval()
        with torch.no_grad():
            self.base_logps = self.base(self.prompts).logits[:, -1].log_softmax(-1)[:, :ANSWERS]
            self.base_logps = self.base_logps.log_softmax(-1)
        count = setting.objectives
        mixing = np.eye(count)
        if count == 2:
            correlation = math.cos(math.pi * setting.conflict)
            mixing[1] = correlation, math.sqrt(max(0.0, 1 - correlation**2))
        values = np.stack([self._random_reward(random) for _ in range(count)], axis=-1) @ mixing.T
        self.true = self._standardised(values)
        spread = math.tan(math.pi * setting.noise)  # swaps the order of that share of pairs of normal rewards
        self.seen = self._standardised(self.true.numpy() + spread * random.normal(size=values.shape))
        order = torch.from_numpy(random.permutation(len(self.prompts)))
        self.met, self.new = order[: len(order) // 2], order[len(order) // 2 :]

    @staticmethod
    def _random_reward(random: np.random.Generator) -> np.ndarray:
        """[prompts, ANSWERS]: both tokens of the prompt say which features of an answer are good."""
        answers = random.normal(size=(ANSWERS, FEATURES))
        first, second = random.normal(size=(2, SIDE, FEATURES))
        wanted = (first[:, None] + second[None]).reshape(SIDE * SIDE, FEATURES)
        return np.asarray(wanted @ answers.T)

    def _standardised(self, rewards: np.ndarray) -> Tensor:
        chances = self.base_logps.exp()[..., None]
        values = torch.from_numpy(rewards).float()
        values = values - (chances * values).sum(1, keepdim=True)
        return values / (chances * values**2).sum(1, keepdim=True).mean(0).sqrt()


def train(world: World, seed: int, objectives: Sequence[int], way: str) -> MultiHeadCausalLM:
    """A policy with a head for each of these objectives, on pairs of two answers of the base.

    `way`: "dpo" and "regression" train a pair under its own objective's head, "sampled" a mixture of heads.
    """
    random = torch.Generator().manual_seed(seed)
    names = [str(number) for number in objectives]
    policy = MultiHeadCausalLM.from_base(copy_of(world.base), names, noise=1e-3, seed=seed)
    groups = [
        {"params": list(policy.backbone_parameters()), "lr": 2e-3},
        {"params": list(policy.head_parameters()), "lr": 3e-3},
    ]
    optimiser = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
    scores = world.seen[:, :, list(objectives)]
    draws = np.random.default_rng(seed)
    for _ in range(STEPS):
        rows = world.met[torch.randint(len(world.met), (BATCH,), generator=random)]
        answers = torch.multinomial(world.base_logps[rows].exp(), 2, generator=random)  # two different ones
        gaps = scores[rows, answers[:, 0]] - scores[rows, answers[:, 1]]  # [BATCH, H]
        own = torch.arange(BATCH) % len(names)
        if way == "sampled":
            weights = torch.from_numpy(draws.dirichlet([0.5] * len(names), BATCH)).float()
        else:
            weights = torch.nn.functional.one_hot(own, len(names)).float()
        gap = (weights * gaps).sum(1)
        if way == "dpo":
            answers = torch.where((gap >= 0)[:, None], answers, answers.flip(1))
        policy_logps = logps_of(policy, world.prompts[rows], weights).gather(1, answers)
        reference = world.base_logps[rows].gather(1, answers)
        losses = dpo_loss(
            *policy_logps.unbind(1),
            *reference.unbind(1),
            BETA,
            "sigmoid" if way == "dpo" else "regression",
            margin=None if way == "dpo" else gap,
        )
        optimiser.zero_grad()
        losses.mean().backward()
        optimiser.step()
        schedule.step()
    return policy.eval()


def copy_of(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Another model with the same weights."""
    copied = LlamaForCausalLM(model.config)
    copied.load_state_dict(model.state_dict())
    return copied


def logps_of(policy: MultiHeadCausalLM, prompts: Tensor, weights: Tensor) -> Tensor:
    """Log-probs [B, ANSWERS] of all answers under mixtures weights [B, H]."""
    hidden = policy.hidden_states(prompts)[:, -1]
    return policy.logits(hidden, weights)[:, :ANSWERS].log_softmax(-1)


# log-probs [prompts, ANSWERS] of a method at one balance
Policy = Callable[[Tensor], Tensor]


def heads(policy: MultiHeadCausalLM, world: World) -> Policy:
    """One multi-head policy at any balance."""
    prompts = world.prompts[world.new]
    return lambda balance: logps_of(policy, prompts, balance.expand(len(prompts), -1))


def soup(policies: Sequence[MultiHeadCausalLM], world: World) -> Policy:
    """Single-objective policies whose weights are averaged by the balance."""
    prompts = world.prompts[world.new]
    states = [policy.state_dict() for policy in policies]
    names = [policy.objectives[0] for policy in policies]

    def at(balance: Tensor) -> Tensor:
        mixed = MultiHeadCausalLM.from_base(copy_of(world.base), names[:1], noise=0.0)
        total = {}
        for share, state, name in zip(balance.tolist(), states, names, strict=True):
            for key, value in state.items():
                key = key.replace(f"heads.{name}.", f"heads.{names[0]}.")
                total[key] = total.get(key, 0) + share * value
        mixed.load_state_dict(total)
        return logps_of(mixed.eval(), prompts, torch.ones(len(prompts), 1))

    return at


def guided(world: World, count: int) -> Policy:
    """The best-scored of `count` answers of the base: an answer is chosen where all draws score no higher and
    not all score lower."""
    base, seen = world.base_logps[world.new].exp(), world.seen[world.new]

    def at(balance: Tensor) -> Tensor:
        order = (seen @ balance).argsort(dim=1)
        below = base.gather(1, order).cumsum(1).clamp(max=1.0)
        chances = torch.diff(below**count, dim=1, prepend=torch.zeros(len(below), 1))
        return torch.zeros_like(base).scatter(1, order, chances).clamp(min=1e-30).log()

    return at


@torch.no_grad()
def measure(method: Policy, world: World, balances: Tensor) -> tuple[float, float]:
    """Mean weighted reward and KL to the base (nats) over balances and new prompts."""
    true, base = world.true[world.new], world.base_logps[world.new]
    rewards, divergences = [], []
    for balance in balances:
        logps = method(balance)
        chances = logps.exp()
        rewards.append((chances * (true @ balance)).sum(1).mean())
        divergences.append((chances * (logps - base)).sum(1).mean())
    return float(torch.stack(rewards).mean()), float(torch.stack(divergences).mean())


def methods(world: World, setting: Setting, seed: int) -> dict[str, Policy]:
    """Every method's policy, trained."""
    every = range(setting.objectives)
    alone = [train(world, seed, [number], "dpo") for number in every]
    return {
        "guided base, K 5": guided(world, CANDIDATES),
        "MAH-DPO": heads(train(world, seed, every, "dpo"), world),
        "regression, own heads": heads(train(world, seed, every, "regression"), world),
        "regression, sampled balances": heads(train(world, seed, every, "sampled"), world),
        "DPO soup": soup(alone, world),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--balances", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    plain = Setting()
    studies = {
        "conflict": [replace(plain, conflict=share) for share in (0.0, 0.25, 0.5, 0.75, 1.0)],
        "noise": [replace(plain, noise=share) for share in (0.0, 0.1, 0.2, 0.3, 0.4)],
        "objectives": [replace(plain, objectives=count) for count in (2, 5, 10)],
    }
    for study, settings in studies.items():
        rows: dict[str, list[str]] = {}
        for setting in settings:
            found: dict[str, list[tuple[float, float]]] = {}
            for seed in arguments.seeds:
                world = World(setting, seed)
                drawn = np.random.default_rng(seed).dirichlet([1.0] * setting.objectives, arguments.balances)
                balances = torch.from_numpy(drawn).float()
                for name, method in methods(world, setting, seed).items():
                    found.setdefault(name, []).append(measure(method, world, balances))
            for name, pairs in found.items():
                rewards, divergences = zip(*pairs, strict=True)
                span = f"{min(rewards):.2f} to {max(rewards):.2f}"
                text = f"{np.mean(rewards):.2f} ({span}), KL {np.mean(divergences):.2f}"
                rows.setdefault(name, []).append(text)
        columns = [str(getattr(setting, study)) for setting in settings]
        print(f"\n{study}: weighted reward, mean over {len(arguments.seeds)} worlds (lowest to highest), KL")
        print(table(["method", *columns], [[name, *cells] for name, cells in rows.items()]), flush=True)


if __name__ == "__main__":
    main()
