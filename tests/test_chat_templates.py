"""Chat templates with the quirks of the families people use: prompts and grown conversations equal
`apply_chat_template` token for token, or are refused by name."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mahalo_ray.data.records import Message
from mahalo_ray.data.templating import ChatFormat

ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}{% endfor %}"
)
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
)
FOLDED = (
    "{% if messages[0].role == 'system' %}{% set lead = messages[0].content %}{% set rest = messages[1:] %}"
    "{% else %}{% set lead = '' %}{% set rest = messages %}{% endif %}"
)


def chatml(content: str = "m.content", lead: str = "", ask: str = "<|im_start|>assistant\n") -> str:
    return (
        lead + "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + "
        f"{content} + '<|im_end|>' + '\n' }}}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ '{ask}' }}}}{{% endif %}}"
    )


# ruff: noqa: E501
HEADERS = (
    "{{ bos_token }}@{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + "
    "m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
DATE = "{{ '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + strftime_now('%d %b %Y') + '<|eot_id|>' }}"
THOUGHTS = "(m.content.split('</think>')[-1].lstrip('\n') if m.role == 'assistant' else m.content)"
INST = (
    "{% for m in rest %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + (lead if loop.first else '') + "
    "m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
TEMPLATES = {
    "chatml": chatml(),
    "chatml, a system message by default": chatml(
        lead="{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    ),
    "chatml, trimmed": chatml("(m.content | trim)"),
    "chatml, history's reasoning dropped": chatml(THOUGHTS),
    "chatml, an answer begins with empty thoughts": chatml(
        ask="<|im_start|>assistant\n<think>\n\n</think>\n\n"
    ),
    "headers": HEADERS.replace("@", ""),
    "headers, with the date": HEADERS.replace("@", DATE),
    "headers, alternating roles only": ALTERNATE + HEADERS.replace("@", ""),
    "turns of model, no system": NO_SYSTEM + "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + "
    "('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    "instructions": FOLDED + INST,
    "instructions, spaces outside the words": FOLDED + INST.replace("m.content +", "m.content | trim +"),
    "ends by <|end|>": "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    "names and colons": "{% for m in messages %}{% if m.role == 'assistant' %}{{ 'ASSISTANT: ' + m.content + "
    "eos_token }}{% else %}{{ m.role | upper + ': ' + m.content + ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
    "the next speaker ends a turn": "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    "turn tokens without line ends": "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + "
    "'<|end_header_id|>' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>' }}{% endif %}",
    "end of sequence and a line end": "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + "
    "'\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
}
MARKERS = [
    *("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end|>"),
    *("<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>", "[INST]", "[/INST]"),
]
TEXT = [
    "USER: Hi there! ASSISTANT: What is two plus two? It is 4, of course.",
    "system user assistant model Today Date: 26 Jul 2024. Be kind. Be brief, please.",
] * 3


def tokenizer_with(template: str, kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer whose words join the spaces (or line ends) before them, as people's do."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=kind == "metaspace", unk_token=None))
    alphabet: list[str] = []
    if kind == "bytes":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
        alphabet = [chr(i) for i in range(32, 127)] + ["\n"]
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    specials = [AddedToken(text, special=True, normalized=False) for text in ("<s>", "</s>", *MARKERS)]
    tokenizer.add_special_tokens(specials)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=MARKERS,
        chat_template=template,
        name_or_path="some/model",
    )


def talk(*contents: str, system: str | None = None) -> list[Message]:
    roles = ("user", "assistant")
    spoken = [{"role": roles[n % 2], "content": content} for n, content in enumerate(contents)]
    lead = [] if system is None else [{"role": "system", "content": system}]
    return [Message.model_validate(fields) for fields in (*lead, *spoken)]


TALKS = [
    talk("Hi there!"),
    talk("Hi there!", "What is two plus two?", "It is 4."),
    talk("Hi there!", "<think>\nhm\n</think>\n\nWhat is two?", "It is 4.", "Be kind.", "two"),
    talk("  Hi there!\n", "Be brief, please.", " two  "),
    talk("Hi there!", system="Be brief."),
    talk("Hi!", "two plus two", "4", system="Be kind. "),
]


def rendered(tokenizer: PreTrainedTokenizerFast, messages: list[Message]) -> list[int]:
    """transformers' own tokens."""
    fields = [{"role": message.role, "content": message.content} for message in messages]
    dated = tokenizer.chat_template.replace("strftime_now('%d %b %Y')", "'26 Jul 2024'")
    return tokenizer.apply_chat_template(
        fields, chat_template=dated, add_generation_prompt=True, tokenize=True, return_dict=False
    )


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_are_the_templates_own_tokens_or_refused_by_name(name: str, kind: str) -> None:
    tokenizer = tokenizer_with(TEMPLATES[name], kind)
    chat = ChatFormat(tokenizer)
    equal = 0
    for messages in TALKS:
        try:
            ids = chat.prompt_ids(messages)
        except ValueError as error:
            assert "some/model" in str(error)
            assert messages[0].role == "system" and ("no system" in name or "alternating" in name)
            continue
        assert ids == rendered(tokenizer, messages), (messages, tokenizer.decode(ids))
        equal += 1
    assert equal >= 4


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_grown_by_tokens_is_the_templates_or_refused_by_name(name: str, kind: str) -> None:
    tokenizer = tokenizer_with(TEMPLATES[name], kind)
    chat = ChatFormat(tokenizer)
    messages = talk("Hi there!", "What is two plus two?", "It is 4.")
    whole = rendered(tokenizer, messages)
    prompt = chat.prompt_ids(messages[:1])
    try:
        following = chat.following_ids(messages[:2], messages[2:])
    except ValueError as error:
        assert "some/model" in str(error)
        assert name in ("chatml, an answer begins with empty thoughts",)
        return
    # What the policy sampled lies between; what surrounds it is the template's.
    assert whole[: len(prompt)] == prompt
    assert whole[-len(following) :] == following
    assert whole[-len(following) - 1] == chat.end_id
    answer = tokenizer.decode(whole[len(prompt) : -len(following) - 1])
    assert answer.strip() == "What is two plus two?"


def test_a_special_token_inside_a_message_stays_text() -> None:
    tokenizer = tokenizer_with(TEMPLATES["instructions"], "bytes")
    chat = ChatFormat(tokenizer)
    ids = chat.prompt_ids(talk("Hi [/INST] there </s>"))
    assert ids.count(tokenizer.convert_tokens_to_ids("[/INST]")) == 1
    assert tokenizer.eos_token_id not in ids
    assert "Hi [/INST] there </s>" in tokenizer.decode(ids)


def test_a_template_with_the_date_gives_the_same_tokens_tomorrow() -> None:
    tokenizer = tokenizer_with(TEMPLATES["headers, with the date"], "bytes")
    assert "26 Jul 2024" in tokenizer.decode(ChatFormat(tokenizer).prompt_ids(talk("Hi!")))
