"""Which tokens of a conversation are learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from bigtrain.config import Config, InstructionConfig
from bigtrain.data.encode_examples import example_encoder
from bigtrain.data.encode_instructions import Chat, InstructionEncoder
from bigtrain.data.tokenizer import CHATML, find_tokenizer, load_tokenizer, train_tokenizer
from bigtrain.errors import ConfigError

CHAT = [
    {"role": "system", "content": "be short"},
    {"role": "user", "content": "two plus two?"},
    {"role": "assistant", "content": "four"},
    {"role": "user", "content": "thanks"},
    {"role": "assistant", "content": "welcome"},
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(["be short two plus two? four thanks welcome <|im_start|>assistant<|im_end|>"] * 20, 280)


def encode(tokenizer: Any, record: dict[str, Any], length: int = 500, **settings: Any) -> tuple[str, list[str]]:
    """The text that is read, and each stretch of it that is learned (shifted by one, as inputs and targets are)."""
    encoder = InstructionEncoder(InstructionConfig(**settings), tokenizer, length)
    ((example,),) = encoder.encode([record], {})
    tokens, targets = example["tokens"], example["targets"]
    assert len(tokens) == len(targets) <= length
    assert all(target in (-100, following) for target, following in zip(targets, tokens[1:], strict=False))
    learned: list[list[int]] = [[]]
    for target in targets:
        if target == -100:
            learned.append([])
        else:
            learned[-1].append(target)
    texts = [tokenizer.decode(part, skip_special_tokens=False) for part in learned if part]
    return tokenizer.decode(tokens, skip_special_tokens=False), texts


def test_only_the_response_is_learned_and_that_it_ends(tokenizer: Any) -> None:
    read, learned = encode(tokenizer, {"prompt": "two plus two?", "response": "four"})
    assert read == "<|endoftext|>two plus two?\nfour"
    assert learned == ["four<|endoftext|>"]
    assert "".join(Chat("plain", tokenizer).prompt("two plus two?").pieces) == "<|endoftext|>two plus two?\n"


def test_every_answer_of_a_conversation(tokenizer: Any) -> None:
    read, learned = encode(tokenizer, {"messages": CHAT})
    assert read == "<|endoftext|>be short\ntwo plus two?\nfour<|endoftext|>thanks\nwelcome"
    assert learned == ["four<|endoftext|>", "welcome<|endoftext|>"]


def test_chatml_marks_the_roles(tokenizer: Any) -> None:
    """Of a tokenizer that has not the marks they are spelled, and an end of text follows."""
    read, learned = encode(tokenizer, {"messages": CHAT[1:3]}, template="chatml")
    assert read.startswith("<|endoftext|><|im_start|>user\ntwo plus two?<|im_end|>\n<|im_start|>assistant\nfour")
    assert learned == ["four<|im_end|><|endoftext|>"]
    chat = Chat("chatml", tokenizer)
    assert "".join(chat.prompt("hi").pieces) == "<|endoftext|><|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert (chat.closing, chat.closing_text) == (None, "<|im_end|>")


def test_chatml_is_the_common_one_where_its_marks_are_tokens() -> None:
    own = train_tokenizer(["be short two plus two? four thanks welcome"] * 20, 280, marks=CHATML)
    read, learned = encode(own, {"messages": CHAT}, template="chatml")
    assert read == (
        "<|endoftext|><|im_start|>system\nbe short<|im_end|>\n<|im_start|>user\ntwo plus two?<|im_end|>\n"
        "<|im_start|>assistant\nfour<|im_end|>\n<|im_start|>user\nthanks<|im_end|>\n<|im_start|>assistant\nwelcome"
    )
    assert learned == ["four<|im_end|>", "welcome<|im_end|>"]
    chat = Chat("chatml", own)
    assert own.id_to_token(chat.closing) == "<|im_end|>"
    tokens, _ = chat.conversation(CHAT)
    assert [tokens.count(own.token_to_id(mark)) for mark in CHATML] == [5, 5]
    asked = chat.prompt("two plus two?")
    assert own.decode(asked.ids, skip_special_tokens=False) == "".join(asked.pieces)
    assert chat.conversation(CHAT[1:3])[0][: len(asked.ids)] == asked.ids


def test_of_a_long_prompt_the_end_is_kept_and_the_response_with_it(tokenizer: Any) -> None:
    read, learned = encode(tokenizer, {"prompt": "thanks " * 50 + "two?", "response": "four"}, length=20)
    assert read.endswith("two?\nfour")
    assert learned == ["four<|endoftext|>"]
    _, learned = encode(tokenizer, {"prompt": "two?", "response": "four " * 50}, length=20)
    assert learned[0].startswith("four four")


def test_without_an_answer_there_is_nothing_to_learn(tokenizer: Any) -> None:
    encoder = InstructionEncoder(InstructionConfig(), tokenizer, 50)
    assert encoder.encode([{"messages": CHAT[:2]}], {}) == [[]]


# ------------------------------------------------------------------------------- what the tokenizer's directory says

TURNS = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
ASKED = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def directory(folder: Path, tokenizer: Any, template: str | None = None, **told: Any) -> Any:
    """A Hugging Face directory's tokenizer, in whose vocabulary the marks are special tokens; read again."""
    own = type(tokenizer).from_str(tokenizer.to_str())
    own.add_special_tokens(["<|im_start|>", "<|im_end|>", "<s>"])
    own.save(str(folder / "tokenizer.json"))
    told |= {"chat_template": template} if template is not None else {}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | told))
    return find_tokenizer(str(folder))


