"""What training a policy takes, told from the model's config alone: parameters and bytes, no weights loaded.

Bytes per GPU follow what DeepSpeed keeps with torch's AdamW. Activations are not among them: they depend on
sequence lengths and checkpointing, and have what is left (docs/operations.md has a measured 7B step).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, Qwen2Config

from mahalo_ray.config import AdaptersConfig, LoraConfig, ModelConfig, PolicyConfig, ZeroStage
from mahalo_ray.models import MultiHeadCausalLM
from mahalo_ray.models.adapters import ADAPTER_PARAMETERS
from mahalo_ray.models.backbone import load_config
from mahalo_ray.models.folder import model_folder, read_metadata
from mahalo_ray.models.heads import LogitTransform
from mahalo_ray.models.lora import saved_lora
from mahalo_ray.training.deepspeed_config import BUCKET_ELEMENTS

GIB = 2**30
_FP32 = 4
_MOMENTS = 2  # of AdamW, in the dtype of the master weights: fp32
# DeepSpeed's default of how many gathered parameters may lie on a GPU at once with ZeRO-3.
_LIVE_PARAMETERS = 1_000_000_000


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters; `base_head` is the frozen head of the SFT model, kept for decoding strengths."""

    backbone: int
    adapter: int
    base_head: int
    heads: int
    trained: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.backbone + self.adapter + self.base_head + self.heads


@dataclass(frozen=True)
class Memory:
    """Bytes of one way to train. `host_per_gpu` is main memory, per GPU of the node."""

    zero_stage: int
    offload_optimizer: bool
    offload_parameters: bool
    parameters: int
    gradients: int
    optimizer: int
    buffers: int
    log_probs: int
    host_per_gpu: int

    @property
    def total(self) -> int:
        """Per GPU, without activations."""
        return self.parameters + self.gradients + self.optimizer + self.buffers + self.log_probs


@dataclass(frozen=True)
class Plan:
    """`checkpoint`: bytes of one checkpoint to resume from; `model`: of the finished model's folder;
    `kept_weights`: of the trained weights that the first worker's host keeps for a KL budget;
    `sweep_trainings`: at most how many more policies a sweep over training weights trains and keeps."""

    counts: ParameterCount
    dtype: str
    gpus: int
    memory: list[Memory]
    checkpoint: int
    model: int
    kept_weights: int
    sweep_trainings: int = 0


def make_plan(
    model: ModelConfig, policy: PolicyConfig, objectives: int, gpus: int, sweep_trainings: int = 0
) -> Plan:
    """Of training `policy` with this number of objectives' heads on `gpus` GPUs, and of the sweep's policies.
    With `policy.extends` (a model folder here) as many heads are added to those of that policy, and nothing
    else is trained.

    ValueError when `model.base` holds no config or is no causal language model.
    """
    dtype = getattr(torch, model.dtype)
    make = policy_on_meta if policy.extends is None else extended_on_meta
    built = make(base_config(model), policy, objectives, dtype)
    counts = count_parameters(built)
    ways: list[tuple[ZeroStage, bool, bool]] = [(0, False, False)]
    for stage in (1, 2, 3):
        ways += [(stage, False, False), (stage, True, False)]
    ways.append((3, True, True))
    chunk = policy.training.logit_chunk_size
    workspace = log_prob_workspace(chunk, built.vocab_size, dtype)
    saved = counts.total - (counts.backbone if built.has_lora else 0)
    kept_weights = 0 if policy.max_kl is None else counts.trained * dtype.itemsize
    return Plan(
        counts,
        model.dtype,
        gpus,
        [memory_of(counts, way, dtype, gpus, workspace) for way in ways],
        counts.total * dtype.itemsize + counts.trained * _FP32 * (1 + _MOMENTS) + kept_weights,
        saved * dtype.itemsize,
        kept_weights,
        sweep_trainings,
    )


