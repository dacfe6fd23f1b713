"""Which tokens of a conversation are learned."""

from __future__ import annotations

from typing import Any

import pytest

from bigtrain.config import InstructionConfig
from bigtrain.data.encode_instructions import InstructionEncoder, prompt_text
from bigtrain.data.tokenizer import END_OF_TEXT, train_tokenizer

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
    encoder = InstructionEncoder(InstructionConfig(**settings), tokenizer, tokenizer.token_to_id(END_OF_TEXT), length)
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
    assert prompt_text("two plus two?", "plain") == "two plus two?\n"


def test_every_answer_of_a_conversation(tokenizer: Any) -> None:
    read, learned = encode(tokenizer, {"messages": CHAT})
    assert read == "<|endoftext|>be short\ntwo plus two?\nfour<|endoftext|>thanks\nwelcome"
    assert learned == ["four<|endoftext|>", "welcome<|endoftext|>"]


def test_chatml_marks_the_roles(tokenizer: Any) -> None:
    read, learned = encode(tokenizer, {"messages": CHAT[1:3]}, template="chatml")
    assert read.startswith("<|endoftext|><|im_start|>user\ntwo plus two?<|im_end|>\n<|im_start|>assistant\nfour")
    assert learned == ["four<|im_end|><|endoftext|>"]
    assert prompt_text("hi", "chatml") == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_of_a_long_prompt_the_end_is_kept_and_the_response_with_it(tokenizer: Any) -> None:
    read, learned = encode(tokenizer, {"prompt": "thanks " * 50 + "two?", "response": "four"}, length=20)
    assert read.endswith("two?\nfour")
    assert learned == ["four<|endoftext|>"]
    _, learned = encode(tokenizer, {"prompt": "two?", "response": "four " * 50}, length=20)
    assert learned[0].startswith("four four")


def test_without_an_answer_there_is_nothing_to_learn(tokenizer: Any) -> None:
    encoder = InstructionEncoder(InstructionConfig(), tokenizer, tokenizer.token_to_id(END_OF_TEXT), 50)
    assert encoder.encode([{"messages": CHAT[:2]}], {}) == [[]]
