"""The run's document: defaults, overrides, and errors that name file and key."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mahalo_ray.config import (
    ConfigError,
    Domain,
    LabelConfig,
    PolicyMethod,
    PreferenceLoss,
    RunConfig,
    Section,
    TraceFormat,
    dump_config,
    load_config,
    load_document,
)
from mahalo_ray.config.describe import DOCUMENTS, commented_config, field_sections, kind_of, reference_page
from mahalo_ray.data.step_readers import FORMATS
from mahalo_ray.decoding.stopping import BOUNDARIES
from mahalo_ray.losses import DPOKind
from mahalo_ray.objectives import Weights
from mahalo_ray.training.policy_methods import METHOD_VERSIONS

ALIASES = b"".join(
    b"%c: &%c [%s]\n" % (name + 1, name + 1, b", ".join([b"*%c" % name] * 9)) for name in b"abcdef"
)
MINIMAL = """
name: demo
output: runs/demo
objectives:
  - {name: accuracy, supervision: rollout_value}
  - {name: engagement, supervision: judged_prefix}
model: {scratch: {}}
sweep: {weights: [{accuracy: 0.9, engagement: 0.1}, {accuracy: 0.1, engagement: 0.9}]}
guided: {weights: {accuracy: 1}, guidance: {engagement: 1}}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "demo.yaml"
    path.write_text(MINIMAL)
    return path


def test_minimal_document_loads_with_defaults(file: Path) -> None:
    config = load_config(file)
    assert config.objective_names == ("accuracy", "engagement")
    assert config.policy.training.zero_stage == 3 and config.sft.training.zero_stage == 2
    assert config.sweep.weights[0].label() == "accuracy=0.9,engagement=0.1"


def test_overrides_set_values_sections_and_list_items(file: Path) -> None:
    config = load_config(
        file,
        [
            "policy.training.learning_rate=5e-5",
            "policy.lora.rank=4",
            "sweep.weights.1.accuracy=0.4",
            "sweep.weights.0={accuracy: 1}",
            "objectives.1.supervision=pairwise",
            "cluster.address=ray://head:10001",
            "seed=3",
        ],
    )
    assert config.policy.training.learning_rate == 5e-5
    assert config.policy.lora is not None and config.policy.lora.rank == 4
    assert config.sweep.weights == [Weights.one("accuracy"), Weights({"accuracy": 0.4, "engagement": 0.9})]
    assert config.objectives[1].supervision == "pairwise"
    assert config.cluster.address == "ray://head:10001"
    assert config.seed == 3


def test_a_section_given_in_part_keeps_the_defaults_of_its_place(file: Path) -> None:
    config = load_config(file, ["policy.training.epochs=2", "reward_rollouts.dialogues=10"])
    assert config.policy.training.zero_stage == 3 and config.policy.training.learning_rate == 1e-4
    assert config.reward_rollouts.continuations == 3


def test_the_whole_of_a_list_can_be_replaced(file: Path) -> None:
    config = load_config(
        file, ["sweep.weights=[{accuracy: 1}, {engagement: 1}, {accuracy: 1, engagement: 1}]"]
    )
    assert len(config.sweep.weights) == 3


def test_the_resolved_document_loads_to_the_same_config(file: Path, tmp_path: Path) -> None:
    config = load_config(file, ["policy.lora.rank=4", "sft.training.adam_betas=[0.8, 0.99]"])
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(dump_config(config))
    assert load_config(resolved) == config
    written = yaml.safe_load(resolved.read_text())
    assert set(written) == set(RunConfig.model_fields)  # every default is written out
    assert written["sft"]["training"]["adam_betas"] == [0.8, 0.99]


