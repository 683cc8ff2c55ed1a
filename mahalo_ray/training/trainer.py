"""Train a policy in this process: the loop that Ray Train's workers run, without Ray."""

from __future__ import annotations

import atexit
import json
import logging
import os
import socket
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from mahalo_ray.config import ModelConfig, PolicyConfig
from mahalo_ray.data import storage
from mahalo_ray.data.pair_readers import ReadPairs, read_pairs
from mahalo_ray.data.records import PreferencePair
from mahalo_ray.data.temporary import temporary_folder
from mahalo_ray.models import MultiHeadCausalLM
from mahalo_ray.models.folder import local_folder
from mahalo_ray.training.loop import train
from mahalo_ray.training.policy_methods import new_objectives, of_objectives
from mahalo_ray.training.policy_recipe import PolicyRecipe
from mahalo_ray.training.settings import PolicySettings, ProgressFunction

Pairs = str | Path | Iterable[PreferencePair | Mapping[str, Any]]
_SHOWN = 5

logger = logging.getLogger(__name__)


class LocalSession:
    """`loop.TrainingSession` of a process by itself: it passes progress on and keeps no checkpoints."""

    def __init__(self, progress: ProgressFunction | None, settings: PolicySettings) -> None:
        self._progress, self._settings, self._alarmed = progress, settings, False

    def report(self, news: dict[str, Any], checkpoint: Path | None = None) -> None:
        """Call the progress function; log the first alarm."""
        alarm = None if self._alarmed else self._settings.alarm(news.get("metrics", {}))
        if alarm is not None:
            self._alarmed = True
            logger.warning(alarm)
        if self._progress is not None:
            self._progress(news["done"], news["of"], news["unit"], news.get("metrics", {}))

    @contextmanager
    def latest_checkpoint(self) -> Iterator[tuple[Path, str] | None]:
        """There is none."""
        yield None


