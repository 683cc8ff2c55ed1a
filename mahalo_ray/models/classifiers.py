"""Third-party reward models as scorers: transformers classifiers.

A sequence classifier judges whole conversations: every prefix of steps is one sequence. A token classifier in
TRL's PRM format reads all steps in one forward, at the last token of the separator that follows each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mahalo_ray.data.records import Message
from mahalo_ray.models.backbone import check_tokenizer_of, load_config, load_tokenizer, naming_errors
from mahalo_ray.models.folder import (
    METADATA_FILE,
    check_hub_id,
    check_weight_files,
    check_weights_finite,
)
from mahalo_ray.models.reward import ProcessRewardModel
from mahalo_ray.models.reward_heads import OutputKind
from mahalo_ray.models.scoring import (
    AnswerScorer,
    Messages,
    ObjectiveCalibration,
    StepScorer,
    TokenTrace,
    TraceScorer,
    check_steps,
)


class _Classifier(nn.Module):
    """A transformers classifier that scores one objective."""

    def __init__(
        self, model: PreTrainedModel, objective: str, output_kind: OutputKind, positive_label: int
    ) -> None:
        super().__init__()
        self.model = model.eval()
        self.objectives: tuple[str, ...] = (objective,)
        self.output_kinds: dict[str, OutputKind] = {objective: output_kind}
        self.positive_label = positive_label
        self.calibration: dict[str, ObjectiveCalibration] = {}

    @property
    def max_length(self) -> int:
        """The longest text the model reads, in tokens."""
        for module in self.model.modules():
            positions = getattr(module, "position_embeddings", None)
            if isinstance(positions, nn.Embedding) and positions.padding_idx is not None:
                # RoBERTa's family starts counting positions behind the padding id: 514 positions hold 512
                # tokens.
                return positions.num_embeddings - positions.padding_idx - 1
        return int(self.model.config.get_text_config().max_position_embeddings)


class SequenceClassifierScorer(_Classifier, AnswerScorer):
    """A transformers sequence classifier: one label is a Bradley-Terry score, two are a probability.

    The score of step t is what the classifier says of the prompt answered by steps 1..t, joined by
    `step_separator`. Conversations go through the tokenizer's chat template; without one, prompt and answer
    are given as a text pair, as encoder classifiers expect.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        objective: str,
        positive_label: int = 1,
        step_separator: str = "\n\n",
    ) -> None:
        if model.config.num_labels not in (1, 2):
            raise ValueError(
                f"{type(model).__name__} has {model.config.num_labels} labels: a scorer has 1 "
                "(Bradley-Terry) or 2 (no, yes)"
            )
        kind: OutputKind = "preference" if model.config.num_labels == 1 else "probability"
        super().__init__(model, objective, kind, positive_label)
        self.tokenizer = tokenizer
        self.step_separator = step_separator

    @torch.no_grad()
    def score_batch(
        self, traces: Sequence[tuple[Messages, Sequence[str]]], batch_size: int = 16
    ) -> list[dict[str, list[float]]]:
        sequences: list[Mapping[str, Any]] = []
        for prompt, steps in traces:
            check_steps(steps)
            messages = [Message.model_validate(message) for message in prompt]
            for count in range(1, len(steps) + 1):
                sequences.append(self.encode(messages, self.step_separator.join(steps[:count])))
        scores = iter(self._scores(sequences, batch_size))
        return [{self.objectives[0]: [next(scores) for _ in steps]} for _, steps in traces]

    def check_length(self, prompt: Messages, steps: Sequence[str]) -> None:
        messages = [Message.model_validate(message) for message in prompt]
        self._check_tokens(self.length(messages, self.step_separator.join(steps)))

    def _check_tokens(self, tokens: int) -> None:
        if tokens > self.max_length:
            raise ValueError(f"a conversation has {tokens} tokens, the model reads {self.max_length}")

    def length(self, prompt: Sequence[Message], answer: str) -> int:
        return len(self.encode(prompt, answer)["input_ids"])

    def encode(self, prompt: Sequence[Message], answer: str) -> Mapping[str, Any]:
        """The tokenizer's encoding of prompt and answer, however long."""
        if self.tokenizer.chat_template:
            chat = [message.model_dump() for message in (*prompt, Message(role="assistant", content=answer))]
            text = self.tokenizer.apply_chat_template(chat, tokenize=False)
            # The template wrote the special tokens; the tokenizer must not add them again.
            return self.tokenizer(text, add_special_tokens=False)
        return self.tokenizer("\n".join(message.content for message in prompt), answer)

    def _scores(self, sequences: Sequence[Mapping[str, Any]], batch_size: int) -> list[float]:
        self._check_tokens(max((len(encoded["input_ids"]) for encoded in sequences), default=0))
        # A causal classifier finds the last token by looking for its own padding id, which need not be the
        # tokenizer's; without one, rows go singly.
        pad_id = self.model.config.pad_token_id
        if pad_id is None or not 0 <= pad_id < self.model.get_input_embeddings().num_embeddings:
            batch_size, pad_id = 1, 0
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]["input_ids"]))
        scores: dict[int, float] = {}
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            rows = [sequences[number] for number in chosen]
            batch = {
                key: pad_sequence(
                    [torch.tensor(row[key]) for row in rows],
                    batch_first=True,
                    padding_value=pad_id if key == "input_ids" else 0,
                ).to(self.model.device)
                for key in rows[0]
            }
            logits = self.model(**batch).logits.float()
            values = logits[:, 0] if logits.shape[1] == 1 else logits.softmax(-1)[:, self.positive_label]
            scores.update(zip(chosen, values.tolist(), strict=True))
        return [scores[number] for number in range(len(sequences))]


