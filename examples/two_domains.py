"""Maths and human values in miniature as the text of one SFT model: `two_domains.yaml` makes it, and the runs
behind `five_heads.yaml` start from it. Even seeds are of maths, odd ones of human values."""

from __future__ import annotations

from mahalo_ray.data.records import Dialogue
from mahalo_ray.domains.human_values_miniature.facts import DOMAIN as HUMAN_VALUES
from mahalo_ray.domains.maths.word_problems import DOMAIN as MATHS
from mahalo_ray.domains.protocol import Domain, Episode, Speaker


class TwoDomains:
    """Problems of both, each with the judges of its own domain: text for SFT. To compare answers, a run of
    each domain goes on from the model."""

    boundary = MATHS.boundary
    objectives = MATHS.objectives
    speakers: tuple[Speaker, Speaker] = ("assistant", "user")

    def episode(self, seed: int) -> Episode:
        return _of(seed).episode(seed)

    def sft_dialogue(self, seed: int) -> Dialogue:
        return _of(seed).sft_dialogue(seed)

    def is_malformed(self, text: str) -> bool:
        return MATHS.is_malformed(text) and HUMAN_VALUES.is_malformed(text)


def _of(seed: int) -> Domain:
    return HUMAN_VALUES if seed % 2 else MATHS


DOMAIN = TwoDomains()
