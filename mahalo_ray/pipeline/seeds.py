"""A run once for each of several seeds, and the report over all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console

from mahalo_ray.config import RunConfig
from mahalo_ray.data import storage
from mahalo_ray.evaluation.claims import Claim, check_claims, comparison_claims
from mahalo_ray.evaluation.guided_table import GuidedRow, guided_rows, pooled, print_guided_rows
from mahalo_ray.evaluation.report import (
    ReportContents,
    print_claims,
    print_families,
    print_table,
    write_report,
)
from mahalo_ray.evaluation.results import ComparisonTable, FamilyFront, MethodResult, family_fronts
from mahalo_ray.pipeline import compare, run
from mahalo_ray.pipeline.compare import Upstream, comparison_pipeline
from mahalo_ray.pipeline.evaluating import measurement, samples, wide_enough
from mahalo_ray.pipeline.outputs import check_output, sign_output
from mahalo_ray.pipeline.progress import RunProgress
from mahalo_ray.pipeline.stages import Manifest, Pipeline
from mahalo_ray.pipeline.sweeping import comparison_table

REPORT = "all_seeds"
INTERVALS = "students of all seeds are resampled, trainings are not: see the figures by seed"

Execute = Callable[[Pipeline[RunConfig], RunConfig, tuple[str, ...] | None], dict[str, Manifest]]


def run_pipeline(config: RunConfig, compared: bool) -> Pipeline[RunConfig]:
    """The stages of one seed; `compared`: with the baselines."""
    return comparison_pipeline(config) if compared else run.pipeline(config)


def configs_by_seed(config: RunConfig) -> list[RunConfig]:
    """The same run for each of its seeds, each with an output of its own."""
    return [
        config.model_copy(
            update={"seed": seed, "seeds": [], "output": storage.join(config.output, f"seed_{seed}")}
        )
        for seed in config.seeds
    ]


def run_all_seeds(console: Console, config: RunConfig, compared: bool, execute: Execute) -> None:
    """Run every seed that is not finished, one after the other, then write and print the report over all.

    ConfigError if the folder of the report holds what mahalo did not make.
    """
    folder = storage.join(config.output, REPORT)
    check_output(folder)
    configs, upstreams = configs_by_seed(config), []
    for number, of_seed in enumerate(configs, start=1):
        console.print(f"Seed {of_seed.seed} ({number} of {len(configs)})")
        manifests = execute(run_pipeline(of_seed, compared), of_seed, None)
        output = storage.absolute(of_seed.output)
        upstreams.append({name: (storage.join(output, name), m) for name, m in manifests.items()})
    report = _SeedsReport(config, configs, upstreams, compared)
    sign_output(folder)
    report.write(folder, RunProgress(console))
    report.print(wide_enough(console), storage.join(folder, "report.html"))


class _SeedsReport:
    """What all seeds together show."""

    def __init__(
        self,
        config: RunConfig,
        configs: Sequence[RunConfig],
        upstreams: Sequence[Upstream],
        compared: bool,
    ) -> None:
        stages = compare.PLAYED if compared else ("evaluate", "sweep")
        self.config, self.configs = config, configs
        self.documents = [compare.played_documents(upstream, stages) for upstream in upstreams]
        self.table = self._pooled_table(self.documents)
        self.fronts: list[FamilyFront] = []
        self.guided: list[GuidedRow] = []
        if compared:
            self.fronts = family_fronts(self.table, compare.family_costs(configs[0], upstreams[0]))
            if config.compare.guided:
                stages = (*stages, compare.PLAY_GUIDED)
                self.guided = self._guided_rows(
                    [compare.played_documents(upstream, stages) for upstream in upstreams]
                )
        self.claims: list[Claim] = (
            comparison_claims(self.table, self.fronts) if compared else check_claims(self.table)
        )

    def _tables(self, documents: Sequence[Sequence[dict[str, Any]]]) -> list[ComparisonTable]:
        pairs = zip(self.configs, documents, strict=True)
        return [comparison_table(config, _results(of_seed)) for config, of_seed in pairs]

    def _pooled_table(self, documents: Sequence[Sequence[dict[str, Any]]]) -> ComparisonTable:
        return comparison_table(self.config, pooled([_results(of_seed) for of_seed in documents]))

    def _guided_rows(self, documents: Sequence[Sequence[dict[str, Any]]]) -> list[GuidedRow]:
        table, policies = self._pooled_table(documents), compare.compared_policies(self.config)
        return guided_rows(table, policies, self._tables(documents))

    def write(self, folder: str, progress: RunProgress) -> None:
        """The three files of a report, and the table by guide."""
        names = [str(config.seed) for config in self.configs]
        contents = ReportContents(
            title=f"{self.config.name}, seeds {', '.join(names)}",
            summary="The same run for several seeds; every row has the students of all of them.",
            measurement={
                **measurement(self.config),
                "seed": ", ".join(names),
                "intervals": INTERVALS,
            },
            samples=samples(self.configs[0], self.documents[0]),
        )
        write_report(folder, self.table, self.claims, contents, self.fronts)
        tables = self._tables(self.documents)
        by_seed = {
            name: [table.method(name).means for table in tables]
            for name in (method.name for method in self.table.methods)
        }
        storage.write_json(storage.join(folder, "by_seed.json"), {"seeds": names, "methods": by_seed})
        if self.guided:
            compare.write_guided_table(folder, self.guided, self.config.objective_names)

    def print(self, console: Console, page: str) -> None:
        """The same for the terminal."""
        console.print(f"\nAll {len(self.configs)} seeds: {INTERVALS}.")
        print_table(console, self.table)
        if self.fronts:
            console.print()
            print_families(console, self.fronts)
        if self.guided:
            console.print()
            print_guided_rows(console, self.guided, self.config.objective_names)
        console.print()
        print_claims(console, self.claims)
        console.print(f"\nReport: {page}", markup=False, soft_wrap=True)


def _results(documents: Sequence[dict[str, Any]]) -> list[MethodResult]:
    return [MethodResult.model_validate(document["result"]) for document in documents]