class PolicyTrainer:
    """MAH-DPO (or a baseline: `config.method`) on preference pairs, in this process and on its device.

    The loop, the recipe and DeepSpeed's settings are those of `mahalo run`, so the same pairs and seed give
    the same policy; what is left out is Ray: one process, and no checkpoints to go on from.

    `history` has one entry of metrics per report, and `model` is the trained policy after `train`.

    >>> from mahalo_ray.config import PolicyConfig, TrainingConfig
    >>> pairs = [
    ...     {"prompt": "name a fruit", "chosen": "fig", "rejected": "a car", "objective": "accuracy"},
    ...     {"prompt": "name a bird", "chosen": "tern", "rejected": "a cat", "objective": "accuracy"},
    ...     {"prompt": "name a fruit", "chosen": "fig of course", "rejected": "fig", "objective": "warmth"},
    ...     {"prompt": "name a bird", "chosen": "tern of course", "rejected": "tern", "objective": "warmth"},
    ... ]
    >>> trainer = PolicyTrainer(
    ...     "model",
    ...     pairs,
    ...     PolicyConfig(training=TrainingConfig(max_steps=2, batch_size=4)),
    ...     objectives=["accuracy", "warmth"],
    ...     held_out_fraction=0.0,
    ... )
    >>> metrics = trainer.train()
    >>> sorted(trainer.model.heads)
    ['accuracy', 'warmth']
    >>> trainer.save_pretrained("trained")
    """

    def __init__(
        self,
        model: str | Path | MultiHeadCausalLM,
        pairs: Pairs,
        config: PolicyConfig | None = None,
        *,
        objectives: Sequence[str] | None = None,
        objective: str | None = None,
        objective_field: str = "objective",
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_length: int = 1024,
        dtype: Literal["float32", "bfloat16"] = "float32",
        held_out_fraction: float = 0.1,
        seed: int = 17,
        output_dir: str | Path | None = None,
    ) -> None:
        """`model`: a folder or hub id of the SFT model, which is start and reference at once; or a policy in
        memory made by `MultiHeadCausalLM.from_base(..., keep_base_head=True)`, which is trained itself (with
        `tokenizer`) and whose reference is its state now, with the base head.

        `pairs`: a file or folder, or rows: dictionaries with TRL's columns `prompt`, `chosen`, `rejected` (a
        `datasets.Dataset` too) or `PreferencePair` records. A row's objective is `objective`, or what its
        field `objective_field` says. `objectives`: all of them, in the order of the heads; those of a policy
        in memory, or the one `objective`, unless given.

        With `config.extends` (the folder of a policy made from `model`) its backbone and heads stay, and only
        the heads of the objectives that it lacks are trained.

        `max_length` in tokens; longer pairs keep the end of the prompt and the beginning of the answers.
        `held_out_fraction`: share of the prompts kept for the metrics named `held_out/...`. `output_dir`:
        where the model and what `config.training.report_to` names are written; a temporary folder unless
        given.

        Raises ValueError for a row that is no pair, naming it, and for settings that do not fit each other.
        """
        self._config = config or PolicyConfig()
        in_memory = isinstance(model, MultiHeadCausalLM)
        if objectives is None:
            known = model.objectives if isinstance(model, MultiHeadCausalLM) else ()
            objectives = known or (() if objective is None else (objective,))
        if not objectives:
            raise ValueError("name the objectives of the heads: objectives=[...]")
        if isinstance(model, MultiHeadCausalLM) and tokenizer is None:
            raise ValueError("a policy in memory has no tokenizer: pass tokenizer=...")
        if self._config.training.report_to and output_dir is None:
            raise ValueError("'report_to' writes files that are to stay: pass output_dir=...")
        if output_dir is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="mahalo-trainer-")
            output_dir = self._temporary.name
        self._folder = Path(output_dir).absolute()
        if (self._folder / "model").exists():
            raise ValueError(f"{self._folder / 'model'} is there already: give another output_dir")
        if self._config.extends is not None:
            if isinstance(model, MultiHeadCausalLM):
                raise ValueError("'extends' goes with the folder of the SFT model, not a policy in memory")
            extends = str(local_folder(self._config.extends).absolute())
            objectives = new_objectives(extends, objectives)
            self._config = of_objectives(self._config, objectives).model_copy(update={"extends": extends})
        records = _read(pairs, objectives, objective, objective_field)
        PreferencePair.save(records, str(self._folder / "pairs" / "part-000000.parquet"))
        if isinstance(model, MultiHeadCausalLM):
            dtype = "bfloat16" if next(model.parameters()).dtype == torch.bfloat16 else "float32"
        base = "in memory" if in_memory else str(local_folder(str(model)))
        self._start, self._tokenizer = (model if isinstance(model, MultiHeadCausalLM) else None), tokenizer
        self._settings = PolicySettings(
            model_url=base,
            output_url=str(self._folder / "model"),
            model=ModelConfig(base=base, max_length=max_length, dtype=dtype),
            seed=seed,
            pairs_url=str(self._folder / "pairs"),
            objectives=tuple(objectives),
            policy=self._config,
            held_out_fraction=held_out_fraction,
        )
        self.model = self._start
        self.history: list[dict[str, float]] = []

    def train(self, progress: ProgressFunction | None = None) -> dict[str, float]:
        """Train; returns the final metrics. `progress(done, of, unit, metrics)` is called at every report."""
        make_recipe = partial(PolicyRecipe, self._settings, self._start, self._tokenizer)
        with one_process(), torch.random.fork_rng():
            result = train(make_recipe, self._settings, LocalSession(progress, self._settings))
        self.history = result["history"]
        # Read back what was stored: under ZeRO-3 the trained module holds shards.
        self.model = MultiHeadCausalLM.from_pretrained(self._folder / "model")
        metrics: dict[str, float] = result["metrics"]
        for note in self._settings.notes(metrics):
            logger.warning(note)
        return metrics

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the trained policy's folder: `MultiHeadCausalLM.from_pretrained` reads it."""
        if not self.history:
            raise ValueError("there is no trained policy yet: call train() first")
        storage.copy_folder(self._folder / "model", folder)


def _read(
    pairs: Pairs, objectives: Sequence[str], objective: str | None, objective_field: str
) -> list[PreferencePair]:
    """All pairs; ValueError that names the first rows that are none."""
    field = None if objective is not None else objective_field
    read = ReadPairs()
    if isinstance(pairs, str | Path):
        read_pairs(str(pairs), "auto", objectives, objective, field, "pairs", read)
    else:
        rows = list(pairs)
        records = [row for row in rows if isinstance(row, PreferencePair)]
        if records and len(records) < len(rows):
            raise ValueError("give either PreferencePair records or dictionaries, not both")
        if records:
            return records
        with temporary_folder("pairs") as folder:
            file = Path(folder) / "rows.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            read_pairs(str(file), "auto", objectives, objective, field, "pairs", read)
    if read.bad:
        named = "; ".join(f"row {row.line}: {row.reason}" for row in islice(read.bad, _SHOWN))
        raise ValueError(f"{len(read.bad)} of {read.rows} rows are no pairs: {named}")
    if read.left_out:
        raise ValueError(
            f"rows name objectives that are not among {', '.join(objectives)}: {', '.join(read.left_out)}"
        )
    return read.pairs


@contextmanager
def one_process() -> Iterator[None]:
    """A process group of one, unless there is one already, and the variables that DeepSpeed reads. The group
    stays until the process ends: DeepSpeed holds on to the first it sees."""
    if dist.is_initialized() and "LOCAL_RANK" in os.environ:
        yield
        return
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        atexit.register(dist.destroy_process_group)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    before = {name: os.environ.get(name) for name in (*variables, "MASTER_PORT")}
    os.environ.update(variables, MASTER_PORT=str(port))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
