"""Multi-turn tutoring: problems, simulated students, scripted tutors, and the judge of a dialogue.

`DOMAIN` is the miniature.
"""

from mahalo_ray.data.records import Dialogue
from mahalo_ray.domains.protocol import Speaker
from mahalo_ray.domains.tutoring.moves import is_malformed
from mahalo_ray.domains.tutoring.scripted import scripted_dialogue
from mahalo_ray.domains.tutoring.student import OBJECTIVES, TutoringEpisode


class TutoringMiniature:
    """The tutoring miniature as a domain: whole turns, and students who answer them."""

    boundary = "tutoring"
    speakers: tuple[Speaker, Speaker] = ("tutor", "student")
    objectives = OBJECTIVES

    def episode(self, seed: int) -> TutoringEpisode:
        return TutoringEpisode.from_seed(seed)

    def sft_dialogue(self, seed: int) -> Dialogue:
        return scripted_dialogue(seed)

    def is_malformed(self, text: str) -> bool:
        return is_malformed(text)


DOMAIN = TutoringMiniature()
