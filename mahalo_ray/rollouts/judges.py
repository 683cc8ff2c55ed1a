"""Judges as a labelling job opens them: those of `mahalo_ray.domains.verdicts`, and a local reward model. No
Ray here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mahalo_ray.config import (
    CheckerJudgeConfig,
    EndpointJudgeConfig,
    JudgeConfig,
    ModelJudgeConfig,
    ProgramJudgeConfig,
)
from mahalo_ray.decoding.policy import DeviceConfig
from mahalo_ray.domains.verdicts import (
    CheckerJudge,
    EndpointJudge,
    Judge,
    Judged,
    ProgramJudge,
    Score,
    Unjudged,
)
from mahalo_ray.models.classifiers import load_scorer
from mahalo_ray.models.folder import METADATA_FILE, model_folder
from mahalo_ray.objectives import unknown_name
from mahalo_ray.rollouts.pool import share_limits


class ModelJudge(Judge):
    """A local reward model. The prefixes of one response are read in one forward where the model can."""

    def __init__(self, config: ModelJudgeConfig, placement: DeviceConfig) -> None:
        folder = model_folder(config.path)
        classifier_objective = None if (folder / METADATA_FILE).is_file() else config.objective
        self._scorer = load_scorer(folder, classifier_objective, placement.torch_dtype, placement.device)
        names, self._batch_size = self._scorer.objectives, config.batch_size
        chosen = config.objective if config.objective is not None else names[0] if len(names) == 1 else None
        if chosen is None:
            raise ValueError(f"'{config.path}' scores {', '.join(names)}: say which one judges ('objective')")
        if chosen not in names:
            raise ValueError(unknown_name("objective", chosen, names))
        self._objective = chosen

    def score(self, items: Sequence[Judged]) -> list[Score]:
        if not items:
            return []
        whole: list[Judged] = []
        place: dict[tuple[Any, ...], tuple[int, int]] = {}
        for item in sorted(items, key=lambda item: -len(item.steps)):
            if (item.prompt, item.steps) not in place:
                for count in range(1, len(item.steps) + 1):
                    place.setdefault((item.prompt, item.steps[:count]), (len(whole), count - 1))
                whole.append(item)
        scores = self._scores(whole)
        item_scores: list[Score] = []
        for item in items:
            trace, step = place[item.prompt, item.steps]
            step_scores = scores[trace]
            item_scores.append(step_scores if isinstance(step_scores, Unjudged) else step_scores[step])
        return item_scores

    def _scores(self, whole: Sequence[Judged]) -> list[list[float] | Unjudged]:
        """Of every step of these responses; one that the model cannot read does not cost the others."""
        try:
            return list(self._read(whole))
        except ValueError:
            step_scores: list[list[float] | Unjudged] = []
            for item in whole:
                try:
                    step_scores += self._read([item])
                except ValueError as error:
                    step_scores.append(Unjudged(str(error)))
            return step_scores

    def _read(self, items: Sequence[Judged]) -> list[list[float]]:
        traces = [(item.prompt, item.steps) for item in items]
        return [scores[self._objective] for scores in self._scorer.score_batch(traces, self._batch_size)]


@dataclass(frozen=True)
class JudgeSpec:
    """A judge as actors make it: the rubric's text instead of its file, the threshold that holds, and whether
    people's ratings set it (the checker needs none)."""

    config: JudgeConfig
    threshold: float
    calibrated: bool
    rubric: str = ""

    def open(self, placement: DeviceConfig, actors: int, seed: int) -> Judge:
        """The judge, ready to score."""
        config = self.config
        if isinstance(config, EndpointJudgeConfig):
            return EndpointJudge(config, self.rubric, share_limits(config.endpoint, actors), seed)
        if isinstance(config, ModelJudgeConfig):
            return ModelJudge(config, placement)
        if isinstance(config, ProgramJudgeConfig):
            return ProgramJudge(config.function)
        assert isinstance(config, CheckerJudgeConfig)
        return CheckerJudge()

    @property
    def label(self) -> str:
        """For people: what judged, and whether it was calibrated."""
        if isinstance(self.config, CheckerJudgeConfig):
            return "checker"
        return f"{self.config.kind} judge, {'calibrated' if self.calibrated else 'UNCALIBRATED'}"
