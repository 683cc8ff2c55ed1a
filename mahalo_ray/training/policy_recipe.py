"""The policy's recipe. MAH-DPO: one head per objective over a shared backbone, trained on preference pairs
of all objectives at once (MAHALO, arXiv 2510.01167); and the methods it is compared with.

L = sum_i alpha_i * mean over the batch's pairs of objective i (weighted by the pairs' weights) of the DPO
loss with beta_i under head i, and `chosen_anchor` times the negative log-prob per token of the chosen
answer. The baselines have one head; see `mahalo_ray.training.policy_methods`.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from mahalo_ray.config import ModelConfig, PolicyConfig
from mahalo_ray.data import storage
from mahalo_ray.data.records import PreferencePair
from mahalo_ray.data.templating import ChatFormat
from mahalo_ray.decoding.stopping import boundary_for
from mahalo_ray.domains.protocol import load_domain
from mahalo_ray.losses import dpo_loss, sft_loss
from mahalo_ray.models import MultiHeadCausalLM
from mahalo_ray.models.backbone import (
    check_trained_length,
    load_causal_lm,
    load_config,
    load_tokenizer,
    split_causal_lm,
)
from mahalo_ray.models.folder import (
    HEADS_FILE,
    keeps_backbone,
    model_folder,
    read_metadata,
    tokenizer_difference,
)
from mahalo_ray.models.pair_attention import packing_unsupported_reason
from mahalo_ray.training.batches import HashSplit, Indices, plan_balanced_batches, shard
from mahalo_ray.training.deepspeed_config import parameter_group
from mahalo_ray.training.deepspeed_engine import to_device, training_device
from mahalo_ray.training.pairs import (
    PackedPairs,
    PaddedPairs,
    PairEncoder,
    TokenPairs,
    pair_inputs,
    pair_logps,
    split_key,
)
from mahalo_ray.training.policy_methods import modpo_margins, plan_method, standardised_rewards
from mahalo_ray.training.policy_metrics import GradientConflict, HeldOutKl, PolicyProbe, SampledTurns
from mahalo_ray.training.recipe import PAD_ID, Inference, LossOutput, PreparationProgress, Probe, Tensors
from mahalo_ray.training.reference_logps import (
    REFERENCE_STORE,
    AnswerStates,
    BaseHeadLogps,
    compute_logps,
    load_reference,
    reference_key,
    reference_logps,
)
from mahalo_ray.training.settings import PolicySettings

# Sums over pairs: of what the metrics are divided by, of weight x loss, and of the other metrics.
_SUMS = ("count", "weight", "loss", "reward_accuracy", "margin", "chosen_logps", "rejected_logps")


class PolicyRecipe:
    """Metrics per objective: loss (mean weighted by the pairs' weights), reward accuracy (share of pairs
    whose chosen answer gained more over the reference), margin (mean beta-scaled difference of these gains),
    mean log-probs of chosen and rejected answers."""

    def __init__(
        self,
        settings: PolicySettings,
        start: MultiHeadCausalLM | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """Reads the pairs, and computes reference log-probs that are not stored yet; every worker takes part.

        `start`: train this model instead of one made from `model_url`; its reference is the model itself as
        it is now, with its base head.
        """
        self._settings, self._start = settings, start
        self._policy, self._model, self._seed = settings.policy, settings.model, settings.seed
        self._plan = plan_method(settings.policy, settings.objectives)
        self._objectives, self._training = self._plan.objectives, settings.training
        self._folder = None if start is not None else model_folder(settings.model_url)
        self._tokenizer = tokenizer or load_tokenizer(str(self._folder))
        self._extended: Path | None = None  # the folder of the policy that gets new heads
        self._first_head = 0  # the number of the first trained head among the policy's
        if settings.policy.extends is not None:
            self._extended = self._policy_to_extend()
            metadata = read_metadata(self._extended, MultiHeadCausalLM.kind)
            self._first_head = len(metadata["objectives"])
        self._pairs, self._margins, aside = self._read_pairs()
        self.packed = self._shares_prompts()
        self._inputs = PackedPairs(self._pairs) if self.packed else PaddedPairs(self._pairs, PAD_ID)
        self.row_groups = self._inputs.row_groups
        self._held_out, self._trained = np.flatnonzero(aside), ~aside
        self._balances: Tensor | None = None
        if self._policy.balance == "sampled":
            self._balances, self._gaps = self._sampled_balances()
        self.batches = self._balanced(
            self._training.batch_size, self._training.epochs, self._training.max_steps
        )
        self._reference = self._reference_of_used()
        # What a chosen answer's log-prob is divided by for the anchor; averaged ones have been already.
        tokens = self._pairs.completion_tokens()[:, 0]
        averaged = settings.policy.average_log_probs
        self._chosen_tokens = torch.from_numpy(np.ones_like(tokens) if averaged else tokens).float()
        self.metric_names = tuple(f"{name}/{metric}" for name in self._objectives for metric in _SUMS)
        self.probe: Probe | None = self._make_probe() if settings.policy.metrics_every_steps else None

    def _policy_to_extend(self) -> Path:
        """The folder of the policy that gets new heads. ValueError, on all workers, if they cannot be trained
        on it against this base."""
        extends = self._policy.extends
        assert extends is not None and self._folder is not None
        folder = model_folder(extends)
        problem: list[str | None] = [None]
        if dist.get_rank() == 0:
            try:
                check_extendable(folder, self._folder, self._policy, self._model)
            except ValueError as error:
                problem = [f"'policy.extends': {error}"]
        dist.broadcast_object_list(problem)
        if problem[0] is not None:
            raise ValueError(problem[0])
        return folder

    def _read_pairs(self) -> tuple[TokenPairs, npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
        """The pairs, their margins, and which of them are held out [N]. One record is in memory at a time."""
        settings, model = self._settings, self._model
        # Pairs of an objective that does not exist are kept: the encoder names them in its error.
        unused = set(settings.objectives) - set(self._objectives)
        encoder = PairEncoder(self._objectives, ChatFormat(self._tokenizer), model.max_length)
        held_out, aside = HashSplit(settings.held_out_fraction, self._seed), array("b")
        for pair in self._records(unused):
            encoder.add(pair)
            aside.append(split_key(pair) in held_out)
        pairs = encoder.pairs()
        margins, is_own = pairs.margins, self._policy.balance == "own"
        if self._policy.method == "modpo":
            margins = margins + modpo_margins(self._policy, self._records(unused))
        if not is_own and margins.any():
            raise ValueError(
                "'policy.balance: sampled' makes the margin of every pair from its scores, and pairs have "
                "margins of their own: set 'pairs.gap_margin' to 0"
            )
        if self._policy.loss == "regression" and is_own and not margins.any():
            raise ValueError(
                "'policy.loss: regression' regresses on the pairs' margins, and all of them are 0: set "
                "'pairs.gap_margin' (1 asks for 1 / beta nats per standard deviation of the scores), or give "
                "the pairs margins"
            )
        return pairs, margins, np.array(aside, dtype=bool)

    def _sampled_balances(self) -> tuple[Tensor, Tensor]:
        """Balances [N, H] that the pairs are trained at, and by how many standard deviations the chosen
        answer scores higher for each objective [N, H]. A held-out pair is read under its own head."""
        shape = len(self._pairs), len(self._objectives)
        # Dirichlet(1/2): half of the draws lie near an end, where a single head must hold.
        drawn = np.random.default_rng([self._seed, 2]).dirichlet([0.5] * shape[1], size=shape[0])
        drawn[self._held_out] = np.eye(shape[1])[self._pairs.objective[self._held_out]]
        scores = standardised_rewards(self._records(set()), self._objectives)
        return torch.from_numpy(drawn).float(), (scores[0] - scores[1]).float()

    def _records(self, unused: set[str]) -> Iterator[PreferencePair]:
        records = PreferencePair.stream(self._settings.pairs_url)
        return (pair for pair in records if pair.objective not in unused)

    def _shares_prompts(self) -> bool:
        """Whether pairs are packed, their prompts read once; ValueError if that is demanded and cannot be, or
        for a length that no batch of this model may have."""
        config = load_config(str(self._folder)) if self._start is None else self._start.config
        check_trained_length(config, self._model.max_length)
        if self._policy.share_prompts == "never":
            return False
        reason = packing_unsupported_reason(config, self._model.attn_implementation, self._model.max_length)
        if reason is not None and self._policy.share_prompts == "always":
            raise ValueError(f"'policy.share_prompts: always' is not possible with this model: {reason}")
        return reason is None

    def _balanced(self, batch_size: int, epochs: float, max_steps: int | None) -> list[Indices]:
        groups = [self._rows_of(number, self._trained) for number in range(len(self._objectives))]
        return plan_balanced_batches(groups, batch_size, epochs, max_steps, self._seed)

    def _reference_of_used(self) -> Tensor:
        """Reference log-probs [N, 2], of the pairs that some step or metric uses; NaN elsewhere."""
        rows = np.unique(np.concatenate([*self.batches, self._held_out, *self._conflict_batch()]))
        device = training_device()
        if self._start is not None:
            sums = self._reference_of_start(self._start, rows)
        else:
            assert self._folder is not None
            folder, model, training = self._folder, self._model, self._training
            sums = reference_logps(
                self._inputs,
                rows,
                storage.join(self._settings.pairs_url, REFERENCE_STORE),
                load=lambda: load_reference(folder, model, training, device, self._inputs),
                key=lambda: reference_key(folder, model),
                training=training,
                device=device,
            )
        per_token = self._pairs.completion_tokens() if self._policy.average_log_probs else 1
        return torch.from_numpy(sums / per_token).float()

    def _reference_of_start(self, start: MultiHeadCausalLM, rows: Indices) -> npt.NDArray[np.float64]:
        """Summed log-probs [N, 2] under the given model with its base head, its adapter off."""
        start.to(training_device())
        if self.packed:
            start.enable_pair_packing()
        sums = np.full((len(self._pairs), 2), np.nan)
        computed = compute_logps(self._inputs, rows, BaseHeadLogps(start), self._training, start.device)
        for row, both in computed.items():
            sums[row] = both
        return sums

    def _conflict_batch(self) -> list[Indices]:
        """The one batch that the gradient cosine is measured on, if it is."""
        if not self._policy.gradient_cosine:
            return []
        return self._balanced(max(self._policy.metrics_rows, len(self._objectives)), 1, 1)

    def _make_probe(self) -> PolicyProbe:
        settings, training = self._policy, self._training
        micro_rows = training.micro_batch_size_per_device
        # The rows come objective by objective; shuffled, a few of them stand for all.
        rows = np.random.default_rng(self._seed).permutation(self._held_out)[: settings.metrics_rows]
        starts_as_base = self._extended is None and self._settings.start_url is None
        states = None if starts_as_base else self._states_of_base
        kl = HeldOutKl(self._inputs, rows, self._plan.heads, micro_rows, training.logit_chunk_size, states)
        conflict = None
        for batch in self._conflict_batch():
            loss_denominators = self.loss_denominators(batch)
            parts = shard(batch, self.row_groups, micro_rows, dist.get_rank(), dist.get_world_size())
            tensors = [self.collate(part, loss_denominators, counted) for part, counted in parts]
            conflict = GradientConflict(self._objectives, tensors, self._objective_losses)
        pairs = partial(self._held_out_metrics, rows=rows)
        turns = self._sampled_turns() if settings.sampled_turns else None
        return PolicyProbe(settings.metrics_every_steps, kl, conflict, pairs, turns, settings.max_kl)

    def _states_of_base(self, parts: Sequence[Tensors]) -> list[Tensor]:
        """The reference's states of each micro-batch's answers. It is on the device in this call only."""
        assert self._folder is not None
        device = training_device()
        reference = load_reference(
            self._folder, self._model, self._training, device, self._inputs, read_as=AnswerStates
        )
        with torch.no_grad():
            return [reference(**to_device(part, device)).cpu() for part in parts]

    def _sampled_turns(self) -> SampledTurns:
        """Turns on held-out prompts, as many on each, no longer than any held-out answer."""
        domain = self._settings.domain
        shuffled = np.random.default_rng(self._seed + 1).permutation(self._held_out)
        prompts = {tuple(self._pairs.prompts[row]): None for row in shuffled}
        return SampledTurns(
            [list(prompt) for prompt in islice(cycle(prompts), self._policy.sampled_turns)],
            self._plan.heads,
            int(self._pairs.completion_tokens()[self._held_out].max()),
            ChatFormat(self._tokenizer),
            None if domain is None else load_domain(domain).is_malformed,
            self._model.attn_implementation,
            self._seed,
            None if self._settings.step_domain is None else boundary_for(self._settings.step_domain),
        )

    def _objective_losses(self, model: nn.Module, tensors: Tensors) -> Tensor:
        """Every objective's part of the loss, [H]."""
        losses = self._losses(model, **tensors)[0] * tensors["loss_weight"]
        return losses.new_zeros(len(self._objectives)).index_add(0, tensors["objective"], losses)

    def _rows_of(self, objective: int, among: np.ndarray[Any, np.dtype[np.bool_]]) -> Indices:
        rows = np.flatnonzero((self._pairs.objective == objective) & among)
        if len(rows) == 0:
            raise ValueError(
                f"objective '{self._objectives[objective]}' has no preference pairs to train its head on"
            )
        return rows

    def build_model(self) -> nn.Module:
        policy = self._policy
        if self._start is not None:
            if self._start.adapters is not None:
                raise ValueError(
                    "a policy in memory with adapters per objective cannot be trained on: its reference "
                    "would be what they are added to; train from the folder of the SFT model"
                )
            return self._start
        assert self._folder is not None
        if self._settings.start_url is not None:
            return self._continued(self._settings.start_url)
        dtype, attention = getattr(torch, self._model.dtype), self._model.attn_implementation
        if self._extended is not None:
            model = MultiHeadCausalLM.from_pretrained(self._extended, dtype, attention)
            model.add_heads(self._plan.heads, policy.head_noise, self._seed)
        else:
            model = MultiHeadCausalLM.from_base(
                self._folder,
                self._plan.heads,
                noise=policy.head_noise,
                seed=self._seed,
                head_kind=policy.head_kind,
                rank=policy.head_rank,
                dtype=dtype,
                attn_implementation=attention,
                keep_base_head=True,  # decoding at another strength than 1 needs it
                adapters=policy.adapters,
            )
        if self.packed:
            model.enable_pair_packing()
        if policy.lora is not None:
            model.add_lora(policy.lora)
        return model

    def _continued(self, start_url: str) -> MultiHeadCausalLM:
        """The policy at `start_url`, to be trained on; its reference is still the SFT model. ValueError if it
        has other heads, or was trained in another way (an adapter, whose base is not trained, or in full)."""
        model = MultiHeadCausalLM.from_pretrained(
            model_folder(start_url),
            dtype=getattr(torch, self._model.dtype),
            attn_implementation=self._model.attn_implementation,
        )
        if model.objectives != self._plan.heads:
            raise ValueError(
                f"the policy at '{start_url}' has the heads {', '.join(model.objectives)}, and this training "
                f"makes {', '.join(self._plan.heads)}"
            )
        if model.has_lora != (self._policy.lora is not None):
            raise ValueError(
                f"the policy at '{start_url}' was trained {'with' if model.has_lora else 'without'} LoRA, "
                "and 'policy.lora' says otherwise"
            )
        if self.packed:
            model.enable_pair_packing()
        return model

    def enable_gradient_checkpointing(self, model: nn.Module) -> None:
        cast(MultiHeadCausalLM, model).gradient_checkpointing_enable()

    def prepare(self, infer: Inference, rank: int, workers: int, progress: PreparationProgress) -> None:
        if self.probe is not None:
            self.probe.prepare(infer)

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        policy, decay = cast(MultiHeadCausalLM, model), self._training.weight_decay
        rate = self._training.learning_rate
        groups = (
            ("backbone", policy.backbone_parameters(), rate),
            ("adapters", policy.adapter_parameters(), self._policy.adapters.learning_rate or rate),
            ("heads", policy.head_parameters(), self._policy.head_learning_rate),
        )
        return [
            group
            for name, parameters, highest in groups
            if (trained := list(parameters))
            for group in parameter_group(name, trained, highest, decay)
        ]

    def loss_denominators(self, batch: Indices) -> dict[str, float]:
        """Sum of the pairs' weights per objective."""
        objective, weights = self._pairs.objective[batch], self._pairs.weights[batch]
        sums = np.bincount(objective, weights, minlength=len(self._objectives))
        return dict(zip(self._objectives, sums.tolist(), strict=True))

    def collate(self, groups: Indices, loss_denominators: Mapping[str, float], counted: bool) -> Tensors:
        # Pair n of objective i weighs alpha_i w_n / (sum of w over the objective's pairs in the global
        # batch), so the losses [R] of all micro-batches and workers add up to L. Denominators of the
        # micro-batch would give an objective that has few pairs there the full alpha_i each time. One that is
        # absent from the batch has sum 0; no row divides by it, and 1 keeps 0 / 0 away.
        sums = torch.tensor([loss_denominators[name] or 1.0 for name in self._objectives])
        objective = torch.from_numpy(self._pairs.objective[groups])
        weight = torch.from_numpy(self._pairs.weights[groups]).float()
        present = torch.full((len(groups),), float(counted))
        if self._balances is None:
            head = self._first_head + self._plan.head_of[objective]
            margin = torch.from_numpy(self._margins[groups]).float()
            under = {"head": head, "beta": self._plan.beta[objective], "margin": margin}
        else:
            balance = self._balances[groups]
            margin = (balance * self._gaps[groups]).sum(1)
            under = {"balance": balance, "beta": balance @ self._plan.beta, "margin": margin}
        return {
            **self._inputs.tensors(groups),
            **under,
            "reference": self._reference[groups],
            "objective": objective,
            "weight": weight,
            "chosen_tokens": self._chosen_tokens[groups],
            "loss_weight": (self._plan.alpha / sums)[objective] * weight * present,
            "present": present,
        }

    def loss(self, model: nn.Module, **tensors: Tensor) -> LossOutput:
        losses, sums = self._losses(model, **tensors)
        return (losses * tensors["loss_weight"]).sum(), losses.detach(), sums.flatten()

    def _losses(self, model: nn.Module, **tensors: Tensor) -> tuple[Tensor, Tensor]:
        """DPO loss [R] of every pair under its own head (or mixture of heads), and sums [H, metrics] over
        counted pairs."""
        objective, reference = tensors["objective"], tensors["reference"]
        policy, chunk_size = cast(MultiHeadCausalLM, model), self._training.logit_chunk_size
        inputs, average = pair_inputs(tensors), self._policy.average_log_probs
        if "balance" in tensors:
            weights = tensors["balance"].repeat(2, 1)
            logps = policy.mixture_logps(**inputs, weights=weights, chunk_size=chunk_size, average=average)
        else:
            heads = tensors["head"].repeat(2)
            logps = policy.completion_logps(
                **inputs, head_index=heads, chunk_size=chunk_size, average=average
            )
        chosen, rejected = pair_logps(logps)
        beta, weight = tensors["beta"], tensors["weight"]
        losses = dpo_loss(
            chosen,
            rejected,
            reference[:, 0],
            reference[:, 1],
            beta,
            self._policy.loss,
            self._policy.label_smoothing,
            tensors["margin"],
            self._policy.chosen_penalty,
        )
        if self._policy.chosen_anchor > 0:
            losses = losses + self._policy.chosen_anchor * sft_loss(chosen, tensors["chosen_tokens"])
        with torch.no_grad():
            gain = (chosen - reference[:, 0]) - (rejected - reference[:, 1])
            right, count = (gain > 0).float(), torch.ones_like(gain)
            metrics = (count, weight, weight * losses, right, beta * gain, chosen, rejected)
            counted = torch.stack(metrics, dim=1) * tensors["present"][:, None]
            sums = counted.new_zeros(len(self._objectives), len(_SUMS)).index_add(0, objective, counted)
        return losses, sums

    def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for name in self._objectives:
            if sums[f"{name}/count"] > 0:
                metrics[f"{name}/loss"] = sums[f"{name}/loss"] / sums[f"{name}/weight"]
                metrics |= {f"{name}/{f}": sums[f"{name}/{f}"] / sums[f"{name}/count"] for f in _SUMS[3:]}
        return metrics

    def row_names(self, groups: Indices) -> list[str]:
        return [
            f"{self._objectives[self._pairs.objective[group]]} pair {self._pairs.ids[group]}"
            for group in groups
        ]

    def finish(self, infer: Inference, rank: int, workers: int) -> dict[str, float]:
        """The same metrics on the held-out pairs, and how many pairs there were of each kind."""
        metrics = {"pairs": float(len(self._pairs)), "pairs_cut": float(self._pairs.cut)}
        metrics["prompts_shared"] = float(self.packed)
        metrics["held_out/pairs"] = float(len(self._held_out))
        self._metrics = metrics | self._held_out_metrics(infer, self._held_out)
        return self._metrics

    def _held_out_metrics(self, infer: Inference, rows: Indices) -> dict[str, float]:
        """The training metrics on held-out rows, prefixed `held_out/`; every worker takes part."""
        nothing = dict.fromkeys(self._objectives, 1.0)
        sums = torch.zeros(len(self.metric_names), dtype=torch.float64, device=training_device())
        micro_rows = self._training.micro_batch_size_per_device
        for part, counted in shard(rows, self.row_groups, micro_rows, dist.get_rank(), dist.get_world_size()):
            sums += infer(self._held_out_sums, self.collate(part, nothing, counted)).double()
        dist.all_reduce(sums)
        named = self.summarise(dict(zip(self.metric_names, sums.tolist(), strict=True)))
        return {f"held_out/{name}": value for name, value in named.items()}

    def _held_out_sums(self, model: nn.Module, **tensors: Tensor) -> Tensor:
        return self._losses(model, **tensors)[1].flatten()

    def save(self, model: nn.Module, state_dict: Mapping[str, Tensor], folder: Path) -> None:
        policy = cast(MultiHeadCausalLM, model)
        backbone = keeps_backbone(self._settings.model_url) if policy.has_lora else None
        if self._extended is not None and read_metadata(self._extended, policy.kind)["saved_backbone"]:
            backbone = True
        policy.save_pretrained(
            folder, self._tokenizer, self._metrics, state_dict=state_dict, with_backbone=backbone
        )


