"""Tiny policies and reward models over one real tokenizer, for tests of guided decoding."""

from __future__ import annotations

import functools

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, Qwen2Config

from mahalo_ray.data.records import Message
from mahalo_ray.data.templating import ChatFormat
from mahalo_ray.decoding.guidance import StepCandidate
from mahalo_ray.decoding.stopping import StopReason
from mahalo_ray.domains.sft_text import train_tokenizer
from mahalo_ray.models.reward import ProcessRewardModel
from mahalo_ray.models.scoring import StepEncoder

TEXT = [
    "So we add 2 and 3.\n\nThat gives 5.\n\nThe answer is \\boxed{5}.",
    "Dr. Smith said e.g. this. Is it? Yes!",
]
ASK = [{"role": "user", "content": "What is 2 + 3?"}]


@functools.cache
def tokenizer():
    return train_tokenizer(TEXT * 3, 300)


@functools.cache
def model(seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer()),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=tokenizer().eos_token_id,
    )
    return AutoModelForCausalLM.from_config(config).eval()


@functools.cache
def reward(separator: str | None = "\n\n") -> ProcessRewardModel:
    return ProcessRewardModel.from_base(
        model(1),
        {"accuracy": "value", "engagement": "probability"},
        tuning="frozen",
        tokenizer=tokenizer(),
        step_separator=separator,
    )


def message(fields: dict[str, str]) -> Message:
    return Message.model_validate(fields)


def as_read(candidate: StepCandidate, so_far: int, most: int, separator: str | None = "\n\n") -> list[int]:
    """What the reward model reads of a candidate after `so_far` tokens of an answer of at most `most`: closed
    if the answer ends with it, as the policy wrote it if more is to come or the step has its own boundary."""
    goes_on = candidate.reason is StopReason.LENGTH and so_far + len(candidate.token_ids) < most
    if goes_on or candidate.reason is StopReason.STEP:
        return candidate.token_ids
    if separator is None:
        end = tokenizer().eos_token_id
        return candidate.token_ids + ([] if candidate.token_ids[-1] == end else [end])
    text = tokenizer().decode(candidate.token_ids, skip_special_tokens=True)
    return StepEncoder(tokenizer(), separator).step_ids(text)


@functools.cache
def memorised(text: str) -> PreTrainedModel:
    """A tiny model trained to answer ASK with one text, to meet boundaries in real sampling."""
    return memorised_by(tokenizer(), text)


def memorised_by(own: PreTrainedTokenizerBase, text: str) -> PreTrainedModel:
    """The same for another tokenizer of at most as many tokens."""
    torch.manual_seed(0)
    chat = ChatFormat(own)
    prompt, reply = chat.prompt_ids([message(ASK[0])]), chat.encode_reply(text)
    taught = AutoModelForCausalLM.from_config(model().config)
    ids = torch.tensor([prompt + reply])
    labels = ids.clone()
    labels[:, : len(prompt)] = -100
    optimiser = torch.optim.Adam(taught.parameters(), lr=1e-2)
    for _ in range(400):
        optimiser.zero_grad()
        loss = taught(input_ids=ids, labels=labels).loss
        loss.backward()
        optimiser.step()
        if loss < 1e-3:  # far from any doubt about the next token
            break
    return taught.eval()