def test_a_response_ends_with_the_token_that_generation_stops_at(tmp_path: Path, tokenizer: Any) -> None:
    named = directory(tmp_path, tokenizer, eos_token="<|im_end|>", bos_token=None)
    encoder = example_encoder(Config(task=InstructionConfig()), named)
    ((example,),) = encoder.encode([{"prompt": "two plus two?", "response": "four"}], {})
    _, eos_id = load_tokenizer(str(tmp_path))
    assert named.id_to_token(eos_id) == "<|im_end|>"
    assert example["targets"][-1] == eos_id
    assert example["tokens"][0] == Chat("plain", named).prompt("two plus two?").ids[0] == eos_id


def test_a_conversation_begins_with_the_token_for_that(tmp_path: Path, tokenizer: Any) -> None:
    named = directory(tmp_path, tokenizer, eos_token="<|endoftext|>", bos_token="<s>")
    read, learned = encode(named, {"prompt": "two plus two?", "response": "four"})
    assert read == "<s>two plus two?\nfour"
    assert learned == ["four<|endoftext|>"]
    assert named.decode(Chat("plain", named).prompt("hi").ids, skip_special_tokens=False) == "<s>hi\n"


@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.jinja"])
def test_the_tokenizers_own_template_as_transformers_writes_it(tmp_path: Path, tokenizer: Any, place: str) -> None:
    template = "{{ bos_token }}" + TURNS + ASKED
    named = directory(
        tmp_path, tokenizer, template if place == "tokenizer_config.json" else None, bos_token="<s>",
        eos_token="<|im_end|>",
    )  # fmt: skip
    if place == "chat_template.jinja":
        (tmp_path / place).write_text(template)
        named = find_tokenizer(str(tmp_path))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    read, learned = encode(named, {"messages": CHAT}, template="tokenizer")
    # the last token is a target alone
    assert f"{read}<|im_end|>\n" == theirs.apply_chat_template(CHAT, tokenize=False)
    assert learned == ["four<|im_end|>", "welcome<|im_end|>"]
    prompt = CHAT[1:2]
    chat = Chat("tokenizer", named)
    assert chat.prompt(prompt[0]["content"]).ids == list(
        theirs.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    )
    assert chat.closing == named.token_to_id("<|im_end|>")


def test_where_the_template_does_not_end_a_response_the_end_of_text_does(tmp_path: Path, tokenizer: Any) -> None:
    lines = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    named = directory(tmp_path, tokenizer, lines + "{% if add_generation_prompt %}assistant: {% endif %}")
    _, learned = encode(named, {"messages": CHAT[:3]}, template="tokenizer")
    assert learned == ["four\n<|endoftext|>"]
    chat = Chat("tokenizer", named)
    assert (chat.closing, chat.closing_text) == (None, "")


def test_what_a_template_cannot_do_is_one_line(tmp_path: Path, tokenizer: Any) -> None:
    asked = {"prompt": "two plus two?", "response": "four"}
    with pytest.raises(ConfigError, match=r"task\.template='tokenizer': the tokenizer has no chat template"):
        encode(tokenizer, asked, template="tokenizer")
    thinking = TURNS + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}"
    for template, said in {
        thinking: "the prompt of response 1 is not the beginning of what the tokenizer's chat template writes",
        "{{ raise_exception('roles must alternate') }}": r"a conversation of user, assistant \(roles must alternate\)",
        "{% for %}": r"does not parse: line 1: .*; mend it, or take plain or chatml",
        "{{ 1 // 0 }}": r"a conversation of user, assistant \(integer division or modulo by zero\)",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}": "access to attribute '__class__' of 'str' object is unsafe",
    }.items():
        with pytest.raises(ConfigError, match=said) as raised:
            encode(directory(tmp_path, tokenizer, template), asked, template="tokenizer")
        assert "\n" not in str(raised.value)