def base_config(model: ModelConfig) -> PretrainedConfig:
    """The transformers config of the base, or of the model made from scratch (with its largest
    vocabulary)."""
    if model.scratch is not None:
        scratch = model.scratch
        return Qwen2Config(
            vocab_size=scratch.vocab_size,
            hidden_size=scratch.hidden_size,
            num_hidden_layers=scratch.num_layers,
            num_attention_heads=scratch.num_attention_heads,
            num_key_value_heads=scratch.num_attention_heads,
            intermediate_size=scratch.intermediate_size,
            tie_word_embeddings=False,
        )
    assert model.base is not None
    try:
        return load_config(model.base)
    except ValueError as error:  # ValueError: a config.json of no known kind of model
        raise ValueError(
            f"'model.base': no config of a model can be read from '{model.base}' ({error})"
        ) from error


def policy_on_meta(
    config: PretrainedConfig, policy: PolicyConfig, objectives: int, dtype: torch.dtype
) -> MultiHeadCausalLM:
    """The policy as it will be trained, without memory: its parameters have shapes only."""
    names = [f"objective{number}" for number in range(objectives)]
    return _on_meta(config, names, policy, policy.adapters, None, policy.lora, dtype)


def extended_on_meta(
    config: PretrainedConfig, policy: PolicyConfig, objectives: int, dtype: torch.dtype
) -> MultiHeadCausalLM:
    """The same where `objectives` heads are trained on the policy in `policy.extends`."""
    assert policy.extends is not None
    folder = model_folder(policy.extends)
    saved = read_metadata(folder, MultiHeadCausalLM.kind)
    new = [f"new_objective{number}" for number in range(objectives)]
    adapters = AdaptersConfig(**saved["adapters"]) if saved.get("adapters") else AdaptersConfig()
    adapted = saved.get("adapted_objectives") or len(saved["objectives"])
    lora = saved_lora(folder) if saved["adapter"] else None
    built = _on_meta(config, [*saved["objectives"], *new], policy, adapters, adapted, lora, dtype)
    built.requires_grad_(False)
    for name in new:
        for part, parameter in built.head(name).named_parameters():
            parameter.requires_grad_(not part.startswith("base_"))  # shared by all low-rank heads
    return built


def _on_meta(
    config: PretrainedConfig,
    objectives: list[str],
    policy: PolicyConfig,
    adapters: AdaptersConfig,
    adapted: int | None,
    lora: LoraConfig | None,
    dtype: torch.dtype,
) -> MultiHeadCausalLM:
    with torch.device("meta"):
        causal = AutoModelForCausalLM.from_config(config, dtype=dtype)
        head = causal.get_output_embeddings()
        if head is None:
            raise ValueError(f"{type(causal).__name__} is not a causal language model with a head")
        built = MultiHeadCausalLM(
            causal.base_model,
            objectives,
            head_kind=policy.head_kind,
            transform=LogitTransform(),
            vocab_size=head.weight.shape[0],
            hidden_size=head.weight.shape[1],
            bias=head.bias is not None,
            dtype=dtype,
            rank=policy.head_rank,
            adapters=adapters,
            adapted_objectives=adapted,
            keep_base_head=True,
        )
        if lora is not None:
            built.add_lora(lora)
    return built


