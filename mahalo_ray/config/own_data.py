"""Own preference pairs and step traces: the section `data` of a run."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from mahalo_ray.config.section import Fraction, Section


class PairsSource(Section):
    """A file or folder of preference pairs (see `mahalo_ray.data.readers`), and which objective they are for:
    `objective` for all rows, or `objective_field`, the field of each row that names it. `sample`: share of
    the dialogues that is used, whole dialogues."""

    path: str
    format: Literal["auto", "trl", "mahalo", "records", "truthfulqa"] = "auto"
    objective: str | None = None
    objective_field: str | None = None
    sample: Annotated[float, Field(gt=0, le=1)] = 1.0

    @model_validator(mode="after")
    def _one_way_to_the_objective(self) -> Self:
        if (self.objective is None) == (self.objective_field is None):
            raise ValueError(
                "give exactly one of 'objective' (that of all rows) and 'objective_field' (the field of a "
                "row that names it)"
            )
        if self.format == "truthfulqa" and self.objective is None:
            raise ValueError("rows of TruthfulQA name no objective: give 'objective'")
        return self


class TracesSource(Section):
    """A file or folder of step traces (see `mahalo_ray.data.step_readers`). `objective` (or
    `objective_field`, the field of each row that names it) is that of labels which name none.

    `outcome_labels` and `gamma`: where only the outcome is known, it labels the last step, or as
    gamma^(n-t) * outcome every step t of n. `sample`: share of the prompts that is used, whole prompts.
    """

    path: str
    format: str = "auto"
    objective: str | None = None
    objective_field: str | None = None
    label_range: tuple[float, float] = (0.0, 1.0)
    outcome_labels: Literal["last", "all"] = "last"
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    sample: Annotated[float, Field(gt=0, le=1)] = 1.0

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.objective is not None and self.objective_field is not None:
            raise ValueError("give at most one of 'objective' and 'objective_field'")
        if self.label_range[0] >= self.label_range[1]:
            raise ValueError(f"'label_range' is {list(self.label_range)}: the first must be below the second")
        if self.gamma != 1.0 and self.outcome_labels != "all":
            raise ValueError("'gamma' discounts outcomes over all steps: it goes with 'outcome_labels: all'")
        return self


class DataConfig(Section):
    """Own preference pairs and step traces, in place of a domain's rollouts: reward model or policy are
    trained on them from `model.base`.

    Rows that cannot be used are written to quarantine.parquet; more than `max_bad_fraction` of them is an
    error. `step_separator` ends every step of a trace in the reward model's reading (null: a step is a whole
    turn).
    """

    pairs: list[PairsSource] = []
    traces: list[TracesSource] = []
    step_separator: str | None = "\n\n"
    max_bad_fraction: Fraction = 0.01

    @model_validator(mode="after")
    def _something_to_read(self) -> Self:
        if not self.pairs and not self.traces:
            raise ValueError("give 'pairs', 'traces' or both: there is nothing to read")
        return self
