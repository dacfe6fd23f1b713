"""Prompts and responses, or whole conversations -> token ids of which only the responses are targets.

What a message says is text, whatever it holds: only a template writes control tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bigtrain.config import InstructionConfig
from bigtrain.data.control import TemplateReader, text_reader
from bigtrain.data.examples import Example
from bigtrain.data.records import Record
from bigtrain.data.tokenizer import CHATML, begin_id, has_chatml, special_ids, tokenizer_config
from bigtrain.errors import ConfigError

NOT_SCORED = -100
START, END = CHATML
Messages = list[dict[str, str]]
CHAT_TEMPLATES = {  # what `Chat` writes, in the language of transformers
    "plain": (
        "{{ bos_token }}{% for message in messages %}{{ message['content'] }}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\\n' }}{% endif %}{% endfor %}"
    ),
    "chatml": (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "spelled chatml": (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
}


def exported_template(template: str, tokenizer: Any) -> str:
    """The chat template that goes along with a model that was trained with task.template=`template`."""
    if template == "tokenizer":
        return chat_template(tokenizer)
    if template == "chatml" and not has_chatml(tokenizer):
        return CHAT_TEMPLATES["spelled chatml"]
    text = CHAT_TEMPLATES[template]
    return text if Chat(template, tokenizer).begin else text.removeprefix("{{ bos_token }}")


def rendered(messages: Messages, template: str) -> list[tuple[str, bool]]:
    """Pieces of text in their order, and whether a model is to write them; the end-of-text token follows those.

    plain: each message and a line break. chatml: OpenAI's markup, spelled out for a tokenizer without its marks. What
    follows the last piece that is not to be written is where a model begins to write, so an unanswered conversation is
    a prompt.
    """
    pieces: list[tuple[str, bool]] = []
    for message in messages:
        own = message["role"] == "assistant"
        if template == "chatml":
            pieces.append((f"{START}{message['role']}\n", False))
            pieces.append((f"{message['content']}{END}" if own else f"{message['content']}{END}\n", own))
        else:
            pieces.append((message["content"] if own else f"{message['content']}\n", own))
    return pieces


# ----------------------------------------------------------------------------------- the tokenizer's own template


def chat_template(tokenizer: Any) -> str:
    """Raises ConfigError if it has none, or several and none of them is the default."""
    found = tokenizer_config(tokenizer).get("chat_template")
    if isinstance(found, list):  # several by name, as transformers has them
        found = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
    if isinstance(found, dict):
        if "default" not in found:
            names = ", ".join(map(str, found))
            raise ConfigError(
                "task.template", "tokenizer", f"the tokenizer has several chat templates ({names}), none named default",
                "name the one to take default in its tokenizer_config.json, or put it into chat_template.jinja",
            )  # fmt: skip
        found = found["default"]
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
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import render_jinja_template

    template = chat_template(tokenizer)
    marks = {f"{name}_token": tokenizer.id_to_token(number) for name, number in special_ids(tokenizer).items()}
    other = "or take plain or chatml"
    try:
        (text,), _ = render_jinja_template([messages], chat_template=template, add_generation_prompt=prompt, **marks)
    except TemplateSyntaxError as error:
        problem = f"the tokenizer's chat template does not parse: line {error.lineno}: {_first_line(error)}"
        raise ConfigError("task.template", "tokenizer", problem, f"mend it, {other}") from None
    except Exception as error:  # whatever its expressions raise: it is a program of someone else's
        roles = ", ".join(message["role"] for message in messages)
        problem = f"the tokenizer's chat template cannot write a conversation of {roles or 'no one'}"
        way_out = f"give conversations that it takes, {other}"
        raise ConfigError("task.template", "tokenizer", f"{problem} ({_first_line(error)})", way_out) from None
    return str(text)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ---------------------------------------------------------------------------------------------- one conversation


@dataclass(frozen=True)
class Prompt:
    """`ids` of what a model is given, and for people the text of each and the word that it belongs to."""

    ids: list[int]
    pieces: list[str]
    words: list[Any]


class Chat:
    """Conversations as token ids, by task.template: lines, ChatML, or the tokenizer's own chat template.

    A conversation begins with the token that begins a text (`begin`), but where the tokenizer's own template decides,
    and in ChatML where a tokenizer has none and ends its texts with <|im_end|>. A response ends with <|im_end|>, with
    the mark that the tokenizer's template writes, or else with the end-of-text token.

    `closing` is the control token that ends a response, None where the end-of-text token alone does; `closing_text` is
    what is spelled in several tokens there, or nothing. Raises ConfigError where the tokenizer has no chat template.
    """

    def __init__(self, template: str, tokenizer: Any) -> None:
        special = special_ids(tokenizer)
        self.template, self.tokenizer, self.eos_id = template, tokenizer, special["eos"]
        self.begin = [] if template == "tokenizer" else [begin_id(tokenizer)]
        self.closing: int | None = None
        self.closing_text = ""
        self._reader: TemplateReader | None = None
        if template == "tokenizer" or (template == "chatml" and has_chatml(tokenizer)):
            self._reader = TemplateReader(tokenizer, CHATML if template == "chatml" else ())
            end = END if template == "chatml" else _closing_mark(tokenizer)
            self.closing, self.closing_text = tokenizer.token_to_id(end) if end in self._reader.marks else None, end
            self.closing_text = "" if self.closing is not None else end
        elif template == "chatml":
            self.closing_text = END
        if template == "chatml" and self.begin == [self.closing]:
            self.begin = []  # as of Qwen's, whose conversations begin with <|im_start|>
        self._text: Any = text_reader(tokenizer) if self._reader is None else None

    def conversation(self, messages: Messages) -> tuple[list[int], list[bool]]:
        """Tokens, and which of them are learned."""
        return self._spelled(messages) if self._reader is None else self._marked(messages, self._reader)

    def prompt(self, prompt: str) -> Prompt:
        """What a model is given to answer a prompt."""
        messages = [{"role": "user", "content": prompt}]
        if self._reader is None:
            text = "".join(piece for piece, _ in rendered(messages, self.template))
            text += f"{START}assistant\n" if self.template == "chatml" else ""
            encoding = self._text.encode(text, add_special_tokens=False)
        else:
            text = self._written(messages, self._reader, prompt=True)
            encoding = self._reader.encode(text)
        begins = [self.tokenizer.id_to_token(number) for number in self.begin]
        pieces = [self._shown(text[start:end]) for start, end in encoding.offsets]
        pieces = [piece or token for piece, token in zip(pieces, encoding.tokens, strict=True)]
        return Prompt([*self.begin, *encoding.ids], begins + pieces, [None] * len(begins) + list(encoding.word_ids))

    def _shown(self, text: str) -> str:
        return text if self._reader is None else self._reader.unmarked(text)

    def _written(self, messages: Messages, reader: TemplateReader, prompt: bool = False) -> str:
        """A conversation with its control tokens marked."""
        if self.template == "tokenizer":
            guarded = [message | {"content": reader.guarded(message["content"])} for message in messages]
            return reader.marked(by_chat_template(self.tokenizer, guarded, prompt))
        start, end = reader.marks[START], reader.marks[END]
        turns = [f"{start}{message['role']}\n{message['content']}{end}\n" for message in messages]
        return "".join([*turns, f"{start}assistant\n" if prompt else ""])

    def _answers(self, messages: Messages, reader: TemplateReader) -> tuple[str, list[tuple[int, int]]]:
        """A conversation as the template writes it, and from where to where its responses stand.

        Raises ConfigError where the template writes a turn differently once others follow: then no stretch of the text
        is what a model writes after the prompt.
        """
        whole = self._written(messages, reader)
        spans: list[tuple[int, int]] = []
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                asked = self._written(messages[:number], reader, prompt=True)
                answered = self._written(messages[: number + 1], reader)
                which = f"response {len(spans) + 1}"
                if not answered.startswith(asked):
                    raise ConfigError(
                        "task.template", "tokenizer",
                        f"the prompt of {which} is not the beginning of what the tokenizer's chat template writes with"
                        " the response",
                        "mend the template (the end of the prompt is often an added <think>), or take plain or chatml",
                    )  # fmt: skip
                if not whole.startswith(answered):
                    raise ConfigError(
                        "task.template", "tokenizer",
                        f"the tokenizer's chat template writes {which} differently once other turns follow (as some"
                        " shorten what was thought)",
                        "give conversations of one response, or take plain or chatml",
                    )  # fmt: skip
                spans.append((len(asked), len(answered)))
        return whole, spans

    def _marked(self, messages: Messages, reader: TemplateReader) -> tuple[list[int], list[bool]]:
        """What stands behind the mark that ends a response is not learned. Where a template does not end the last one
        the end-of-text token is added."""
        text, spans = self._answers(messages, reader)
        encoding = reader.encode(text)
        tokens = [*self.begin, *encoding.ids]
        learned = [False] * len(tokens)
        ends = {self.eos_id, self.closing}
        ended = True
        for begin, end in spans:
            ended = False
            for i, (start, _) in enumerate(encoding.offsets, start=len(self.begin)):
                if begin <= start < end and not ended:
                    learned[i], ended = True, tokens[i] in ends
        if not ended and spans[-1][1] == len(text):
            tokens.append(self.eos_id)
            learned.append(True)
        return tokens, learned

    def _spelled(self, messages: Messages) -> tuple[list[int], list[bool]]:
        pieces = rendered(messages, self.template)
        encodings = self._text.encode_batch([text for text, _ in pieces], add_special_tokens=False)
        tokens, learned = list(self.begin), [False] * len(self.begin)
        for (_, own), encoding in zip(pieces, encodings, strict=True):
            tokens += encoding.ids
            learned += [own] * len(encoding.ids)
            if own:
                tokens.append(self.eos_id)
                learned.append(True)
        return tokens, learned


def _closing_mark(tokenizer: Any) -> str:
    """What the tokenizer's chat template writes after a response, before a line break or the end; or nothing."""
    asked, answer = {"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}
    chat_template(tokenizer)  # there has to be one
    try:
        return by_chat_template(tokenizer, [asked, answer]).rpartition("answer")[2].strip()
    except ConfigError:
        return ""  # it may want more than a question; what it cannot write at all is found with the first record


# --------------------------------------------------------------------------------------------------- the encoder


class InstructionEncoder:
    """A conversation's tokens up to the end of its last response, each target the token that follows.

    Where that is too long, the first prompt loses its beginning, down to half the room, and then the conversation its
    end. So a response always has the end of its prompt, and the end of one that was cut is not learned.
    """

    def __init__(self, task: InstructionConfig, tokenizer: Any, max_seq_len: int) -> None:
        self.chat, self.tokenizer = Chat(task.template, tokenizer), tokenizer
        self.length = min(task.max_length or max_seq_len, max_seq_len)
        self.cut = self.cut_prompts = self.cut_ends = self.left_out = self.count = 0

    def labels_of(self, record: Record) -> list[str]:
        return []

    def encode(self, records: Sequence[Record], label_ids: dict[str, int]) -> list[list[Example]]:
        self.tokenizer.no_truncation()
        return [self._example(record) for record in records]

    def notes(self) -> list[str]:
        found = []
        if self.chat.closing_text == END:
            found.append(
                f"the tokenizer has no tokens {START} and {END}: they are written as text, and an answer that holds one"
                " ends there; take a tokenizer that has them, or task.template=plain"
            )
        if self.chat.template == "tokenizer" and "strftime_now" in chat_template(self.tokenizer):
            found.append("the tokenizer's chat template writes the time: of the examples it is when they were prepared")
        if self.cut:
            lost = {
                "lost the beginning of their prompt": self.cut_prompts,
                "lost their end (the end of a response that was cut is not learned)": self.cut_ends,
            }
            parts = " and ".join(f"{count} {what}" for what, count in lost.items() if count)
            found.append(
                f"{self.cut} of {self.count} conversations are longer than {self.length} tokens: {parts}; raise"
                " model.max_seq_len or task.max_length"
            )
        if self.left_out:
            found.append(f"{self.left_out} of {self.count} conversations have no response to learn and were left out")
        return found

    def _example(self, record: Record) -> list[Example]:
        self.count += 1
        messages = record.get("messages") or [
            {"role": "user", "content": record["prompt"]},
            {"role": "assistant", "content": record["response"]},
        ]
        tokens, learned = self.chat.conversation(messages)
        targets = [token if own else NOT_SCORED for token, own in zip(tokens[1:], learned[1:], strict=True)]
        scored = [i for i, target in enumerate(targets) if target != NOT_SCORED]
        if not scored:
            self.left_out += 1
            return []
        tokens, targets = tokens[: scored[-1] + 1], targets[: scored[-1] + 1]
        over = len(tokens) - self.length
        if over > 0:
            self.cut += 1
            lost = min(over, max(0, scored[0] - self.length // 2))
            kept = len(self.chat.begin)
            tokens, targets = tokens[:kept] + tokens[kept + lost :], targets[:kept] + targets[kept + lost :]
            self.cut_prompts += lost > 0
            self.cut_ends += len(tokens) > self.length
            end = max(i for i, target in enumerate(targets[: self.length]) if target != NOT_SCORED) + 1
            tokens, targets = tokens[:end], targets[:end]
        return [{"tokens": tokens, "targets": targets}]
