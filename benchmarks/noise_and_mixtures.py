"""What noise in the reward model, conflict and many objectives do to guidance and training in a run's domain.

    python benchmarks/noise_and_mixtures.py runs/maths OUT/maths.json
    python benchmarks/noise_and_mixtures.py runs/human_values OUT/values.json --noise 0 0.2 0.4 --mixtures 10

The three studies of conflict_and_noise.py on models, problems and judges of a finished run of a miniature,
which is only read. The figure is the gain over the SFT model in the weighted outcome, every objective in
standard deviations of its outcome under SFT; intervals resample problems, the same ones for everything. The
domain's program judges, and guides nothing.

Noise: to every candidate's scores a normal number is added, as much as swaps this share of all pairs. The
run's candidates are paired by what is then seen, and a policy is trained on them as the run's was; guidance
sees as much noise. Both are played at the same balances.

Conflict: without noise, at half and half of every two objectives, beside the share of their pairs whose
rejected candidate the other objective scores higher.

Mixtures: objectives that are fixed mixtures of the run's (drawn evenly over all balances), each with a head
and pairs of its own, as many pairs in all as the run's policy has. Each is measured on its own mixture,
beside the run's policy and guided SFT at that balance.
"""

from __future__ import annotations

import argparse
import itertools
import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from finished_run import fresh_player, read_config, train_policy
from measuring import balances, machine, table, write_results

from mahalo_ray.config import RunConfig
from mahalo_ray.data.records import Candidate, CandidateSet, PreferencePair
from mahalo_ray.decoding.guidance import Choice, ChoiceScores
from mahalo_ray.decoding.scorers import RewardModels, ScorerGroup
from mahalo_ray.decoding.stopping import boundary_for
from mahalo_ray.evaluation.methods import Method, MethodPlayer
from mahalo_ray.evaluation.statistics import mean_interval
from mahalo_ray.models import MultiHeadCausalLM
from mahalo_ray.objectives import Weights
from mahalo_ray.rollouts.pair_building import CandidateShards, build_pairs

SHARES = (1.0, 0.5, 0.0)  # of the first of two objectives
Outcomes = Mapping[str, Sequence[float]]  # objective -> value of every problem


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", help="a finished run of a miniature, which is only read")
    parser.add_argument("output", type=Path, help="JSON file for the results")
    parser.add_argument(
        "--noise", type=float, nargs="*", default=[0.0, 0.2, 0.4], help="shares, each below 0.5"
    )
    parser.add_argument("--mixtures", type=int, default=10, help="0: without this study")
    parser.add_argument("--students", type=int, default=120)
    arguments = parser.parse_args()
    if not all(0 <= noise < 0.5 for noise in arguments.noise):
        parser.error("--noise: shares from 0 up to, but not, 0.5")
    torch.set_num_threads(1)
    study = Study(read_config(arguments.run), arguments.students)
    results: dict[str, object] = {"machine": machine(), "run": arguments.run, "students": arguments.students}
    studies = {
        "noise": lambda: study.noise(arguments.noise),
        "conflict": study.conflict,
        "mixtures": lambda: study.mixtures(arguments.mixtures) if arguments.mixtures else [],
    }
    for name, make_rows in studies.items():
        results[name] = rows = make_rows()
        if rows:
            print(f"\n{name}: gain over SFT, {arguments.students} problems")
            print(table(list(rows[0]), [list(map(str, row.values())) for row in rows]), flush=True)
        write_results(arguments.output, results)


