"""Prompts and responses, or whole conversations -> token ids of which only the responses are targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bigtrain.config import InstructionConfig
from bigtrain.data.examples import Example
from bigtrain.data.records import Record
from bigtrain.data.tokenizer import begin_id, special_ids, tokenizer_config
from bigtrain.errors import ConfigError

NOT_SCORED = -100
Messages = list[dict[str, str]]
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


def rendered(messages: Messages, template: str) -> list[tuple[str, bool]]:
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


def prompt_text(prompt: str, template: str, tokenizer: Any = None) -> str:
    """What a model that was trained with `template` is given to answer a prompt. `tokenizer`: of template=tokenizer."""
    messages = [{"role": "user", "content": prompt}]
    if template == "tokenizer":
        return by_chat_template(tokenizer, messages, prompt=True)
    text = "".join(piece for piece, _ in rendered(messages, template))
    return f"{text}<|im_start|>assistant\n" if template == "chatml" else text


def prompt_tokens(prompt: str, template: str, tokenizer: Any) -> list[int]:
    """The same as tokens. The tokenizer's own chat template writes the beginning of a text itself, or wants none."""
    begin = [] if template == "tokenizer" else [begin_id(tokenizer)]
    text = prompt_text(prompt, template, tokenizer)
    return begin + list(tokenizer.encode(text, add_special_tokens=False).ids)


def closing_mark(template: str, tokenizer: Any) -> str:
    """What stands after a response, written like the response itself, before the end-of-text token; or nothing."""
    if template == "tokenizer":
        asked, answer = {"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}
        return by_chat_template(tokenizer, [asked, answer]).rpartition("answer")[2].strip()
    return "<|im_end|>" if template == "chatml" else ""


# ----------------------------------------------------------------------------------- the tokenizer's own template


def chat_template(tokenizer: Any) -> str:
    """Raises ConfigError if it has none."""
    found = tokenizer_config(tokenizer).get("chat_template")
    if isinstance(found, list):  # several by name, as transformers has them
        found = next((entry.get("template") for entry in found if entry.get("name") == "default"), None)
    if not isinstance(found, str):
        raise ConfigError(
            "task.template", "tokenizer", "the tokenizer has no chat template",
            "one is in tokenizer_config.json or chat_template.jinja; or take plain or chatml",
        )  # fmt: skip
    return found


def by_chat_template(tokenizer: Any, messages: Messages, prompt: bool = False) -> str:
    """Messages as the tokenizer's chat template writes them; of a `prompt` with the beginning of the response.

    In transformers' sandbox: a template comes with a model, from anyone. Raises ConfigError for one that is broken or
    refuses the messages.
    """
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    template = chat_template(tokenizer)
    marks = {f"{name}_token": tokenizer.id_to_token(number) for name, number in special_ids(tokenizer).items()}
    try:
        (text,), _ = render_jinja_template([messages], chat_template=template, add_generation_prompt=prompt, **marks)
    except (TemplateError, TypeError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        roles = ", ".join(message["role"] for message in messages)
        problem = f"the tokenizer's chat template cannot write a conversation of {roles or 'no one'} ({reason})"
        raise ConfigError("task.template", "tokenizer", problem) from None
    return str(text)


def answers_of(messages: Messages, tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """A conversation as the tokenizer's chat template writes it, and from where to where its responses stand.

    Raises ConfigError where the template writes a turn differently once others follow: then no stretch of the text is
    what a model writes after the prompt.
    """
    whole = by_chat_template(tokenizer, messages)
    spans: list[tuple[int, int]] = []
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            asked = by_chat_template(tokenizer, messages[:number], prompt=True)
            answered = by_chat_template(tokenizer, messages[: number + 1])
            if not (answered.startswith(asked) and whole.startswith(answered)):
                raise ConfigError(
                    "task.template", "tokenizer",
                    f"the prompt of response {len(spans) + 1} is not the beginning of what the tokenizer's chat"
                    " template writes with the response",
                    "give conversations of one response, or take plain or chatml",
                )  # fmt: skip
            spans.append((len(asked), len(answered)))
    return whole, spans


# --------------------------------------------------------------------------------------------------- the encoder


class InstructionEncoder:
    """The beginning of a text, the conversation, and the end-of-text token after each response, which is learned too:
    it is how a model stops. What the tokenizer's own chat template writes has its own marks; only where it does not
    end the last response the end-of-text token is added.

    Where a conversation is too long its beginning goes first, down to half the room, and then its end.
    """

    def __init__(self, task: InstructionConfig, tokenizer: Any, max_seq_len: int) -> None:
        self.template, self.eos_id = task.template, special_ids(tokenizer)["eos"]
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
        tokens, learned = self._templated(messages) if self.template == "tokenizer" else self._rendered(messages)
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

    def _rendered(self, messages: Messages) -> tuple[list[int], list[bool]]:
        """Tokens, and which of them are learned."""
        pieces = rendered(messages, self.template)
        encodings = self.tokenizer.encode_batch([text for text, _ in pieces], add_special_tokens=False)
        tokens, learned = [begin_id(self.tokenizer)], [False]
        for (_, own), encoding in zip(pieces, encodings, strict=True):
            tokens += encoding.ids
            learned += [own] * len(encoding.ids)
            if own:
                tokens.append(self.eos_id)
                learned.append(True)
        return tokens, learned

    def _templated(self, messages: Messages) -> tuple[list[int], list[bool]]:
        """The same by the tokenizer's own chat template. What stands behind the end of a response is not learned."""
        text, spans = answers_of(messages, self.tokenizer)
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        tokens, learned = list(encoding.ids), [False] * len(encoding.ids)
        ended = True
        for begin, end in spans:
            ended = False
            for i, (start, _) in enumerate(encoding.offsets):
                if begin <= start < end and not ended:
                    learned[i], ended = True, tokens[i] == self.eos_id
        if not ended and spans[-1][1] == len(text):
            tokens.append(self.eos_id)
            learned.append(True)
        return tokens, learned
