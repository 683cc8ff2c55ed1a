"""A plan for people (tables) and for programs (JSON)."""

from __future__ import annotations

import json
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from mahalo_ray.config import RunConfig
from mahalo_ray.planning import GIGABYTE, Memory, Plan, make_plan


def plan_of(config: RunConfig, gpus: int | None) -> Plan:
    """Of the run's policy, on as many GPUs as it has training workers unless told otherwise."""
    count = gpus if gpus is not None else config.cluster.train_workers
    return make_plan(config.model, config.policy, len(config.objectives), count)


def to_json(plan: Plan, gpu_memory_gb: float) -> str:
    """Everything in bytes, with totals and what fits."""
    document = asdict(plan)
    document["counts"]["total"] = plan.counts.total
    document["memory"] = [
        {**asdict(way), "total": way.total, "fits": fits(way, gpu_memory_gb)} for way in plan.memory
    ]
    return json.dumps(document | {"gpu_memory_gb": gpu_memory_gb}, indent=2)


def fits(way: Memory, gpu_memory_gb: float) -> bool:
    """Whether something is left for activations."""
    return way.total < gpu_memory_gb * GIGABYTE


def print_plan(console: Console, plan: Plan, gpu_memory_gb: float) -> None:
    """Counts, memory per GPU, sizes on disk."""
    wide = console if console.is_terminal else Console(file=console.file, width=130, highlight=False)
    counts = plan.counts
    parts = {"backbone": counts.backbone, "LoRA adapter": counts.adapter}
    parts |= {"base head (frozen)": counts.base_head, "heads": counts.heads, "total": counts.total}
    table = Table(title="Parameters", title_justify="left")
    table.add_column("part")
    table.add_column("number", justify="right")
    for name, number in (parts | {"trained": counts.trained}).items():
        table.add_row(name, f"{number:,}")
    wide.print(table)
    wide.print(_memory_table(plan, gpu_memory_gb))
    wide.print(
        f"Checkpoint to resume from: {size(plan.checkpoint)}; finished model: {size(plan.model)}. "
        "Activations come on top: they have the column 'left'."
    )


def _memory_table(plan: Plan, gpu_memory_gb: float) -> Table:
    title = f"Memory per GPU (GiB), {plan.gpus} x {gpu_memory_gb:g} GiB, {plan.dtype}"
    table = Table(title=title, title_justify="left")
    table.add_column("ZeRO, offload")
    columns = ("parameters", "gradients", "optimizer", "buffers", "log-probs", "total", "left", "host")
    for name in columns:
        table.add_column(name, justify="right")
    for way in plan.memory:
        offloaded = [name for name, on in _offloads(way).items() if on]
        left = gpu_memory_gb - way.total / GIGABYTE
        values = (way.parameters, way.gradients, way.optimizer, way.buffers, way.log_probs, way.total)
        table.add_row(
            f"{way.zero_stage}" + (f", {' + '.join(offloaded)}" if offloaded else ""),
            *(f"{value / GIGABYTE:.3g}" for value in values),
            f"{left:.3g}" if fits(way, gpu_memory_gb) else "does not fit",
            f"{way.host_per_gpu / GIGABYTE:.3g}",
        )
    return table


def _offloads(way: Memory) -> dict[str, bool]:
    return {"optimizer": way.offload_optimizer, "parameters": way.offload_parameters}


def size(count: int) -> str:
    """Bytes in the unit that suits them."""
    return f"{count / GIGABYTE:.3g} GiB" if count >= GIGABYTE / 10 else f"{count / 2**20:.3g} MiB"
