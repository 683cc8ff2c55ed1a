"""Judges of steps: endpoints asked by a rubric, local reward models, programs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from local_endpoint import GARBAGE, LocalEndpoint, Received, Scripted, says
from tiny_reward_models import TOKENIZER, base

from mahalo_ray.config import EndpointJudgeConfig, ModelJudgeConfig
from mahalo_ray.data.records import Message
from mahalo_ray.decoding.policy import DeviceConfig
from mahalo_ray.domains.verdicts import EndpointJudge, Judged, ProgramJudge, Unjudged, rubric_template
from mahalo_ray.models import ProcessRewardModel
from mahalo_ray.rollouts.judges import ModelJudge
from mahalo_ray.rollouts.pool import share_limits

sys.path.insert(0, str(Path(__file__).parent / "programs"))

ITEM = Judged((Message(role="user", content="2+3?"),), ("Two.", "So 5"), "5", "Two.\n\nSo 5")


def endpoint_judge(
    server: LocalEndpoint, rubric: str = "Judge: {{ response }}", **settings: Any
) -> EndpointJudge:
    config = EndpointJudgeConfig(
        endpoint=server.config(max_retries=0), rubric="unused here", scale=(0, 10), **settings
    )
    return EndpointJudge(config, rubric, share_limits(config.endpoint, 2), seed=0)


def test_an_endpoint_is_asked_by_the_rubric_and_its_score_is_read() -> None:
    rubric = "{{ conversation }}|{{ steps | length }}|{{ step }}|{{ answer }}|{{ messages[0].role }}"
    with LocalEndpoint([says("Score: 3? No.\nscore = 7.5")]) as server:
        judge = endpoint_judge(server, rubric)
        assert judge.score([ITEM]) == [0.75]
        judge.close()
    assert server.received[0].content == "User: 2+3?|2|So 5|5|user"


def test_replies_without_a_score_are_asked_for_again_then_given_up() -> None:
    def script(received: Received) -> Scripted:
        if received.content == "Judge: broken":
            return GARBAGE
        late = len(server.received) > 3 and received.content == "Judge: late"
        return says("Score: 10") if late else says("hm")

    items = [Judged(ITEM.prompt, (text,), None, text) for text in ("late", "never", "broken")]
    with LocalEndpoint(script) as server:
        judge = endpoint_judge(server, parse_retries=2)
        late, never, broken = judge.score(items)
        counts = judge.counts()
        judge.close()
    assert late == 1.0
    assert isinstance(never, Unjudged) and never.reason == "no score to read in the judge's reply: 'hm'"
    assert isinstance(broken, Unjudged) and broken.reason.startswith("garbage after 1 tries")
    assert counts["failures"] == {"garbage": 1} and counts["unparsed"] == {"retried": 3, "given_up": 1}
    asked = [(one.content, one.body["seed"]) for one in server.received if "never" in one.content]
    assert len(asked) == 3 and len({seed for _, seed in asked}) == 3  # the same reply would come again


@pytest.mark.parametrize("reply", ["Score: 11", "Score: -1", "5", ""])
def test_scores_outside_the_scale_are_no_scores(reply: str) -> None:
    with LocalEndpoint([says(reply)]) as server:
        judge = endpoint_judge(server, parse_retries=0)
        assert isinstance(judge.score([ITEM])[0], Unjudged)
        judge.close()


@pytest.mark.parametrize(
    ("rubric", "message"),
    [
        ("{{ response", "the rubric is no template: line 1"),
        ("{{ reponse }}", "unknown variable 'reponse'. Did you mean 'response'"),
        ("Is {{ conversation }} good?", "nothing to judge"),
    ],
)
def test_a_rubric_is_checked_before_anything_starts(rubric: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rubric_template(rubric)


def test_a_local_reward_model_reads_all_prefixes_of_a_response_at_once(tmp_path: Path) -> None:
    kinds = {"accuracy": "value", "kind": "probability"}
    model = ProcessRewardModel.from_base(base(), kinds, inputs=["last"], tokenizer=TOKENIZER).eval()
    model.save_pretrained(tmp_path)
    judge = ModelJudge(ModelJudgeConfig(path=str(tmp_path), objective="kind"), DeviceConfig())
    items = [Judged(ITEM.prompt, ITEM.steps[:n], None, "") for n in (1, 2)]
    too_long = Judged(ITEM.prompt, ("x" * 400,), None, "")
    first, second, none = judge.score([*items, too_long])
    assert [first, second] == pytest.approx(model.score(ITEM.prompt, ITEM.steps)["kind"], abs=1e-5)
    assert isinstance(none, Unjudged) and "the model reads 160" in none.reason
    with pytest.raises(ValueError, match="scores accuracy, kind: say which one"):
        ModelJudge(ModelJudgeConfig(path=str(tmp_path)), DeviceConfig())


def test_an_unknown_program_is_said() -> None:
    for name in ("label_judges:nobody", "no_such_module:f"):
        with pytest.raises(ValueError, match=f"there is no function '{name}'"):
            ProgramJudge(name)
