"""Chat templates, token by token.

Conversations grow by appending token ids: what the policy sampled is kept as it is and never tokenised again.
Message text is data: a special token written inside a message is encoded as plain characters.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from mahalo_ray.data.records import Message

_MARK = "\x02{}\x03"


class ChatFormat:
    """Encodes conversations for one tokenizer and its chat template.

    The template must be prefix-stable: adding messages must not change what was rendered before. A template
    that breaks this is refused, by name, at the first conversation that shows it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            raise ValueError(f"tokenizer '{tokenizer.name_or_path}' has no chat template")
        if tokenizer.eos_token_id is None:
            raise ValueError(f"tokenizer '{tokenizer.name_or_path}' has no end-of-sequence token")
        self.tokenizer = tokenizer
        self.end_id: int = tokenizer.eos_token_id
        self._encode_text = lru_cache(maxsize=65536)(self._encode_text_uncached)
        self._pieces = lru_cache(maxsize=1024)(self._pieces_uncached)
        self._encode_template = lru_cache(maxsize=1024)(self._encode_template_uncached)

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation up to where the assistant speaks next."""
        pieces = self._pieces(tuple(message.role for message in messages))
        return self._fill(pieces, messages)

    def following_ids(self, messages: Sequence[Message], replies: Sequence[Message]) -> list[int]:
        """Token ids from the end of the last (assistant) message of `messages`, whose end token was sampled,
        through `replies` to where the assistant speaks next."""
        before = tuple(message.role for message in messages)
        assert before and before[-1] == "assistant", "replies follow an assistant message"
        pieces = self._pieces(before + tuple(message.role for message in replies))
        # pieces[i] precedes message i: the first one here follows the assistant's text, end token first.
        opening = self._encode_template(pieces[len(before)])
        if opening[:1] != (self.end_id,):
            raise self._refusal("an assistant message is not closed by the end-of-sequence token")
        return list(opening[1:]) + self._fill(("", *pieces[len(before) + 1 :]), replies)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of sampled ids, without special tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def encode_reply(self, text: str) -> list[int]:
        """Token ids of an assistant message's text with its end token, as data to imitate."""
        return [*self._encode_text(text), self.end_id]

    def _fill(self, pieces: tuple[str, ...], messages: Sequence[Message]) -> list[int]:
        ids = list(self._encode_template(pieces[0]))
        for message, piece in zip(messages, pieces[1:], strict=True):
            ids += self._encode_text(message.content)
            ids += self._encode_template(piece)
        return ids

    def _pieces_uncached(self, roles: tuple[str, ...]) -> tuple[str, ...]:
        """The template's own text before, between and after the messages; the last piece asks for a reply."""
        rendered = self._render(roles)
        pieces: list[str] = []
        for number in range(len(roles)):
            mark = _MARK.format(number)
            piece, found, rendered = rendered.partition(mark)
            if not found or mark in rendered:
                raise self._refusal(f"message {number + 1} of {len(roles)} is dropped or repeated")
            pieces.append(piece)
        return (*pieces, rendered)

    def _render(self, roles: tuple[str, ...]) -> str:
        marked = [{"role": role, "content": _MARK.format(i)} for i, role in enumerate(roles)]
        text = str(self.tokenizer.apply_chat_template(marked, tokenize=False, add_generation_prompt=True))
        for cut in range(1, len(roles)):
            shown = self.tokenizer.apply_chat_template(marked[:cut], tokenize=False)
            if not text.startswith(shown):
                raise self._refusal(f"adding message {cut + 1} changes what was rendered before it")
        return text

    def _encode_template_uncached(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False)) if text else ()

    def _encode_text_uncached(self, text: str) -> tuple[int, ...]:
        encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        return tuple(encoded["input_ids"])

    def _refusal(self, why: str) -> ValueError:
        return ValueError(
            f"the chat template of tokenizer '{self.tokenizer.name_or_path}' cannot be used for token-exact "
            f"conversations: {why}. Set another chat_template on the tokenizer."
        )
