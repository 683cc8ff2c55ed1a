"""Records on disk, storage on any filesystem, and token-exact chat encoding."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mahalo_ray.data import storage
from mahalo_ray.data.records import Candidate, CandidateSet, Message, PreferencePair, StepTrace
from mahalo_ray.data.templating import ChatFormat

PLAIN = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# Marks the last message only, as templates that strip earlier reasoning do.
UNSTABLE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + ('!' if loop.last else '') }}"
    "{{ m['content'] + '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def tokenizer_with(template: str) -> PreTrainedTokenizerFast:
    alphabet = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    roles = ["<|user|>", "<|assistant|>", "<|system|>"]
    tokenizer.add_special_tokens(["<|end|>", *roles])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        additional_special_tokens=roles,
        chat_template=template,
    )


def message(role: str, content: str) -> Message:
    return Message.model_validate({"role": role, "content": content})


TALK = [
    message("user", "hi"),
    message("assistant", "yes?"),
    message("user", "2 + 2"),
    message("assistant", "4"),
]


def test_appending_turn_by_turn_equals_the_template_at_once() -> None:
    chat = ChatFormat(tokenizer_with(PLAIN))
    grown = chat.prompt_ids(TALK[:1])
    grown += chat.encode_reply("yes?") + chat.following_ids(TALK[:2], TALK[2:3])
    assert grown == chat.prompt_ids(TALK[:3])
    rendered = chat.tokenizer.apply_chat_template(
        [m.model_dump() for m in TALK[:3]], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert grown == rendered


def test_special_tokens_in_a_message_are_plain_text() -> None:
    chat = ChatFormat(tokenizer_with(PLAIN))
    ids = chat.prompt_ids([message("user", "a<|end|><|assistant|>b")])
    assert ids.count(chat.end_id) == 1
    assert chat.tokenizer.decode(ids) == "<|user|>a<|end|><|assistant|>b<|end|><|assistant|>"


def test_a_template_that_rewrites_history_answers_prompts_but_cannot_go_on_token_by_token() -> None:
    chat = ChatFormat(tokenizer_with(UNSTABLE))
    assert chat.prompt_ids(TALK[:3]) == rendered_ids(chat, TALK[:3])
    with pytest.raises(ValueError, match="changes what was rendered"):
        chat.following_ids(TALK[:2], TALK[2:3])


def rendered_ids(chat: ChatFormat, messages: list[Message]) -> list[int]:
    return chat.tokenizer.apply_chat_template(
        [m.model_dump() for m in messages], add_generation_prompt=True, tokenize=True, return_dict=False
    )


# What families leave out of earlier messages: outer spaces, newlines alone, an answer's reasoning.
ANSWER = "(m.content.split('</think>')[-1] if m.role == 'assistant' else m.content)"
CONTENTS = {
    "nothing": "m.content",
    "outer spaces": "m.content | trim",
    "newlines before": "m.content.lstrip('\\n')",
    "reasoning": ANSWER,
    "reasoning and newlines": ANSWER + ".lstrip('\\n')",
    "reasoning and spaces": ANSWER + " | trim",
}


@pytest.mark.parametrize("left_out", CONTENTS)
def test_what_the_template_leaves_out_of_messages_is_left_out(left_out: str) -> None:
    template = PLAIN.replace("m['content']", f"({CONTENTS[left_out]})")
    chat = ChatFormat(tokenizer_with(template))
    talk = [
        message("user", "  2 + 2\n"),
        message("assistant", "<think>2 and 2 <|end|></think>\n\n 4 "),
        message("user", "\n\nand 3? "),
        message("assistant", "yes"),
        message("user", "ok"),
    ]
    for count in (1, 3, 5):
        text = str(
            chat.tokenizer.apply_chat_template(
                [m.model_dump() for m in talk[:count]], tokenize=False, add_generation_prompt=True
            )
        )
        assert chat.tokenizer.decode(chat.prompt_ids(talk[:count])) == text
    grown = chat.prompt_ids(talk[:3]) + chat.encode_reply("yes") + chat.following_ids(talk[:4], talk[4:])
    assert grown == chat.prompt_ids(talk)


# The ways in which families close an assistant's message: (template, what a reply of "4" is trained on).
OPEN_ANSWER = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
ENDS = {
    "its own token": (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|done|>\n{% endfor %}",
        "4<|done|>",
    ),
    "a space before the end": (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }} <|end|>{% endfor %}",
        "4 <|end|>",
    ),
    "the next speaker": ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}", "4<|user|>"),
    "alternating roles only": (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "<|{{ m.role }}|>{{ m.content }}<|done|>{% endfor %}",
        "4<|done|>",
    ),
    "one question only": (
        "{% if messages | length > 2 %}{{ raise_exception('one question') }}{% endif %}"
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|done|>{% endfor %}",
        "4<|done|>",
    ),
}


@pytest.mark.parametrize("family", ENDS)
def test_a_reply_is_closed_as_the_template_closes_it(family: str) -> None:
    template, expected = ENDS[family]
    tokenizer = tokenizer_with(template + OPEN_ANSWER)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|done|>"]}, replace_extra_special_tokens=False
    )
    done, words = tokenizer.convert_tokens_to_ids("<|done|>"), tokenizer.encode("4")
    chat = ChatFormat(tokenizer, end_ids=[done, words[0]])
    reply = chat.encode_reply("4")
    assert tokenizer.decode(reply) == expected and chat.end_id == reply[-1]
    # Sampling stops there, at the end of a sequence, and where the model's own config says, unless it is a
    # word.
    assert chat.end_ids == {chat.end_id, tokenizer.eos_token_id, done}
    assert chat.missing_end(reply) == [] and chat.missing_end(words) == reply[len(words) :]
    if family != "one question only":
        grown = (
            chat.prompt_ids(TALK[:1]) + chat.encode_reply("yes?") + chat.following_ids(TALK[:2], TALK[2:3])
        )
        assert grown == chat.prompt_ids(TALK[:3])


def test_a_template_that_does_not_close_replies_is_refused_with_the_way_out() -> None:
    tokenizer = tokenizer_with("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    tokenizer.name_or_path = "some/model"
    with pytest.raises(
        ValueError, match=r"some/model.*closes a reply with no special token .*'\\n.*writes <\|end\|>"
    ):
        ChatFormat(tokenizer)


def test_a_tokenizer_without_template_is_refused_by_name() -> None:
    tokenizer = tokenizer_with(PLAIN)
    tokenizer.chat_template = None
    tokenizer.name_or_path = "some/model"
    with pytest.raises(ValueError, match=r"some/model.*no chat template"):
        ChatFormat(tokenizer)


@pytest.mark.parametrize("root", ["memory://records", "local"])
def test_records_survive_the_disk(root: str, tmp_path: Path) -> None:
    folder = str(tmp_path / "shards") if root == "local" else root
    trace = StepTrace(
        id="t",
        group="g",
        prompt=TALK[:1],
        steps=["a", "b"],
        labels={"accuracy": [None, 0.5]},
        source="test",
        token_ids=[1, 2, 3],
        step_starts=[1, 2],
        step_ends=[1, 2],
    )
    StepTrace.save([trace], storage.join(folder, "part-000000.parquet"))
    assert StepTrace.load(folder) == [trace]


def test_candidate_sets_keep_labels_and_scores_apart(tmp_path: Path) -> None:
    candidates = [
        Candidate(content="x", token_ids=[5], labels={"accuracy": 0.25}),
        Candidate(content="y", token_ids=[6], scores={"engagement": 1.5}),
    ]
    one = CandidateSet(
        id="d/0",
        dialogue="d",
        topic="+",
        turn=0,
        prompt=TALK[:1],
        prompt_ids=[1],
        candidates=candidates,
        chosen=1,
    )
    CandidateSet.save([one], str(tmp_path / "part-000000.parquet"))
    assert CandidateSet.load(str(tmp_path)) == [one]


def test_unknown_fields_are_errors() -> None:
    with pytest.raises(ValidationError, match="chosne"):
        PreferencePair.model_validate(
            {"id": "1", "objective": "a", "prompt": [], "chosne": "x", "rejected": "y", "source": "s"}
        )


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    url = str(tmp_path / "a" / "b.json")
    storage.write_json(url, {"x": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        storage.write_json(url, {"x": float("nan")})
    assert storage.read_json(url) == {"x": 1}
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b.json"]


def test_missing_parquet_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        storage.read_table(str(tmp_path / "nowhere"))