class Study:
    """A run whose candidates, models and problems all studies use."""

    def __init__(self, config: RunConfig, students: int) -> None:
        self.config, self.names = config, config.objective_names
        self.player = fresh_player(config, students)
        self.models = self.player.reward_models
        self.candidates = CandidateShards(f"{config.output}/pair_rollouts/candidates")
        self.spreads = within_prompt_stds(self.candidates, self.names)
        self.sft = self._played(Method("SFT", "sft"))
        self.points = balances(self.names, SHARES)

    def noise(self, levels: Sequence[float]) -> list[dict[str, object]]:
        """A row per level: what guidance gains, what a policy does that was trained on such pairs."""
        rows = []
        for level in levels:
            sets = NoisySets(self.candidates, self.spreads, level, self.config.seed)
            pairs = [pair for name in self.names for pair in build_pairs(sets, name, self.config.pairs)[0]]
            with tempfile.TemporaryDirectory() as folder:
                train_policy(self.config, pairs, self.names, folder)
                trained = self._gains(
                    (balance, Method(name, "weights", weights=balance, model_url=folder))
                    for name, balance in self.points.items()
                )
            self.player.reward_models = NoisyRewardModels(self.player, self.models, self.spreads, level)
            guided = self._gains((w, self._guided_sft(name, w)) for name, w in self.points.items())
            self.player.reward_models = self.models
            rows.append(
                {
                    "noise": f"{level:g}",
                    "guided SFT": shown(guided),
                    "policy": shown(trained),
                    "pairs": len(pairs),
                }
            )
        return rows

    def conflict(self) -> list[dict[str, object]]:
        """A row for every two objectives, at half of each."""
        against = {
            name: build_pairs(self.candidates, name, self.config.pairs)[1].conflict for name in self.names
        }
        rows = []
        for first, second in itertools.combinations(self.names, 2):
            share = (against[first][second] + against[second][first]) / 2
            half = Weights.balanced([first, second])
            rows.append(
                {
                    "objectives": f"{first} and {second}",
                    "in conflict": f"{share:.0%}",
                    "guided SFT": shown(self._gains([(half, self._guided_sft("half", half))])),
                    "policy": shown(self._gains([(half, Method("half", "weights", weights=half))])),
                }
            )
        return rows

    def mixtures(self, count: int) -> list[dict[str, object]]:
        """One row: the gain at these mixtures, of a policy with a head for each and of what needs none."""
        random = np.random.default_rng(self.config.seed)
        drawn = [
            Weights(dict(zip(self.names, row, strict=True)))
            for row in random.dirichlet([1.0] * len(self.names), count)
        ]
        named = {f"mixture{number}": weights for number, weights in enumerate(drawn)}
        mixed = MixedSets(self.candidates, self.spreads, named)
        own = sum(build_pairs(self.candidates, name, self.config.pairs)[1].pairs for name in self.names)
        pairs: list[PreferencePair] = []
        for name in named:
            made = list(build_pairs(mixed, name, self.config.pairs)[0])
            kept = random.permutation(len(made))[: own // count]
            pairs += [made[number] for number in sorted(kept)]
        with tempfile.TemporaryDirectory() as folder:
            train_policy(self.config, pairs, list(named), folder)
            trained = MultiHeadCausalLM.from_pretrained(folder)
            urls = {name: f"{folder}/{name}" for name in named}
            for name, url in urls.items():  # a model of one head may be played at the run's own balances
                trained.merge(Weights.one(name)).save_pretrained(url)
                self.player.chat.tokenizer.save_pretrained(url)
            heads = self._gains(
                (weights, Method(name, "weights", weights=weights, model_url=urls[name]))
                for name, weights in named.items()
            )
        policy = self._gains((w, Method(name, "weights", weights=w)) for name, w in named.items())
        guided = self._gains((w, self._guided_sft(name, w)) for name, w in named.items())
        difference = [a - b for a, b in zip(heads, policy, strict=True)]
        return [
            {
                "mixtures": count,
                "guided SFT": shown(guided),
                f"the run's {len(self.names)} heads": shown(policy),
                "a head each": shown(heads),
                "difference of the two": shown(difference),
                "pairs": len(pairs),
            }
        ]

    def _guided_sft(self, name: str, balance: Weights) -> Method:
        return Method(name, "guided_sft", guidance=balance, num_candidates=self.config.guided.num_candidates)

    def _played(self, method: Method) -> Outcomes:
        return self.player.run(method).result.values

    def _gains(self, methods: Iterable[tuple[Weights, Method]]) -> list[float]:
        """Of every problem: the gain over SFT in the weighted outcome, mean over the methods' balances."""
        gains = []
        for balance, method in methods:
            outcomes = self._played(method)
            gain = np.zeros(len(self.player.seeds))
            for name, weight in balance.items():
                before = np.asarray(self.sft[name])
                gain += weight * (np.asarray(outcomes[name]) - before) / before.std()
            gains.append(gain)
        return list(np.mean(gains, axis=0))


def shown(values: Sequence[float]) -> str:
    """Mean and interval."""
    found = mean_interval(values)
    return f"{found.value:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"


def within_prompt_stds(sets: Iterable[CandidateSet], objectives: Sequence[str]) -> dict[str, float]:
    """The root of the mean variance of every objective's scores among the candidates of one prompt."""
    variances = [
        [np.var([scores_of(c)[name] for c in moment.candidates]) for name in objectives] for moment in sets
    ]
    return dict(zip(objectives, np.sqrt(np.mean(variances, axis=0)).tolist(), strict=True))


class NoisyRewardModels(RewardModels):
    """A player's reward models, whose scores have noise."""

    def __init__(
        self, player: MethodPlayer, of: RewardModels, spreads: Mapping[str, float], level: float
    ) -> None:
        super().__init__(
            of.models, boundary_for(player.domain.boundary), player.chat.tokenizer, player.sft.end_ids
        )
        self._noise = [noise_of(level) * spreads[name] for name in self.scale.objectives]

    def follow(self) -> ScorerGroup:
        return NoisyScorers(super().follow(), self._noise)


class NoisyScorers(ScorerGroup):
    """A group of scorers with noise of these standard deviations, one for each objective."""

    def __init__(self, group: ScorerGroup, noise: Sequence[float]) -> None:
        super().__init__([group], group.objectives)
        self._noise = torch.tensor(noise)
        self._random = torch.Generator().manual_seed(1)

    def score(self, choices: Sequence[Choice]) -> list[ChoiceScores]:
        return [self._disturbed(result) for result in super().score(choices)]

    def _disturbed(self, result: ChoiceScores) -> ChoiceScores:
        if isinstance(result.scores, ValueError):
            return result
        drawn = torch.randn(result.scores.shape, generator=self._random)
        return ChoiceScores(result.scores + drawn * self._noise, result.tokens)


def noise_of(level: float) -> float:
    """The standard deviation of noise that swaps this share of pairs of normal scores, in units of theirs."""
    return math.tan(math.pi * level)


@dataclass(frozen=True)
class NoisySets:
    """Candidate sets whose scores have noise, the same at every reading."""

    sets: CandidateShards
    spreads: Mapping[str, float]
    level: float
    seed: int

    def __iter__(self) -> Iterator[CandidateSet]:
        random = np.random.default_rng(self.seed)
        stds = {name: noise_of(self.level) * spread for name, spread in self.spreads.items()}
        for moment in self.sets:
            seen = [
                {name: scores_of(candidate)[name] + std * random.normal() for name, std in stds.items()}
                for candidate in moment.candidates
            ]
            yield with_scores(moment, seen)


@dataclass(frozen=True)
class MixedSets:
    """Candidate sets scored by mixtures, every objective in units of its spread within a prompt."""

    sets: CandidateShards
    spreads: Mapping[str, float]
    mixtures: Mapping[str, Weights]

    def __iter__(self) -> Iterator[CandidateSet]:
        for moment in self.sets:
            yield with_scores(
                moment,
                [
                    {
                        mixture: sum(
                            w * scores_of(c)[name] / self.spreads[name] for name, w in weights.items()
                        )
                        for mixture, weights in self.mixtures.items()
                    }
                    for c in moment.candidates
                ],
            )


def scores_of(candidate: Candidate) -> dict[str, float]:
    """What the run's reward model gave."""
    if candidate.scores is None:
        raise ValueError("the run's candidates have no scores: it did not reach its `pairs`")
    return candidate.scores


def with_scores(moment: CandidateSet, scores: Sequence[dict[str, float]]) -> CandidateSet:
    """The same candidates with other scores."""
    scored = [
        candidate.model_copy(update={"scores": own})
        for candidate, own in zip(moment.candidates, scores, strict=True)
    ]
    return moment.model_copy(update={"candidates": scored})


if __name__ == "__main__":
    main()