def count_parameters(policy: MultiHeadCausalLM) -> ParameterCount:
    """Every parameter once, by what it belongs to."""
    adapter = sum(
        p.numel()
        for name, p in policy.backbone.named_parameters()
        if ".lora_" in name or name.endswith(ADAPTER_PARAMETERS)
    )
    base_head = 0 if policy.base_head is None else _count(policy.base_head)
    shared = set() if policy.base_head is None else {id(p) for p in policy.base_head.parameters()}
    return ParameterCount(
        backbone=_count(policy.backbone) - adapter,
        adapter=adapter,
        base_head=base_head,
        heads=sum(p.numel() for p in policy.heads.parameters() if id(p) not in shared),
        trained=sum(p.numel() for p in policy.parameters() if p.requires_grad),
    )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def memory_of(
    counts: ParameterCount, way: tuple[ZeroStage, bool, bool], dtype: torch.dtype, gpus: int, workspace: int
) -> Memory:
    """What DeepSpeed keeps for (ZeRO stage, optimizer offload, parameter offload).

    Parameters: whole below stage 3. Gradients in the model's dtype: whole below stage 2. Optimizer: AdamW's
    two fp32 moments and fp32 master weights, of which ZeRO keeps its shard apart from the parameters even
    where these are fp32 (without ZeRO there is no such copy). Buffers: one bucket of gradients on their way
    to their owners, and with stage 3 the parameters that may be gathered at once. Offloaded are optimizer
    and gradients, or the parameters.
    """
    stage, offload_optimizer, offload_parameters = way
    width = dtype.itemsize
    own_copy = dtype != torch.float32 or stage > 0
    parameters = _share(counts.total, gpus if stage == 3 else 1) * width
    gradients = _share(counts.trained, gpus if stage >= 2 else 1) * width
    states = _share(counts.trained, gpus if stage >= 1 else 1) * _FP32 * (_MOMENTS + own_copy)
    buffers = BUCKET_ELEMENTS * width if stage > 0 else 0
    if stage == 3:
        buffers += min(counts.total, _LIVE_PARAMETERS) * width
    host = 0
    if offload_optimizer:
        host += states + gradients
        states = gradients = 0
    if offload_parameters:
        host += parameters
        parameters = 0
    return Memory(
        *(stage, offload_optimizer, offload_parameters),
        *(parameters, gradients, states, buffers, workspace, host),
    )


def _share(count: int, gpus: int) -> int:
    """Of the GPU with the largest share."""
    return -(-count // gpus)


def log_prob_workspace(chunk_size: int, vocab_size: int, dtype: torch.dtype) -> int:
    """Bytes of the chunked log-probs: logits and their gradient in fp32, and both again in a narrower
    dtype."""
    narrow = 0 if dtype == torch.float32 else 2 * dtype.itemsize
    return chunk_size * vocab_size * (2 * _FP32 + narrow)


def plan_to_json(plan: Plan, gpu_memory_gb: float) -> str:
    """Everything in bytes, with totals and what fits."""
    document = asdict(plan)
    document["counts"]["total"] = plan.counts.total
    document["memory"] = [
        {**asdict(way), "total": way.total, "fits": fits(way, gpu_memory_gb)} for way in plan.memory
    ]
    return json.dumps(document | {"gpu_memory_gb": gpu_memory_gb}, indent=2)


def fits(way: Memory, gpu_memory_gb: float) -> bool:
    """Whether something is left for activations."""
    return way.total < gpu_memory_gb * GIB


def print_plan(console: Console, plan: Plan, gpu_memory_gb: float) -> None:
    """Counts, memory per GPU, sizes on disk."""
    wide = console if console.is_terminal else Console(file=console.file, width=130, highlight=False)
    counts = plan.counts
    parts = {"backbone": counts.backbone, "adapters": counts.adapter}
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
    if plan.kept_weights:
        wide.print(
            f"The first worker's host keeps {size(plan.kept_weights)} of weights besides ('policy.max_kl')."
        )
    if plan.sweep_trainings:
        wide.print(
            f"The sweep over training weights trains at most {plan.sweep_trainings} more policies of this "
            f"size and keeps them: {size(plan.sweep_trainings * plan.model)}."
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
        left = gpu_memory_gb - way.total / GIB
        values = (way.parameters, way.gradients, way.optimizer, way.buffers, way.log_probs, way.total)
        table.add_row(
            f"{way.zero_stage}" + (f", {' + '.join(offloaded)}" if offloaded else ""),
            *(f"{value / GIB:.3g}" for value in values),
            f"{left:.3g}" if fits(way, gpu_memory_gb) else "does not fit",
            f"{way.host_per_gpu / GIB:.3g}",
        )
    return table


def _offloads(way: Memory) -> dict[str, bool]:
    return {"optimizer": way.offload_optimizer, "parameters": way.offload_parameters}


def size(count: int) -> str:
    """Bytes in the unit that suits them."""
    return f"{count / GIB:.3g} GiB" if count >= GIB / 10 else f"{count / 2**20:.3g} MiB"