def check_extendable(folder: Path, base: Path, policy: PolicyConfig, model: ModelConfig) -> None:
    """ValueError unless new heads can be trained on the policy in `folder` against the reference in `base`:
    it was made from it, has its tokenizer, and is stored as it will be trained."""
    metadata = read_metadata(folder, MultiHeadCausalLM.kind)
    made_from = "give the base (the SFT model) that the policy was made from"
    if metadata["tokenizer"]:
        difference = tokenizer_difference(load_tokenizer(folder), load_tokenizer(base))
        if difference is not None:
            raise ValueError(
                f"the policy in '{folder}' and the base in '{base}' differ in the {difference} of their "
                f"tokenizers: {made_from}"
            )
    if not metadata["keep_base_head"]:
        raise ValueError(
            f"the policy in '{folder}' was saved without its base head, which a new head starts from: add it "
            "with `MultiHeadCausalLM.set_base_head(SFT_MODEL)` and save the policy again"
        )
    kind, rank = metadata["head_kind"], metadata["rank"]
    if policy.head_kind != kind or (kind == "low_rank" and policy.head_rank != rank):
        needed = "{head_kind: full}" if kind == "full" else f"{{head_kind: low_rank, head_rank: {rank}}}"
        raise ValueError(f"the heads of '{folder}' are of another kind: set 'policy' to {needed}")
    with safe_open(str(folder / HEADS_FILE), framework="pt") as saved:
        base_head = saved.get_tensor("base_head.weight")
    stored = str(base_head.dtype).removeprefix("torch.")
    if stored != model.dtype:
        raise ValueError(
            f"the policy in '{folder}' is stored in {stored}, and 'model.dtype' is {model.dtype}: in another "
            f"number format its other heads would not stay as they are; set 'model.dtype' to {stored}"
        )
    output = cast(Tensor, split_causal_lm(load_causal_lm(base))[1].weight)
    if output.shape != base_head.shape or not torch.equal(output.to(base_head.dtype), base_head):
        raise ValueError(
            f"the policy in '{folder}' was made from another model than the base in '{base}' (the output "
            f"layers differ), which would be the reference: {made_from}"
        )
