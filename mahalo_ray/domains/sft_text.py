"""The SFT text of generated domains: a tokenizer made for it, and dialogues as token ids."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mahalo_ray.data.records import Dialogue, Message, Turn
from mahalo_ray.data.templating import ChatFormat

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
NUMBERS = 100


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with the miniature's chat template and whole numbers as tokens.

    Numbers are added tokens, so that they stay whole under any pre-tokenizer: transformers' AutoTokenizer
    loads a tokenizer beside a Qwen2 config with Qwen2's own, which splits digits.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(f" {number}", normalized=False) for number in range(NUMBERS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        unk_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=special[2:],
        chat_template=CHAT_TEMPLATE,
    )


def messages_of(turns: Iterable[Turn]) -> list[Message]:
    """Dialogue turns as chat messages: the tutor is the assistant."""
    roles = {"tutor": "assistant", "student": "user"}
    return [Message.model_validate({"role": roles[t.speaker], "content": t.content}) for t in turns]


def encode_example(dialogue: Dialogue, chat: ChatFormat, loss_on: str) -> dict[str, object]:
    """One SFT row (EXAMPLE_SCHEMA): the whole dialogue, with the tutor's tokens (or all) marked for the loss.

    The last student turn is dropped: no tutor turn follows it.
    """
    messages = messages_of(dialogue.turns)
    ids = chat.prompt_ids(messages[:1])
    mask = [loss_on == "all"] * len(ids)
    for number in range(1, len(messages), 2):
        reply = chat.encode_reply(messages[number].content)
        ids += reply
        mask += [True] * len(reply)
        if number + 2 < len(messages):
            between = chat.following_ids(messages[: number + 1], [messages[number + 1]])
            ids += between
            mask += [loss_on == "all"] * len(between)
    return {"id": dialogue.id, "input_ids": ids, "loss_mask": mask}