class PlainStepEncoder:
    """TRL's PRM format: plain prompt text, every step followed by the separator's own tokens.

    Parts are tokenised apart, as TRL does, so that the separator is always the same tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, separator: str) -> None:
        self.tokenizer = tokenizer
        self.separator = self._ids(separator)
        if not self.separator:
            raise ValueError("a token classifier reads its scores at the separator: it cannot be empty")

    def encode(self, prompt: Messages, steps: Sequence[str]) -> TokenTrace:
        """Token ids of prompt and steps. The prompt is one user message: the format knows nothing else."""
        check_steps(steps)
        messages = [Message.model_validate(message) for message in prompt]
        if len(messages) != 1 or messages[0].role != "user":
            raise ValueError("a token classifier in TRL's format takes one user message as its prompt")
        bos = self.tokenizer.bos_token_id
        ids = [*([] if bos is None else [bos]), *self._ids(messages[0].content)]
        starts, ends = [], []
        for step in steps:
            starts.append(len(ids))
            ids += self._ids(step) + self.separator
            ends.append(len(ids) - 1)
        return TokenTrace(ids, starts, ends)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


class TokenClassifierScorer(_Classifier, TraceScorer):
    """A transformers token classifier with two labels, as TRL's PRM trainer makes them: P(yes) per step."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        objective: str,
        positive_label: int = 1,
        step_separator: str = "\n",
    ) -> None:
        if model.config.num_labels != 2:
            raise ValueError(
                f"{type(model).__name__} has {model.config.num_labels} labels: a step scorer has 2"
            )
        super().__init__(model, objective, "probability", positive_label)
        self._encoder = PlainStepEncoder(tokenizer, step_separator)

    @property
    def encoder(self) -> PlainStepEncoder:
        return self._encoder

    def final_scores(self, input_ids: Tensor, attention_mask: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits.float()
        # Steps that do not exist have end -1: they read token 0, and their scores are cut off afterwards.
        last_token = ends.clamp(min=0)[..., None].expand(-1, -1, logits.shape[-1])
        return logits.gather(1, last_token).softmax(-1)[..., self.positive_label, None]


def is_own_model(source: str | Path) -> bool:
    """Whether a folder holds a reward model saved by mahalo_ray, which knows its objectives."""
    return (Path(source) / METADATA_FILE).is_file()


def _check_device(device: torch.device | str | None) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"the device '{device}' cannot be used here: {str(error).splitlines()[0]}"
        ) from error


def load_scorer(
    source: str | Path,
    objective: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    step_separator: str | None = None,
) -> StepScorer:
    """A scorer from a folder or hub id: a process reward model, or a third-party sequence or token
    classifier.

    `objective` names what a classifier scores and is required for one; a process reward model knows its
    objectives. `step_separator` None takes the usual one: a blank line for sequence classifiers, a line break
    for token classifiers. ValueError, naming the source, for other architectures, an objective or separator
    that is missing or not asked for, a device that is not there, and damaged or non-finite weights.

    >>> from mahalo_ray import load_scorer
    >>> scorer = load_scorer("classifier", objective="helpful")
    >>> scores = scorer.score([{"role": "user", "content": "What is 2 + 3?"}], ["Two and three.", "So: 5"])
    >>> len(scores["helpful"])
    2
    """
    _check_device(device)
    if is_own_model(source):
        if objective is not None or step_separator is not None:
            raise ValueError(f"{source} knows its own objectives and step separator: do not give them")
        return ProcessRewardModel.from_pretrained(source, dtype, device=device).eval()
    if objective is None:
        raise ValueError(f"{source} is not a mahalo_ray model: say which objective it scores")
    if Path(source).is_dir():
        check_weight_files(Path(source))
    else:
        check_hub_id(source)
    architecture = (load_config(source).architectures or ["no architecture"])[0]
    chosen = "auto" if dtype is None else dtype
    scorer: SequenceClassifierScorer | TokenClassifierScorer
    if architecture.endswith("ForSequenceClassification"):
        with naming_errors("classifier", source):
            model = AutoModelForSequenceClassification.from_pretrained(
                str(source), dtype=chosen, trust_remote_code=False
            )
        separator = "\n\n" if step_separator is None else step_separator
        scorer = SequenceClassifierScorer(model, load_tokenizer(source), objective, step_separator=separator)
    elif architecture.endswith("ForTokenClassification"):
        with naming_errors("classifier", source):
            model = AutoModelForTokenClassification.from_pretrained(
                str(source), dtype=chosen, trust_remote_code=False
            )
        separator = "\n" if step_separator is None else step_separator
        scorer = TokenClassifierScorer(model, load_tokenizer(source), objective, step_separator=separator)
    else:
        raise ValueError(
            f"{source} is a {architecture}: a scorer is a mahalo_ray reward model, a sequence classifier or "
            "a token classifier"
        )
    check_weights_finite(scorer.model, source)
    check_tokenizer_of(Path(source), scorer.model)
    return scorer if device is None else scorer.to(device)
