"""Where the work of a run or a job is done: the section `cluster`."""

from __future__ import annotations

from typing import Any, Self

from pydantic import model_validator

from mahalo_ray.config.section import NonNegativeInt, PositiveFloat, PositiveInt, Section, Text


class ActorsConfig(Section):
    """Where the work of a job that trains nothing runs. `address: null` starts a private local Ray unless
    RAY_ADDRESS is set."""

    address: Text | None = None
    """Address of a running Ray cluster (`auto`, `ray://HOST:10001`, `HOST:6379`). Null: that of the
    environment variable RAY_ADDRESS, else a private Ray on this machine."""

    rollout_actors: PositiveInt = 2
    """Number of Ray actors that decode, score and judge side by side."""

    cpus_per_rollout_actor: PositiveFloat = 1
    """CPU cores reserved for each of these actors; also its number of threads (rounded down, at least 1)."""

    use_gpu: bool = False
    """Whether every worker and actor gets one GPU. False: everything runs on CPUs."""

    cuda_graphs: bool = False
    """Whether the policy's forwards of single tokens are recorded as CUDA graphs and repeated. For small and
    middle models on a GPU, which wait for the host otherwise. Not yet run on a GPU; not for policies with
    adapters for each objective."""

    max_failures: NonNegativeInt = 3
    """How many workers or actors may be lost in a training stage, or with one chunk of work, before the stage
    ends with an error."""

    @property
    def device(self) -> str:
        """Torch device type of every worker."""
        return "cuda" if self.use_gpu else "cpu"

    @model_validator(mode="after")
    def _graphs_are_of_gpus(self) -> Self:
        if self.cuda_graphs and not self.use_gpu:
            raise ValueError("'cuda_graphs' is set, but 'use_gpu' is not: there are graphs on GPUs only")
        return self

    @model_validator(mode="before")
    @classmethod
    def _trains_nothing(cls, data: Any) -> Any:
        """The keys of a run's `cluster` that a job without training has no use for."""
        for name in ("train_workers", "cpus_per_train_worker"):
            if name not in cls.model_fields and isinstance(data, dict) and name in data:
                raise ValueError(f"'{name}' is not used: nothing is trained here, leave it out")
        return data


class ClusterConfig(ActorsConfig):
    """Where the work of a run with training stages runs."""

    train_workers: PositiveInt = 2
    """Number of training workers (data-parallel ranks). A training stage that was begun goes on with the same
    number only."""

    cpus_per_train_worker: PositiveFloat = 1
    """CPU cores reserved for each training worker; also its number of threads (rounded down, at least 1)."""
