"""A domain of one's own in one file: say all that was asked for, in few words. `brevity.yaml` runs it, and
docs/domains.md explains it.

The model is given a list of traits and describes a thing by them. What it is judged by pulls apart: every
trait that is said makes the description more complete, and every word makes it longer.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from mahalo_ray.data.records import Dialogue
from mahalo_ray.domains.protocol import AnswerEpisode, DomainObjective, Speaker

THINGS = ("lamp", "kite", "boat", "drum", "coat", "clock", "chair", "wagon")
TRAITS = (
    "red",
    "old",
    "small",
    "heavy",
    "wooden",
    "round",
    "shiny",
    "cheap",
    "broken",
    "painted",
    "soft",
    "tall",
)
# Plain and wordy ways to say the same: a brief description need not be a poor one.
OPENINGS = ("", "", "As far as I can see, ", "It should also be said that ")
SENTENCE = re.compile(
    rf"({'|'.join(filter(None, OPENINGS))})?the ({'|'.join(THINGS)}) is "
    rf"(({'|'.join(TRAITS)})( and ({'|'.join(TRAITS)}))?)\.",
    re.IGNORECASE,
)
OBJECTIVES = {
    "complete": DomainObjective("is every trait said", ("rollout_value", "pairwise")),
    "brief": DomainObjective("is it said in few words", ("rollout_value", "pairwise")),
}
LONGEST = 40  # words of an answer that is not brief at all


@dataclass
class Description(AnswerEpisode):
    """One thing and the traits to describe it by."""

    traits: tuple[str, ...] = ()

    def outcome(self) -> dict[str, float]:
        """The judge: it reads the answer's words and knows nothing of the reward model."""
        words = re.findall(r"[a-z]+", self.answer.lower())
        said = set(self.traits) & set(words)
        return {
            "complete": len(said) / len(self.traits),
            "brief": max(0.0, 1 - len(words) / LONGEST),
        }


class Brevity:
    """What `mahalo run` asks a domain for."""

    boundary = "sentence"  # where a step ends
    speakers: tuple[Speaker, Speaker] = ("assistant", "user")
    objectives = OBJECTIVES

    def episode(self, seed: int) -> Description:
        rng = random.Random(f"brevity/{seed}")
        thing, traits = rng.choice(THINGS), tuple(rng.sample(TRAITS, rng.randint(2, 6)))
        question = f"Describe the {thing}: {', '.join(traits)}."
        return Description(seed, question, topic=thing, max_steps=8, traits=traits)

    def sft_dialogue(self, seed: int) -> Dialogue:
        """Descriptions of all kinds: some lack traits, some have too many words, some are both."""
        episode, rng = self.episode(seed), random.Random(f"answer/{seed}")
        thoroughness, wordiness = rng.random(), rng.random()
        left = [trait for trait in episode.traits if rng.random() < thoroughness] or [episode.traits[0]]
        sentences = []
        while left:
            said, left = left[:2], left[2:]
            opening = rng.choice(OPENINGS[2:]) if rng.random() < wordiness else ""
            sentence = f"{opening}the {episode.topic} is {' and '.join(said)}."
            sentences.append(sentence[0].upper() + sentence[1:])
        return episode.dialogue(" ".join(sentences), "brevity/scripted")

    def is_malformed(self, text: str) -> bool:
        return not re.fullmatch(rf"(\s*{SENTENCE.pattern})+", text, re.IGNORECASE)


DOMAIN = Brevity()
