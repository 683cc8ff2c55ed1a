"""The process reward model: one causal backbone, one score per objective and step, one forward per trace
(MAHALO, arXiv 2510.01167, section 3.1).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mahalo_ray.config import LoraConfig, Tuning
from mahalo_ray.logprobs import DEFAULT_CHUNK_SIZE
from mahalo_ray.models import lora
from mahalo_ray.models.backbone import (
    BackboneModel,
    SavedModel,
    load_causal_lm,
    load_tokenizer,
    prefixed,
    row_independent_context,
    run_backbone,
    split_causal_lm,
)
from mahalo_ray.models.folder import Card
from mahalo_ray.models.reference import REFERENCE_FOLDER, FrozenReference
from mahalo_ray.models.reward_heads import (
    HEAD_INPUTS,
    OutputKind,
    ScoreHeads,
    check_inputs,
    feature_size,
    step_features,
    step_tokens,
)
from mahalo_ray.models.scoring import StepEncoder, TraceScorer
from mahalo_ray.objectives import unknown_name

TUNINGS: tuple[Tuning, ...] = get_args(Tuning)


class ProcessRewardModel(BackboneModel, TraceScorer):
    """Scores every step of a trace for every objective in one forward pass (MAHALO, arXiv 2510.01167, section
    3.1).

    `objectives` maps a name to what its raw score is: a `value` (fitted by squared error), the logit of a
    `probability` (cross entropy; its score is the sigmoid) or a `preference` (Bradley-Terry). The heads read,
    per step, the chosen `inputs`: the state of the last token, the mean state, and mean, minimum and sum of
    the token log-probs under a frozen reference. The pieces (`hidden_states`, `reference_hidden_states`,
    `reference_logps`, `step_features`, `heads`) can be called one by one by a decoder that keeps caches of
    its own.

    Three ways to call it: `score(prompt, steps)` takes texts and gives {objective: [score per step]};
    `score_traces` takes token ids; `step_scores` (and `forward`, which is the same) takes padded tensors and
    gives raw scores [B, S, H] with gradients, for training.

    >>> from mahalo_ray import ProcessRewardModel
    >>> reward = ProcessRewardModel.from_base("model", {"accuracy": "value", "engagement": "probability"})
    >>> prompt = [{"role": "user", "content": "What is 2 + 3?"}]
    >>> scores = reward.score(prompt, ["Two and three.", "That makes 5."])
    >>> [(name, len(values)) for name, values in scores.items()]
    [('accuracy', 2), ('engagement', 2)]
    >>> reward.save_pretrained("reward")
    >>> again = ProcessRewardModel.from_pretrained("reward").score(prompt, ["Two and three."])
    >>> abs(again["accuracy"][0] - scores["accuracy"][0]) < 1e-5
    True
    """

    kind = "process_reward_model"

    def __init__(
        self,
        backbone: nn.Module,
        objectives: Mapping[str, OutputKind],
        *,
        inputs: Sequence[str],
        head_hidden_size: int,
        tuning: Tuning,
        reference: FrozenReference | None,
        tokenizer: PreTrainedTokenizerBase | None,
        step_separator: str | None,
        seed: int = 42,
        base_name: str | None = None,
    ) -> None:
        """With fresh score heads; `from_base` builds the parts."""
        super().__init__()
        if tuning not in TUNINGS:
            raise ValueError(unknown_name("kind of backbone tuning", tuning, TUNINGS))
        self.inputs = check_inputs(inputs)
        if ("reference_logps" in self.inputs) != (reference is not None):
            raise ValueError("a reference goes with the head input 'reference_logps', and only with it")
        self.objectives = tuple(objectives)
        self.output_kinds: dict[str, OutputKind] = dict(objectives)
        self.head_hidden_size = head_hidden_size
        self.tuning: Tuning = tuning
        self.tokenizer = tokenizer
        self.step_separator = step_separator
        self.base_name = base_name
        self.calibration = {}
        self._encoder: StepEncoder | None = None
        self.backbone = backbone
        if tuning == "frozen":
            self.backbone.requires_grad_(False)
        self.reference = reference
        features = feature_size(self.inputs, self.config.get_text_config().hidden_size)
        self.heads = ScoreHeads(self.output_kinds, features, head_hidden_size, seed)

    @classmethod
    def from_base(
        cls,
        base: str | Path | PreTrainedModel,
        objectives: Mapping[str, OutputKind],
        inputs: Sequence[str] = HEAD_INPUTS,
        head_hidden_size: int = 128,
        tuning: Tuning = "full",
        lora_settings: LoraConfig | None = None,
        reference: str | Path | PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        step_separator: str | None = "\n\n",
        seed: int = 42,
        dtype: torch.dtype | None = None,
        attn_implementation: str | None = None,
    ) -> ProcessRewardModel:
        """A reward model on a causal LM (folder, hub id or object, whose parameters are then used, not
        copied).

        `reference` is the causal LM of the head input `reference_logps`; None takes the base as it is now, at
        no cost in memory unless the backbone is tuned in full.
        """
        if (lora_settings is not None) and tuning != "lora":
            raise ValueError(f"lora_settings were given, but the backbone is '{tuning}'")
        model = load_causal_lm(base, dtype, attn_implementation)
        lora.check_no_adapter(model)
        backbone = split_causal_lm(model)[0]
        frozen = None
        if "reference_logps" in check_inputs(inputs):
            frozen = FrozenReference.for_reward_model(
                model, base, reference, tuning == "full", dtype, attn_implementation
            )
        elif reference is not None:
            raise ValueError("a reference was given, but 'reference_logps' is not among the head inputs")
        if tuning == "lora":
            backbone = lora.with_lora(backbone, lora_settings or LoraConfig())
        if tokenizer is None and not isinstance(base, PreTrainedModel):
            tokenizer = load_tokenizer(base)
        device = next(model.parameters()).device
        reward = cls(
            backbone,
            objectives,
            inputs=inputs,
            head_hidden_size=head_hidden_size,
            tuning=tuning,
            reference=frozen,
            tokenizer=tokenizer,
            step_separator=step_separator,
            seed=seed,
            base_name=model.config._name_or_path or None,
        )
        reward.heads.to(device)
        return reward

    # -- one forward -----------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> ProcessRewardModel:
        """Frozen parts stay in evaluation mode: their dropout must not disturb the features."""
        super().train(mode)
        if self.tuning == "frozen":
            self.backbone.eval()
        if self.reference is not None:
            self.reference.eval()
        return self

    @property
    def reference_is_backbone(self) -> bool:
        """Whether the reference reads the backbone's states, so that it needs no second forward."""
        return self.reference is not None and self.reference.backbone is None and self.tuning == "frozen"

    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """The backbone's final states [B, T, D]; kwargs (position_ids, kv_cache...) go to it."""
        with torch.no_grad() if self.tuning == "frozen" else nullcontext():
            return super().hidden_states(input_ids, attention_mask, **kwargs)

    @torch.no_grad()
    def reference_hidden_states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        hidden: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The reference's final states [B, T, D']: `hidden` itself where `reference_is_backbone`, else its
        own.
        """
        assert self.reference is not None
        if self.reference_is_backbone and hidden is not None:
            return hidden
        if self.reference.backbone is not None:
            return run_backbone(self.reference.backbone, input_ids, attention_mask, kwargs)
        # A shared backbone is the reference in evaluation mode and without its adapter.
        training = self.backbone.training
        self.backbone.eval()
        try:
            with lora.adapter_disabled(self.backbone) if self.tuning == "lora" else nullcontext():
                return run_backbone(self.backbone, input_ids, attention_mask, kwargs)
        finally:
            self.backbone.train(training)

    @torch.no_grad()
    def reference_logps(
        self, reference_hidden: Tensor, labels: Tensor, chunk_size: int = DEFAULT_CHUNK_SIZE
    ) -> Tensor:
        """log p(label) [N] under the reference, from its states [N, D'] one position earlier."""
        assert self.reference is not None
        return self.reference.head(reference_hidden, labels, chunk_size)

    def step_features(
        self, hidden: Tensor, token_logps: Tensor | None, starts: Tensor, ends: Tensor
    ) -> Tensor:
        """Head inputs [B, S, F]; see `reward_heads.step_features`. token_logps [B, T]: of token t itself."""
        return step_features(self.inputs, hidden, token_logps, starts, ends)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        step_starts: Tensor,
        step_ends: Tensor,
        chunk_size: int = DEFAULT_CHUNK_SIZE,
    ) -> Tensor:
        """Raw scores [B, S, H], fp32, in the order of `objectives`: `step_scores` under the name that engines
        call."""
        return self.step_scores(input_ids, attention_mask, step_starts, step_ends, chunk_size)

    def features(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        step_starts: Tensor,
        step_ends: Tensor,
        chunk_size: int = DEFAULT_CHUNK_SIZE,
    ) -> Tensor:
        """Head inputs [B, S, F] of all steps. Of a frozen backbone they can be computed once and kept."""
        hidden, logps = self._read(input_ids, attention_mask, step_starts, step_ends, chunk_size)
        return self.step_features(hidden, logps, step_starts, step_ends)

    def _read(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        step_starts: Tensor,
        step_ends: Tensor,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor | None]:
        """The states [B, T, D], and the reference's log-probs [B, T] of the steps' tokens if heads read
        those."""
        hidden = self.hidden_states(input_ids, attention_mask)
        logps = None
        if self.reference is not None:
            states = self.reference_hidden_states(input_ids, attention_mask, hidden)
            in_a_step = step_tokens(step_starts, step_ends, input_ids.shape[1]).any(dim=1)
            in_a_step[:, 0] = False  # nothing predicts the first token
            rows, positions = in_a_step.nonzero(as_tuple=True)
            # Only the steps' tokens go through the reference's vocabulary; the state one position earlier
            # predicts each. Prompt and padding keep 0, which no feature reads.
            logps = torch.zeros(input_ids.shape, device=input_ids.device)
            logps[rows, positions] = self.reference_logps(
                states[rows, positions - 1], input_ids[rows, positions], chunk_size
            )
        return hidden, logps

    def step_scores(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        step_starts: Tensor,
        step_ends: Tensor,
        chunk_size: int = DEFAULT_CHUNK_SIZE,
    ) -> Tensor:
        """Raw scores [B, S, H], fp32, in the order of `objectives`, one forward.

        input_ids, attention_mask [B, T], right-padded; step_starts, step_ends [B, S]: first and last token of
        every step, ends -1 where there is no step (its scores mean nothing). Raw: values, logits or
        Bradley-Terry scores; `activate` turns them into the scores that `score` gives. A `preference`
        objective learned from whole answers: its score of a step is that of the answer from its first step to
        this one. `chunk_size` tokens at a time go through the reference's vocabulary.
        """
        hidden, logps = self._read(input_ids, attention_mask, step_starts, step_ends, chunk_size)
        features = self.step_features(hidden, logps, step_starts, step_ends)
        answers = None
        if self.heads.reads_answers and step_ends.shape[1] > 1:
            begins = step_starts[:, :1].expand_as(step_starts)
            answers = self.step_features(hidden, logps, begins, step_ends)
        return self.heads(features, answers)

    def activate(self, raw: Tensor) -> Tensor:
        """Scores [..., H] from raw ones: the sigmoid for probabilities, the rest as it is."""
        columns = [
            column.sigmoid() if self.output_kinds[name] == "probability" else column
            for name, column in zip(self.objectives, raw.unbind(-1), strict=True)
        ]
        return torch.stack(columns, dim=-1)

    @property
    def encoder(self) -> StepEncoder:
        """How prompts and steps become token ids; ValueError for a model without a tokenizer."""
        if self._encoder is None:
            if self.tokenizer is None:
                raise ValueError(
                    "this reward model has no tokenizer: give from_base one, or use score_traces"
                )
            self._encoder = StepEncoder(self.tokenizer, self.step_separator)
        return self._encoder

    @property
    def max_length(self) -> int:
        """The backbone's context, in tokens, as far as a row's scores do not depend on its neighbours."""
        configured = self.config.get_text_config().max_position_embeddings
        return min(configured, row_independent_context(self.config))

    def final_scores(self, input_ids: Tensor, attention_mask: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
        """`activate(step_scores(...))`, [B, S, H]."""
        return self.activate(self.step_scores(input_ids, attention_mask, starts, ends))

    # -- parameters and folder -------------------------------------------------------------------------------

    def head_parameters(self) -> Iterator[nn.Parameter]:
        """The score heads' parameters."""
        return self.heads.parameters()

    def _backbone_is_as_loaded(self) -> bool:
        return self.tuning != "full"

    def _metadata(self) -> dict[str, Any]:
        return {
            "objectives": self.output_kinds,
            "inputs": list(self.inputs),
            "head_hidden_size": self.head_hidden_size,
            "tuning": self.tuning,
            "step_separator": self.step_separator,
            "reference": None if self.reference is None else self.reference.metadata(self.backbone),
            "calibration": self.calibration,
        }

    def _card(self) -> Card:
        return Card(
            "Process reward model",
            "A process reward model: one score per step and objective, in one forward pass. Load it with "
            "`mahalo_ray.ProcessRewardModel.from_pretrained` and call `.score(prompt, steps)`.",
            {name: f"{kind}{self._calibration_note(name)}" for name, kind in self.output_kinds.items()},
        )

    def _calibration_note(self, objective: str) -> str:
        if objective not in self.calibration:
            return ", not calibrated"
        statistics = self.calibration[objective]
        return (
            f", mean {statistics['mean']:.3g}, std {statistics['std']:.3g} on {statistics['count']} held-out "
            "steps"
        )

    def _save_extras(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        if self.reference is not None and self.reference.backbone is not None:
            self.reference.backbone.save_pretrained(
                str(folder / REFERENCE_FOLDER), state_dict=prefixed(state, "reference.backbone.")
            )

    @classmethod
    def _from_saved(cls, saved: SavedModel) -> ProcessRewardModel:
        metadata = saved.metadata
        reward = cls(
            saved.backbone,
            metadata["objectives"],
            inputs=metadata["inputs"],
            head_hidden_size=metadata["head_hidden_size"],
            tuning=metadata["tuning"],
            reference=FrozenReference.from_saved(saved),
            tokenizer=load_tokenizer(saved.folder) if metadata["tokenizer"] else None,
            step_separator=metadata["step_separator"],
            base_name=saved.base_name,
        )
        reward.calibration = metadata["calibration"]
        return reward
