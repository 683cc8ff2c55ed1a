"""Chat templates, token by token.

Conversations grow by appending token ids: what the policy sampled is kept as it is and never tokenised again.
Message text is data: a special token written inside a message is encoded as plain characters.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError, TemplateRuntimeError
from transformers import PreTrainedTokenizerBase

from mahalo_ray.data.records import Message

_MARK = "\x02{}\x03"
_THOUGHT = "</think>"
_MOST_SPACES = 32

# Given to templates that write today's date: tokens that change at midnight would make a resumed run another
# one. It is the date that Llama-3.2's template falls back to.
FIXED_DATE = datetime(2024, 7, 26)

# Token ids of texts that were encoded: those of a dialogue's turns are asked for again and again. Bounded in
# number and in length, as some 50 MB at most.
_TEXTS_KEPT = 2048
_LONGEST_KEPT = 2000  # characters


class ChatFormat:
    """Encodes conversations for one tokenizer and its chat template.

    Prompts are the template's own rendering, token for token as `apply_chat_template` tokenises it: words may
    join the template's text around them ("[INST] Hi"), outer spaces of messages and the reasoning of earlier
    answers (up to `</think>`) are left out where the template leaves them out. Only a message that holds the
    text of a special token is encoded apart, as characters. A template that writes today's date is given
    `FIXED_DATE`. Conversations that go
    on token by token (`following_ids`) need a prefix-stable template as well: adding messages must not change
    what was rendered before. One that breaks this is refused, by name, at the first conversation that shows
    it; it can still answer whole prompts, as an endpoint does.

    A reply ends where the template closes an assistant's message: `closing` are the tokens from its text to
    the end token, `end_id` (Gemma closes with <end_of_turn>, Phi-3 with <|end|>, neither of which is the
    tokenizer's end-of-sequence token). `end_ids` are all tokens at which sampling stops: that one, the
    end-of-sequence token, and those of the model's generation_config.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end_ids: Collection[int] = ()) -> None:
        """`end_ids`: the model's own, from its generation_config; ordinary words among them are left out.

        ValueError, with what to do, for a tokenizer without a chat template, or if the template does not
        close an assistant's message with a token of its own.
        """
        if not tokenizer.chat_template:
            raise ValueError(f"tokenizer '{tokenizer.name_or_path}' has no chat template")
        self.tokenizer = tokenizer
        self._encode_text = lru_cache(maxsize=_TEXTS_KEPT)(self._encode_text_uncached)
        self._encode_rendered = lru_cache(maxsize=_TEXTS_KEPT)(self._encode_rendered_uncached)
        self._pieces = lru_cache(maxsize=1024)(self._pieces_uncached)
        self._encode_template = lru_cache(maxsize=1024)(self._encode_template_uncached)
        self._stable: set[tuple[str, ...]] = set()
        # None: the tokenizer's own (of several named templates, the one it chooses itself).
        template = tokenizer.chat_template
        self._dated_template = _with_fixed_date(template) if isinstance(template, str) else None
        markers = _marker_ids(tokenizer)
        texts = sorted(
            map(str, tokenizer.convert_ids_to_tokens(sorted(markers | set(tokenizer.all_special_ids))))
        )
        self._marker_text = re.compile("|".join(map(re.escape, texts)) or r"(?!)")
        self.closing = self._find_closing(markers)
        self.end_id = self.closing[-1]
        self._end_text = str(tokenizer.convert_ids_to_tokens(self.end_id))
        known_ends = {self.end_id, tokenizer.eos_token_id, *(markers & set(end_ids))}
        self.end_ids = frozenset(known_ends - {None})

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation up to where the assistant speaks next."""
        pieces = self._pieces(tuple(message.role for message in messages))
        contents = self._as_rendered(messages, pieces)
        if any(map(self._marker_text.search, contents)):
            return self._fill(pieces, contents)
        return list(self._rendered_ids(_joined(pieces, contents)))

    def following_ids(self, messages: Sequence[Message], replies: Sequence[Message]) -> list[int]:
        """Token ids from the end of the last (assistant) message of `messages`, whose end token was sampled,
        through `replies` to where the assistant speaks next."""
        before = tuple(message.role for message in messages)
        assert before and before[-1] == "assistant", "replies follow an assistant message"
        pieces = self._pieces(before + tuple(message.role for message in replies))
        self.check_stable([*before, *(message.role for message in replies)])
        # pieces[i] precedes message i: the first one here follows the assistant's text, end token first.
        opening, closing = self._encode_template(pieces[len(before)]), self.closing
        if opening[: len(closing)] != closing:
            raise self._refusal(f"not every assistant message is closed by '{self._end_text}'")
        contents = self._as_rendered([*messages, *replies], pieces)[len(before) :]
        rest = (pieces[len(before)].partition(self._end_text)[2], *pieces[len(before) + 1 :])
        # Behind the end token, so that no space is put before the text as before the first of a sequence.
        ids = self._rendered_ids(self._end_text + _joined(rest, contents))
        if any(map(self._marker_text.search, contents)) or ids[0] != self.end_id:
            return list(opening[len(closing) :]) + self._fill(("", *rest[1:]), contents)
        return list(ids[1:])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of sampled ids, without special tokens, spaces untouched."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a part of an assistant message: nothing ends here."""
        return list(self._ids_of(text))

    def encode_reply(self, text: str) -> list[int]:
        """Token ids of an assistant message's text and of what closes it, as data to imitate."""
        return [*self._ids_of(text), *self.closing]

    def missing_end(self, ids: Sequence[int]) -> list[int]:
        """The tokens that close a reply of these ids: none if it was ended when it was sampled."""
        return [] if ids and ids[-1] in self.end_ids else list(self.closing)

    def unused_markers(self) -> set[int]:
        """Special tokens that the chat template does not write for plain conversations, and so never
        occur."""
        used = {*self.end_ids, *self._encode_template(self._after_assistant())}
        for piece in self._pieces(("user",)):
            used |= {*self._encode_template(piece)}
        return _marker_ids(self.tokenizer) - used

    def _fill(self, pieces: tuple[str, ...], contents: Sequence[str]) -> list[int]:
        ids = list(self._encode_template(pieces[0]))
        for content, piece in zip(contents, pieces[1:], strict=True):
            ids += self._ids_of(content)
            ids += self._encode_template(piece)
        return ids

    def _as_rendered(self, messages: Sequence[Message], pieces: tuple[str, ...]) -> list[str]:
        """The messages' contents, without what the template leaves out of them: spaces around a message, or
        the reasoning before an earlier answer.

        Only the outer parts go through the template, around a mark; the words stay data. What the template
        does to an outer part is read off the text around the mark, against `pieces`, the text without any.
        """
        parts = [_outer_parts(message) for message in messages]
        is_marked = any("\x02" in message.content for message in messages)
        if is_marked or not any(before or after for before, _, after in parts):
            return [message.content for message in messages]
        marked = [
            {"role": message.role, "content": before + _MARK.format(number) + after}
            for number, (message, (before, _, after)) in enumerate(zip(messages, parts, strict=True))
        ]
        rendered = self._apply(marked, add_generation_prompt=True)
        gaps = []
        for number in range(len(messages)):
            gap, _, rendered = rendered.partition(_MARK.format(number))
            gaps.append(gap)
        gaps.append(rendered)
        contents = []
        kept_before = kept_after = ""
        for number, (gap, piece) in enumerate(zip(gaps, pieces, strict=True)):
            after = parts[number - 1][2] if number else ""
            before = parts[number][0] if number < len(parts) else ""
            # Kept as it is, or the reasoning left out and some or all of the spaces.
            spaces = before[len(before.rstrip()) :]
            befores = [before, *(spaces[start:] for start in _cuts(len(spaces)))]
            afters = [after[:end] for end in reversed(_cuts(len(after)))]
            ways = ((a, b) for b in befores for a in afters if a + piece + b == gap)
            kept_after, next_before = next(ways, (after, before))
            if number:
                contents.append(kept_before + parts[number - 1][1] + kept_after)
            kept_before = next_before
        return contents

    def _find_closing(self, markers: set[int]) -> tuple[int, ...]:
        """The tokens that the template puts behind an assistant's text, up to the first marker."""
        shown = self._after_assistant()
        ids = self._encode_template(shown)
        number = next((i for i, token_id in enumerate(ids) if token_id in markers), None)
        if number is None or self.tokenizer.decode(ids[:number]).strip():
            eos = self.tokenizer.eos_token or "an end token"
            raise ValueError(
                f"the chat template of tokenizer '{self.tokenizer.name_or_path}' closes a reply "
                f"with no special token (behind its text stands {shown!r}), so nothing says where a "
                f"reply ends. Set a chat_template that writes {eos} there, or add the marker that it writes "
                "to the tokenizer's special tokens"
            )
        return ids[: number + 1]

    def _after_assistant(self) -> str:
        """What the template writes between an assistant's message and the user's next one, or the end."""
        first, answer, second = (_MARK.format(number) for number in range(3))
        asked = [{"role": "user", "content": first}, {"role": "assistant", "content": answer}]
        try:
            talk = [*asked, {"role": "user", "content": second}]
            rendered = self._render(talk)
        except TemplateError:  # a template for one question and one answer
            rendered = ""
        if answer not in rendered or second not in rendered:
            try:
                rendered = self._render(asked)
            except TemplateError as error:
                raise self._refusal(f"it cannot render a question and its answer ({error})") from error
        return rendered.partition(answer)[2].partition(second)[0]

    def _pieces_uncached(self, roles: tuple[str, ...]) -> tuple[str, ...]:
        """The template's own text before, between and after the messages; the last piece asks for a reply."""
        marked = [{"role": role, "content": _MARK.format(i)} for i, role in enumerate(roles)]
        rendered = self._apply(marked, add_generation_prompt=True)
        pieces: list[str] = []
        for number in range(len(roles)):
            mark = _MARK.format(number)
            piece, found, rendered = rendered.partition(mark)
            if not found or mark in rendered:
                raise self._refusal(f"message {number + 1} of {len(roles)} is dropped or repeated")
            pieces.append(piece)
        return (*pieces, rendered)

    def check_stable(self, speakers: Sequence[str]) -> None:
        """ValueError unless every beginning of a conversation of these roles is rendered alike however it
        goes on."""
        roles = tuple(speakers)
        if roles in self._stable:
            return
        marked = [{"role": role, "content": _MARK.format(i)} for i, role in enumerate(roles)]
        text = self._apply(marked, add_generation_prompt=True)
        for cut in range(1, len(roles)):
            # What asks for an answer stands before that answer in the history, too.
            asks = roles[cut] == "assistant"
            if not text.startswith(self._apply(marked[:cut], add_generation_prompt=asks)):
                raise self._refusal(f"adding message {cut + 1} changes what was rendered before it")
        self._stable.add(roles)

    def _apply(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        try:
            return self._render(messages, add_generation_prompt=add_generation_prompt)
        except TemplateError as error:
            raise self._refusal(f"it refuses a conversation of these roles ({error})") from error

    def _render(self, messages: list[dict[str, str]], **options: Any) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tokenize=False, chat_template=self._dated_template, **options
                )
            )
        except (ArithmeticError, AttributeError, LookupError, TypeError, RecursionError) as error:
            # What a template computes with may fail in any way; Jinja wraps none of it.
            raise TemplateRuntimeError(f"{type(error).__name__}: {error}") from error

    def _encode_template_uncached(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False)) if text else ()

    def _rendered_ids(self, text: str) -> tuple[int, ...]:
        return (self._encode_rendered if len(text) <= _LONGEST_KEPT else self._encode_rendered_uncached)(text)

    def _encode_rendered_uncached(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def _ids_of(self, text: str) -> tuple[int, ...]:
        return (self._encode_text if len(text) <= _LONGEST_KEPT else self._encode_text_uncached)(text)

    def _encode_text_uncached(self, text: str) -> tuple[int, ...]:
        encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        return tuple(encoded["input_ids"])

    def _refusal(self, why: str) -> ValueError:
        return ValueError(
            f"the chat template of tokenizer '{self.tokenizer.name_or_path}' cannot be used for token-exact "
            f"conversations: {why}. Set another chat_template on the tokenizer."
        )


def _with_fixed_date(template: str) -> str:
    """The template with `FIXED_DATE` for every `strftime_now('...')`."""
    written = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
    return written.sub(lambda call: repr(FIXED_DATE.strftime(call[2])), template)


def _joined(pieces: Sequence[str], contents: Sequence[str]) -> str:
    """The template's text with the contents between its pieces."""
    return pieces[0] + "".join(content + piece for content, piece in zip(contents, pieces[1:], strict=True))


def _cuts(length: int) -> list[int]:
    """Where so many spaces may be cut: anywhere, or, if there are very many, at their ends."""
    return list(range(length + 1)) if length <= _MOST_SPACES else [0, length]


def _outer_parts(message: Message) -> tuple[str, str, str]:
    """A message's content in three: spaces at its beginning (and an assistant's reasoning up to `</think>`),
    its words, and spaces at its end."""
    content, before = message.content, ""
    if message.role == "assistant" and _THOUGHT in content:
        end = content.rindex(_THOUGHT) + len(_THOUGHT)
        before, content = content[:end], content[end:]
    core = content.strip()
    lead = content[: len(content) - len(content.lstrip())]
    return before + lead, core, content[len(lead) + len(core) :]


def _marker_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that stand for no text: special ones but the beginning of a sequence, which ends nothing."""
    markers = set(tokenizer.all_special_ids)
    markers |= {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return markers - ({tokenizer.bos_token_id} - {tokenizer.eos_token_id})