@pytest.mark.parametrize(
    ("override", "key", "message"),
    [
        ("polcy.beta=1", "polcy", "Did you mean 'policy'?"),
        ("policy.training.learning_rat=1", "policy.training.learning_rat", "Did you mean 'learning_rate'?"),
        ("objectives.0.supervison=pairwise", "objectives.0.supervison", "Did you mean 'supervision'?"),
        ("policy.lora.ranc=4", "policy.lora.ranc", "Did you mean 'rank'?"),
        ("policy.beta=0", "policy.beta", "greater than 0"),
        ("policy.beta=fast", "policy.beta", "got 'fast'"),
        ("policy.loss=hinge", "policy.loss", "'sigmoid', 'ipo' or 'regression'"),
        ("policy.loss=regression", "'pairs.gap_margin' is 0", "1 / beta nats"),
        ("policy.balance=sampled", "'balance: sampled'", "'loss: regression'"),
        (
            "policy={loss: regression, balance: sampled, chosen_anchor: 1}",
            "'chosen_anchor'",
            "at any balance",
        ),
        ("policy.training.zero_stage=4", "policy.training.zero_stage", "0, 1, 2 or 3"),
        ("seed=-1", "seed", "greater than or equal to 0"),
        ("objectives=[]", "objectives", "at least 1 item"),
        ("objectives.0.name=Accuracy", "objectives.0.name", "pattern"),
        ("model.base=gpt2", "model", "exactly one of 'base'"),
        ("guided.weights.accuracyy=1", "guided.weights", "Did you mean 'accuracy'?"),
        ("policy.alpha.speed=1", "policy.alpha", "unknown objective 'speed'"),
        ("sweep.weights.1.speed=1", "sweep.weights[1]", "unknown objective 'speed'"),
        ("objectives.1.name=accuracy", "objectives", "names an objective twice"),
        ("policy.beta={accuracy: 0.1}", "policy.beta", "no value for engagement"),
        ("policy.beta={acuracy: 0.1}", "policy.beta", "Did you mean 'accuracy'"),
        ("policy.beta={accuracy: 0}", "policy.beta.by_objective.accuracy", "greater than 0"),
        ("evaluation.sampling.top_p=0", "evaluation.sampling.top_p", "greater than or equal to 0.000001"),
        ("evaluation.sampling.temperature=1.0e-39", "evaluation.sampling.temperature", "take 0 (greedy)"),
        ("evaluation.sampling.temperature=.inf", "evaluation.sampling.temperature", "finite number"),
        ("policy.beta=much", "policy.beta.number", "valid number"),
        ("policy.gradient_cosine=true", "policy", "set them above 0"),
        ("policy.metrics_rows=8", "policy", "set them above 0"),
        ("policy.head_rank=8", "policy", "'head_rank' is that of 'head_kind: low_rank'"),
        ("policy={metrics_every_steps: 5, gradient_cosine: true}", "policy", "zero_stage: 3"),
        ("policy.method=dpo", "policy", "'method: dpo' needs 'objective'"),
        ("policy.objective=accuracy", "policy", "'objective' is not used by 'method: mah_dpo'"),
        ("policy={method: dpo, objective: speed}", "policy.objective", "unknown objective 'speed'"),
        ("policy={method: scalarised}", "policy", "needs 'mixture'"),
        ("policy={method: scalarised, mixture: {accuracy: 0}}", "policy", "all weights are 0"),
        ("policy={method: scalarised, mixture: {accuracy: 1}, alpha: {accuracy: 2}}", "policy", "'alpha' is"),
        ("policy={method: scalarised, mixture: {speed: 1}}", "policy.mixture", "unknown objective 'speed'"),
        ("policy={method: modpo, objective: accuracy, mixture: {engagement: 1}}", "policy", "give it one"),
        ("policy={method: modpo, objective: a, mixture: {a: 1}, loss: ipo}", "policy", "sigmoid' only"),
        (
            "policy={method: dpo, objective: accuracy, beta: {accuracy: 0.1, engagement: 0.1}}",
            "policy.beta",
            "trains no pairs of engagement",
        ),
        ("reward.backbone=lora", "reward", "'lora' settings go with 'backbone: lora'"),
        ("reward.inputs=[]", "reward", "'inputs' is empty"),
        ("sft.training.offload_parameters=true", "sft.training", "needs 'zero_stage: 3'"),
    ],
)
def test_errors_name_file_and_key(file: Path, override: str, key: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(file, [override])
    text = str(caught.value)
    assert str(file) in text and key in text and message in text


def test_metrics_need_held_out_pairs_and_two_objectives(file: Path) -> None:
    measured = ["policy.metrics_every_steps=5", "policy.training.zero_stage=2", "policy.gradient_cosine=true"]
    assert load_config(file, measured).policy.metrics_rows == 64
    with pytest.raises(ConfigError, match=r"'pairs.held_out_fraction' above 0"):
        load_config(file, [*measured, "pairs.held_out_fraction=0"])
    one = "objectives=[{name: accuracy, supervision: rollout_value}]"
    only = ["sweep.weights=[{accuracy: 1}]", "guided={weights: {accuracy: 1}, guidance: {accuracy: 1}}"]
    with pytest.raises(ConfigError, match="compares objectives, and there is only one"):
        load_config(file, [*measured, one, *only])


def test_every_wrong_key_is_named_at_once(file: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(file, ["seeed=1", "policy.beta=-1", "cluster.train_workers=0"])
    text = str(caught.value)
    assert "seeed" in text and "policy.beta" in text and "cluster.train_workers" in text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("policy.beta", "write --set section.key=value"),
        ("=3", "write --set section.key=value"),
        ("policy..beta=3", "write --set section.key=value"),
        ("name.first=x", "'name' is a value, not a section"),
        ("sweep.weights.5.accuracy=1", "not an index below 2"),
        ("sweep.weights.first={}", "not an index below 2"),
    ],
)
def test_overrides_that_cannot_be_read_are_named(file: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(file, [override])
    assert override in str(caught.value) and message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "not valid YAML"),
        ("- 1\n- 2\n", "must hold a mapping of sections, not a list"),
        ("", "must hold a mapping of sections, not nothing: it is empty"),
    ],
)
def test_files_that_are_no_document(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(path) in str(caught.value) and message in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config file at '.*nowhere\.yaml'"):
        load_config(tmp_path / "nowhere.yaml")


def test_sections_cannot_be_changed_afterwards(file: Path) -> None:
    config = load_config(file)
    with pytest.raises(ValueError, match="frozen"):
        config.policy.beta = 1.0  # type: ignore[misc]


def test_the_words_of_the_configuration_are_those_of_the_code_that_may_not_import_them() -> None:
    assert get_args(PreferenceLoss) == get_args(DPOKind)  # the losses know torch alone
    assert set(get_args(TraceFormat)) == {"auto", *FORMATS}
    assert set(get_args(PolicyMethod)) == set(METHOD_VERSIONS)
    assert set(get_args(Domain)) == set(BOUNDARIES)


def sections_of(section: type[Section]) -> set[type[Section]]:
    """This section and all that may stand in it."""
    found = {section}
    for info in section.model_fields.values():
        for inner in field_sections(info):
            found |= sections_of(inner)
    return found


ALL_SECTIONS = sorted(
    set().union(*(sections_of(kind.schema) for kind in DOCUMENTS.values())),
    key=lambda section: section.__name__,
)


@pytest.mark.parametrize("section", ALL_SECTIONS)
def test_every_field_is_described(section: type[Section]) -> None:
    assert section.__doc__
    for name, info in section.model_fields.items():
        assert info.description and info.description.endswith("."), (
            f"{section.__name__}.{name}: {info.description}"
        )


@pytest.mark.parametrize("section", ALL_SECTIONS)
def test_the_range_of_every_number_is_stated(section: type[Section]) -> None:
    for name, schema in section.model_json_schema()["properties"].items():
        for member in (schema, *schema.get("anyOf", ())):
            if member.get("type") in ("integer", "number"):
                stated = {"minimum", "exclusiveMinimum", "enum"} & set(member)
                assert stated or (section.__name__, name) in WITHOUT_RANGE, f"{section.__name__}.{name}"


# A judge's scores, and so its threshold, may be any number.
WITHOUT_RANGE = {
    (judge, "threshold") for judge in ("EndpointJudgeConfig", "ModelJudgeConfig", "ProgramJudgeConfig")
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_printed_configuration_loads_and_says_nothing_but_defaults(name: str, tmp_path: Path) -> None:
    kind, path = DOCUMENTS[name], tmp_path / "printed.yaml"
    path.write_text(commented_config(name), encoding="utf-8")
    assert load_document(path, kind.schema) == kind.schema.model_validate(kind.start)
    assert kind_of(yaml.safe_load(path.read_text())) == name
    keys = set(re.findall(r"^[# ]*(?:- )?(\w+):", path.read_text(), re.MULTILINE))
    for section in () if kind.schema is RunConfig else sections_of(kind.schema):
        assert set(section.model_fields) <= keys


def test_the_printed_runs_have_every_key_together() -> None:
    text = commented_config("run") + commented_config("dataset")
    keys = set(re.findall(r"^[# ]*(?:- )?(\w+):", text, re.MULTILINE))
    for section in sections_of(RunConfig):
        assert set(section.model_fields) <= keys, section


def test_the_reference_page_is_current() -> None:
    page = Path(__file__).parents[1] / "docs" / "configuration-reference.md"
    assert page.read_text(encoding="utf-8") == reference_page(), "write it anew: make reference"


@pytest.mark.parametrize("example", sorted((Path(__file__).parents[1] / "examples").glob("*.yaml")), ids=str)
def test_the_examples_load(example: Path) -> None:
    document = yaml.safe_load(example.read_text(encoding="utf-8"))
    load_document(example, DOCUMENTS[kind_of(document)].schema)


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        (b"name: a\nseed: 1\nname: b\n", 3, "the key 'name' is given twice, first in line 1"),
        (b"policy: {beta: 1, beta: 2}\n", 1, "the key 'beta' is given twice"),
        (b"name: a\npolicy:\n\tbeta: 1\n", 3, "never with tabs"),
        (b"name: 'a\n", 2, "not valid YAML"),
        (b"name: a\nyes: 1\n", 2, "the key yes is not a text"),
        (b"name: a\n? [1, 2]\n: 3\n", 2, "a list or mapping"),
        (b"name: 2024-01-31\n", 1, "'timestamp'"),
        (b"name: !!python/object/apply:os.system [ls]\n", 1, "python/object"),
        (b"name: a\nseed: " + b"9" * 5000 + b"\n", 2, "cannot read the value"),
        (b"seed: 9999999999999999999999\n", 1, "64 bits"),
        (b"seed: 010\n", 1, "YAML reads 010 as 8"),
        (b"seed: 1:30\n", 1, "YAML reads 1:30 as 90"),
        (b'name: "\\ud800"\n', 1, "half of a character"),
        (b"a: &a [*a]\n", 1, "part of"),
        (b"a: &a [1, 2, 3, 4, 5, 6, 7, 8, 9]\n" + ALIASES, 6, "more than 100000 values"),
        (b"a: " + b"[" * 5000, 1, "more than 50 levels"),
        (b"name: a\nseed: \xff\n", 2, "not UTF-8 text (byte 0xff)"),
    ],
)
def test_broken_files_are_told_by_line(tmp_path: Path, content: bytes, line: int, message: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    text = str(caught.value)
    assert text.startswith(str(path)) and f"line {line}" in text and message in text


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_other_encodings_are_named(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "other.yaml"
    path.write_text(MINIMAL, encoding=encoding)
    with pytest.raises(ConfigError, match=f"is {encoding.upper()} text: save it as UTF-8"):
        load_config(path)


def test_a_byte_order_mark_and_windows_line_ends_are_read_over(file: Path) -> None:
    plain = load_config(file)
    file.write_bytes(b"\xef\xbb\xbf" + MINIMAL.replace("\n", "\r\n").encode())
    assert load_config(file) == plain


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=.inf", "finite number (got inf)"),
        ("policy.beta=.nan", "finite number (got nan)"),
        ("policy.training.learning_rate=1e999", "finite number"),
        ("evaluation.confidence=.nan", "finite number"),
        ("evaluation.sampling.temperature=1e-39", "too small to divide by"),
        ("seed=true", "not true or false"),
        ("output=''", "at least 1 character"),
        ("output='  '", "the text is empty"),
        ("model={base: ''}", "at least 1 character"),
        ("serve.api_key_env=sk-secret", "should match pattern"),
        ("guided.weights={accuracy: -1}", "greater than or equal to 0"),
        ("guided.weights=accuracy", "write objective=number"),
    ],
)
def test_values_out_of_range_are_refused(file: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(file, [override])
    text = str(caught.value)
    assert message in text and f"(--set {override})" in text
    assert "got 'sk-secret'" not in text  # somebody may have written the key itself


def test_numbers_written_as_text_and_weights_written_as_on_the_command_line(file: Path) -> None:
    config = load_config(file, ["seed='7'", "guided.weights=accuracy=3,engagement=1"])
    assert config.seed == 7 and config.guided.point[0] == Weights({"accuracy": 3, "engagement": 1})
    given = yaml.safe_load(dump_config(config))["guided"]["weights"]
    assert given == {"accuracy": 0.75, "engagement": 0.25}


def test_errors_say_the_line_of_the_key(tmp_path: Path) -> None:
    path = tmp_path / "demo.yaml"
    path.write_text(MINIMAL + "policy:\n  training:\n    batch_sise: 3\n  beta: -1\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["guided.weights.speed=1"])
    lines = str(caught.value).splitlines()
    assert "  policy.training.batch_sise (line 12): unknown key" in "\n".join(lines)
    assert any(line.startswith("  policy.beta.number (line 13):") for line in lines)


def test_an_anchor_used_twice_is_overridden_once(file: Path) -> None:
    shared = "reward_rollouts: &rollouts {dialogues: 5, continuations: 1}\npair_rollouts: *rollouts\n"
    file.write_text(MINIMAL + shared)
    config = load_config(file, ["pair_rollouts.dialogues=9"])
    assert (config.reward_rollouts.dialogues, config.pair_rollouts.dialogues) == (5, 9)


def test_what_cannot_be_opened_is_named(tmp_path: Path) -> None:
    for path, message in (
        (tmp_path, "is a folder"),
        (tmp_path / ("x" * 300), "File name too long"),
        (tmp_path / "a\0b", "cannot read"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(path)


@pytest.mark.parametrize("scale", [[1, 1], [2, 1], [0, ".inf"]])
def test_ranges_of_labels_ascend(scale: list[float], tmp_path: Path) -> None:
    path = tmp_path / "label.yaml"
    path.write_text(commented_config("label"))
    calibration = f"calibration={{objective: accuracy, ratings: r.jsonl, label_range: {scale}}}".replace(
        "'", ""
    )
    with pytest.raises(ConfigError, match=r"calibration\.label_range"):
        load_document(path, LabelConfig, [calibration])


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
PATHS = [
    f"{section}.{name}" if section else name
    for section, schema in (
        ("", RunConfig),
        *((name, info.annotation) for name, info in RunConfig.model_fields.items()),
    )
    if isinstance(schema, type) and issubclass(schema, Section)
    for name in schema.model_fields
]


def load_or_refuse(path: Path, overrides: list[str] | None = None) -> None:
    try:
        config = load_config(path, overrides)
    except ConfigError as error:
        str(error).encode("utf-8")
    else:
        path.write_text(dump_config(config), encoding="utf-8")
        assert load_config(path) == config


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.binary(max_size=60)
    | st.text(alphabet="ab:-[]{}&*!|>%@`'\"\n\t ,?#<=0.~", max_size=60).map(str.encode)
)
def test_no_text_raises_anything_else(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "any.yaml"
    path.write_bytes(content)
    load_or_refuse(path)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.sampled_from(PATHS), value=VALUES)
def test_no_value_of_any_key_raises_anything_else(tmp_path: Path, key: str, value: Any) -> None:
    path = tmp_path / "demo.yaml"
    path.write_text(MINIMAL)
    load_or_refuse(path, [f"{key}={yaml.safe_dump(value, default_flow_style=True)}"])
