"""What a whole tiny run leaves: stages to skip, a comparison, and the same in an object store, killed and
resumed.

All tests of the one finished run stand in this file, so that one process of the suite makes it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import EXAMPLE, TINY, command, mahalo
from transformers import AutoTokenizer

from mahalo_ray.cli.common import open_session
from mahalo_ray.config import load_config
from mahalo_ray.data import storage
from mahalo_ray.data.records import CandidateSet, Dialogue, PreferencePair
from mahalo_ray.models import MultiHeadCausalLM
from mahalo_ray.pipeline.portfolio_checks import check_portfolio
from mahalo_ray.pipeline.portfolios import PortfolioDemand, candidates_of
from mahalo_ray.pipeline.run import pipeline, sweep_pipeline
from mahalo_ray.pipeline.stages import Manifest
from mahalo_ray.sweeps.front_report import fronts_of_run
from mahalo_ray.sweeps.sweep_table import TRAINING_SWEEP, SweepPoint, SweepTable

pytestmark = pytest.mark.slow


def test_a_whole_run_and_then_nothing_left_to_do(whole_run: Path) -> None:
    for name in pipeline(load_config(EXAMPLE)).stages:
        manifest = Manifest.read(str(whole_run / name))
        assert manifest is not None and manifest.seconds > 0
        assert all((whole_run / name / path).exists() for path in manifest.outputs.values())
    document = json.loads((whole_run / "report" / "results.json").read_text())
    assert len(document["rows"]) == 7 and document["dialogues_per_method"] == 4
    assert set(document["history"]) == {"sft", "reward", "policy"}
    assert document["reward_metrics"]["accuracy"]
    answers = json.loads((whole_run / "serve" / "answers.json").read_text())
    assert len(answers["answers"]) == 3
    again = mahalo("run", str(EXAMPLE), output=whole_run)
    assert again.count("done before, skipped") == len(pipeline(load_config(EXAMPLE)).stages)
    assert "guided policy" in again and "Report: " in again and "mahalo serve" in again


def test_a_finished_run_is_compared_and_then_nothing_is_left_to_do(whole_run: Path, tmp_path: Path) -> None:
    half = "weights: [{accuracy: 1, engagement: 1}]"
    baselines = f"[{{method: dpo}}, {{method: modpo, {half}}}, {{method: soup, {half}}}]"
    arguments = ("compare", str(EXAMPLE), "--set", f"compare.baselines={baselines}", "--set")
    arguments += ("compare.guided=true",)
    text = mahalo(*arguments, output=whole_run)
    assert text.count("done before, skipped") == 9  # the run's own stages but serve and report
    assert "DPO soup" in text and "MAH-DPO covers more than MODPO" in text
    document = json.loads((whole_run / "compare" / "report" / "results.json").read_text())
    rows = {row["name"]: row for row in document["rows"]}
    assert set(rows) >= {"DPO accuracy", "DPO engagement", "MODPO 0.5 / 0.5", "soup 0.5 / 0.5"}
    divergences = [rows[name]["kl_to_reference"] for name in rows if name != "SFT"]
    assert min(divergences) > 0 and len(set(divergences)) == len(divergences)
    students = {tuple(method["student_ids"]) for method in document["methods"]}
    assert len(students) == 1
    costs = {family["family"]: family["cost"] for family in document["families"]}
    assert [costs[name]["training_runs"] for name in ("mah_dpo", "dpo", "modpo", "soup")] == [1, 2, 1, 2]
    assert [costs[name]["models"] for name in ("mah_dpo", "dpo", "modpo", "soup")] == [1, 2, 1, 1]
    sizes = [costs[name]["parameter_bytes"] for name in ("soup", "mah_dpo", "dpo")]
    assert sizes[0] < sizes[1] < sizes[2]  # one head, two heads, two models
    by_guide = {row["policy"]: row["cells"] for row in document_of(whole_run / "compare/report/guided.json")}
    assert [list(cells) for cells in by_guide.values()] == 8 * [["unguided", "accuracy", "engagement", "sum"]]
    assert by_guide["SFT"]["sum"]["method"] == "guided SFT"
    assert by_guide["SFT"]["unguided"]["relative"]["engagement"]["value"] == 0
    played = document_of(whole_run / "compare/guided/methods.json")
    assert len(played) == 8 * 3 - 2 and all(one["result"]["num_candidates"] == 2 for one in played)
    again = mahalo(*arguments, output=whole_run)
    assert again.count("done before, skipped") == 9 + 3 + 4
    assert again.splitlines()[-1] == text.splitlines()[-1]
    shutil.copytree(whole_run, tmp_path / "seed_17", ignore=shutil.ignore_patterns("checkpoints", "tune"))
    said = mahalo(*arguments, "--set", "seeds=[17]", output=tmp_path)
    assert said.count("done before, skipped") == 2 + 9 + 3 + 4  # with serve and the run's report
    assert document_of(tmp_path / "all_seeds/results.json")["rows"] == document["rows"]
    assert (tmp_path / "all_seeds/guided.md").read_text().count("SFT") > 1


def test_two_rounds_killed_in_between_equal_two_unbroken_rounds(whole_run: Path, tmp_path: Path) -> None:
    """Both go on from the finished run of one round. One is killed without warning while the second policy is
    about to be trained."""
    folders = [tmp_path / name for name in ("unbroken", "killed")]
    for folder in folders:
        for stage in ("sft_data", "sft", "reward_rollouts", "reward", "pair_rollouts", "pairs", "policy"):
            shutil.copytree(whole_run / stage, folder / stage)
    arguments = ("policy", str(EXAMPLE), "--set", "rounds=2")
    said = mahalo(*arguments, output=folders[0])
    assert said.count("done before, skipped") == 7
    kill_when(folders[1] / "round_2" / "pairs" / "manifest.json", arguments, folders[1])
    assert mahalo(*arguments, output=folders[1]).count("done before, skipped") == 9
    for kind, part in ((CandidateSet, "pair_rollouts/candidates"), (PreferencePair, "pairs/pairs")):
        one, two = (kind.load(str(folder / "round_2" / part)) for folder in folders)
        assert one == two
    first, both = (
        PreferencePair.load(str(folders[0] / part)) for part in ("pairs/pairs", "round_2/pairs/pairs")
    )
    assert both[: len(first)] == first and len(both) > len(first)
    weights = [load_file(folder / "round_2/policy/model/heads.safetensors") for folder in folders]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def document_of(file: Path) -> Any:
    return json.loads(file.read_text())


def kill_when(file: Path | str, arguments: tuple[str, ...], output: Path | str) -> None:
    """Start the command and kill it, with all that it started, as soon as the file is there."""
    program = [sys.executable, "-c", "from mahalo_ray.cli import main; main()", *arguments]
    overrides = [part for setting in [*TINY, f"output={output}"] for part in ("--set", setting)]
    with subprocess.Popen(
        [*program, *overrides],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    ) as killed:
        try:
            while not storage.exists(str(file)):
                assert killed.poll() is None, "the run ended by itself"
                time.sleep(0.05)
        finally:
            os.killpg(killed.pid, signal.SIGKILL)


def test_a_sweep_killed_in_the_middle_ends_in_the_same_table(whole_run: Path, tmp_path: Path) -> None:
    table = SweepTable.of_run(str(whole_run))
    sampled = [point.method for point in table.points if point.last_round]
    results = json.loads((whole_run / "report" / "results.json").read_text())
    assert [row["name"] for row in results["even_front"]["rows"]] == sampled
    assert "The front, evenly spaced" in (whole_run / "report" / "report.html").read_text()
    assert [point.round for point in table.points[:2]] == [0, 0] and len(sampled) > 2
    halved = tmp_path / "halved"
    shutil.copytree(whole_run, halved, ignore=shutil.ignore_patterns("checkpoints", "tune"))
    files = sorted((halved / "sweep").glob("method-*.json"), key=lambda file: file.stat().st_mtime)
    assert len(files) == len(table.points)
    for left in ("manifest.json", "methods.json", "points.json", "front.parquet"):
        (halved / "sweep" / left).unlink()
    for unplayed in files[3:]:
        unplayed.unlink()
    said = mahalo("sweep", str(EXAMPLE), output=halved)
    assert "continues an interrupted attempt" in said and "surf 1 / 0" in said
    assert all(
        file.stat().st_mtime == (whole_run / "sweep" / file.name).stat().st_mtime for file in files[:3]
    )
    again = SweepTable.of_run(str(halved))
    untimed = [[p.model_copy(update={"seconds": 0.0}) for p in t.points] for t in (table, again)]
    assert untimed[0] == untimed[1]


def test_fronts_of_runs_are_one_page_that_asks_no_host(whole_run: Path, tmp_path: Path) -> None:
    chosen = ["--weights", "engagement=1", "--at-least", "accuracy=0.001"]
    printed = command(["front", str(whole_run), "--output", str(tmp_path), *chosen])
    said = " ".join(printed.split())  # lines are wrapped at the terminal's width
    assert "surf weights" in said and "Reference point: accuracy 0, engagement 0." in said
    document = json.loads((tmp_path / "front.json").read_text())
    series = {front["name"]: front for front in document["series"]}
    assert len(series["fixed weights"]["points"]) == 2 and len(series["surf weights"]["points"]) > 2
    point = series["surf weights"]["points"][0]
    assert point["samples"][0]["turns"] and 0 <= point["probability_non_dominated"] <= 1
    means = {p["method"]: p["mean"] for front in document["series"] for p in front["points"]}
    right = [mean for mean in means.values() if mean["accuracy"] >= 0.001] or means.values()
    best = max(mean["engagement"] for mean in right)
    assert f"engagement {best:.3f}" in said.split("Chosen: ")[1]
    page = (tmp_path / "front.html").read_text()
    assert "http://www.w3.org/2000/svg" in page and len(re.findall("https?://", page)) == 1
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")


def test_trained_policies_stand_beside_the_sweep_and_a_portfolio_of_both_is_checked(
    whole_run: Path, tmp_path: Path
) -> None:
    """All in one Ray: a policy trained for one objective alone, from the run's own policy; both fronts; a
    portfolio, played on problems that it has not met; and a policy to which a run adds an objective."""
    run = str(tmp_path / "run")
    shutil.copytree(whole_run, run, ignore=shutil.ignore_patterns("checkpoints", "tune"))
    trains = ["sweep={kind: training, weights: [{accuracy: 1}]}"]
    config = load_config(EXAMPLE, [*TINY, f"output={run}", *trains])
    with open_session(config):
        sweep_pipeline(config).run(config, (TRAINING_SWEEP,), session=nullcontext)
        (point,) = SweepTable.of_run(run, TRAINING_SWEEP).points
        assert point.started_from == "policy" and point.mean is not None and point.training_seconds
        assert point.training_steps and point.steps_from_sft and point.model
        assert point.steps_from_sft > point.training_steps
        chosen = candidates_of(run, "both").choose(PortfolioDemand(size=2), resamples=20)
        members = replace(chosen, members=tuple(range(len(chosen.values))))  # whatever answers, it is played
        check = check_portfolio(run, members, 2, 2, 17, lambda config: nullcontext(), lambda *news: None)
        check_one_more_head(whole_run, tmp_path / "more")
    folders = ("policy/model", _model_of(point))
    own, trained = (load_file(f"{run}/{folder}/heads.safetensors") for folder in folders)
    assert (own["heads.accuracy.weight"] != trained["heads.accuracy.weight"]).any()
    assert (own["heads.engagement.weight"] == trained["heads.engagement.weight"]).all()  # it had no pairs
    assert SweepTable.of_run(run).points and (tmp_path / "run" / "report" / "report.html").exists()
    fronts = [front.name for front in fronts_of_run(run, named=False)]
    assert "fixed training weights" in fronts and "surf weights" in fronts
    assert "the policies that the sweep trained" in chosen.best
    assert [policy["model"] for policy in chosen.policies if "model" in policy] == [_model_of(point)]
    assert check.problems == 2 and len(check.balances) == 2
    assert all(one.low <= one.loss <= one.high for one in check.certified)
    assert json.loads((tmp_path / "run" / "portfolio_check.json").read_text())["problems"] == 2


def check_one_more_head(whole_run: Path, folder: Path) -> None:
    """`policy.extends` in a run that plays: pairs of the new objective alone, and a head trained on them."""
    for stage in ("sft_data", "sft", "reward_rollouts", "reward", "pair_rollouts"):
        shutil.copytree(whole_run / stage, folder / "run" / stage)
    sft = str(whole_run / "sft" / "model")
    extended = MultiHeadCausalLM.from_base(sft, ["engagement"], noise=0.3, keep_base_head=True)
    extended.save_pretrained(folder / "engaging", AutoTokenizer.from_pretrained(sft))
    overrides = [f"output={folder / 'run'}", f"policy.extends={folder / 'engaging'}"]
    config = load_config(EXAMPLE, [*TINY, *overrides])
    done = pipeline(config).run(config, ("policy",), session=nullcontext)
    assert done["sft"].seconds == Manifest.read(str(whole_run / "sft")).seconds  # of the copy
    pairs = PreferencePair.load(str(folder / "run" / "pairs" / "pairs"))
    assert {pair.objective for pair in pairs} == {"accuracy"}
    policy = MultiHeadCausalLM.from_pretrained(folder / "run" / "policy" / "model")
    assert set(policy.objectives) == {"accuracy", "engagement"}
    state = policy.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in extended.state_dict().items())
    start = MultiHeadCausalLM.from_base(sft, ["accuracy"], seed=config.seed).head("accuracy").weight
    assert not torch.equal(policy.head("accuracy").weight, start)


def _model_of(point: SweepPoint) -> str:
    """The folder of a trained policy, as a path in its run."""
    return f"{TRAINING_SWEEP}/{point.model}"


def test_a_run_in_a_store_equals_the_one_on_disk(whole_run: Path, s3: str) -> None:
    """Killed without warning while it plays dialogues; the next run takes its lease over and goes on."""
    output = f"{s3}/runs/tiny"
    kill_when(f"{output}/sft/manifest.json", ("run", str(EXAMPLE)), output)
    finished = storage.fingerprint(f"{output}/sft/manifest.json")
    said = mahalo("run", str(EXAMPLE), output=output)
    assert "done before, skipped" in said
    assert storage.fingerprint(f"{output}/sft/manifest.json") == finished
    on_disk = str(whole_run)
    results = [storage.read_json(f"{folder}/report/results.json") for folder in (output, on_disk)]
    assert without_times(results[0]) == without_times(results[1])
    assert results[0]["rows"] and results[0]["methods"]
    for kind, part in ((PreferencePair, "pairs/pairs"), (Dialogue, "reward_rollouts/dialogues")):
        assert kind.load(f"{output}/{part}") == kind.load(f"{on_disk}/{part}")


def without_times(results: Any) -> Any:
    """All of it but what measures time."""
    if isinstance(results, dict):
        timed = ("timings_s", "tokens_per_second", "pairs_per_second", "seconds")
        return {name: without_times(value) for name, value in results.items() if name not in timed}
    return [without_times(value) for value in results] if isinstance(results, list) else results
