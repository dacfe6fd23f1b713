"""Prompts and responses, or whole conversations -> token ids of which only the responses are targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bigtrain.config import InstructionConfig
from bigtrain.data.examples import Example
from bigtrain.data.records import Record

NOT_SCORED = -100
CHAT_TEMPLATES = {  # what `rendered` writes, with the marks of InstructionEncoder, in the language of transformers
    "plain": (
        "{{ bos_token }}{% for message in messages %}{{ message['content'] }}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\\n' }}{% endif %}{% endfor %}"
    ),
    "chatml": (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
}


def rendered(messages: list[dict[str, str]], template: str) -> list[tuple[str, bool]]:
    """Pieces of text in their order, and whether a model is to write them.

    plain: each message and a line break. chatml: OpenAI's markup, with the roles. What follows the last piece that is
    not to be written is where a model begins to write, so an unanswered conversation is a prompt.
    """
    pieces: list[tuple[str, bool]] = []
    for message in messages:
        own = message["role"] == "assistant"
        if template == "chatml":
            pieces.append((f"<|im_start|>{message['role']}\n", False))
            pieces.append((f"{message['content']}<|im_end|>" if own else f"{message['content']}<|im_end|>\n", own))
        else:
            pieces.append((message["content"] if own else f"{message['content']}\n", own))
    return pieces


def prompt_text(prompt: str, template: str) -> str:
    """What a model that was trained with `template` is given to answer a prompt."""
    text = "".join(piece for piece, _ in rendered([{"role": "user", "content": prompt}], template))
    return f"{text}<|im_start|>assistant\n" if template == "chatml" else text


class InstructionEncoder:
    """<eos>, the conversation, and <eos> after each response, which is learned too: it is how a model stops.

    Where a conversation is too long its beginning goes first, down to half the room, and then its end.
    """

    def __init__(self, task: InstructionConfig, tokenizer: Any, eos_id: int, max_seq_len: int) -> None:
        self.template, self.eos_id = task.template, eos_id
        self.tokenizer, self.length, self.cut = tokenizer, min(task.max_length or max_seq_len, max_seq_len), 0

    def labels_of(self, record: Record) -> list[str]:
        return []

    def encode(self, records: Sequence[Record], label_ids: dict[str, int]) -> list[list[Example]]:
        self.tokenizer.no_truncation()
        return [self._example(record) for record in records]

    def _example(self, record: Record) -> list[Example]:
        messages = record.get("messages") or [
            {"role": "user", "content": record["prompt"]},
            {"role": "assistant", "content": record["response"]},
        ]
        pieces = rendered(messages, self.template)
        encodings = self.tokenizer.encode_batch([text for text, _ in pieces], add_special_tokens=False)
        tokens, learned = [self.eos_id], [False]
        for (_, own), encoding in zip(pieces, encodings, strict=True):
            tokens += encoding.ids
            learned += [own] * len(encoding.ids)
            if own:
                tokens.append(self.eos_id)
                learned.append(True)
        targets = [token if own else NOT_SCORED for token, own in zip(tokens[1:], learned[1:], strict=True)]
        tokens = tokens[:-1]
        over = len(tokens) - self.length
        if over > 0:
            self.cut += 1
            first = next((i for i, target in enumerate(targets) if target != NOT_SCORED), 0)
            begin = min(over, max(0, first - self.length // 2))
            tokens, targets = tokens[begin:][: self.length], targets[begin:][: self.length]
        if all(target == NOT_SCORED for target in targets):
            return []  # a conversation without a response teaches nothing
        return [{"tokens": tokens, "targets": targets}]
