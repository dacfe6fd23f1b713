"""What a record of each task is made of, which column of a file holds it, and turning a column's value into it.

Records, by task:

- classification: {text, text_pair (where there is one), label}; regression: the same with a number for a label;
- tagging: {words: [...], tags: [...]}, one tag for each word;
- question_answering: {id, question, context, answers: [{text, start}]}, no answers where the context holds none;
- seq2seq: {source, target};
- instruction: {prompt, response}, or {messages: [{role, content}, ...]}.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

from bigtrain.data.tables import Table, is_number
from bigtrain.errors import NO_VALUE, ConfigError, nearest, unknown_key

Kind = Literal["text", "name", "texts", "label", "number", "labels", "answers", "messages"]
Failure = Callable[[str, str], ConfigError]  # problem, way out -> the error that names file and line


@dataclass(frozen=True)
class Field:
    """`aliases` are the column names that it is looked for under, after its own, the most telling first."""

    name: str
    kind: Kind
    aliases: tuple[str, ...] = ()
    optional: bool = False


_TEXT = Field(
    "text", "text",
    ("sentence", "sentence1", "premise", "question1", "text_a", "text1", "review", "content", "tweet", "utterance",
     "comment", "document", "description", "body", "question", "title"),
)  # fmt: skip
_TEXT_PAIR = Field(
    "text_pair", "text",
    ("sentence2", "hypothesis", "question2", "text_b", "text2", "passage", "question"), optional=True,
)  # fmt: skip

FIELDS: dict[str, tuple[Field, ...]] = {
    "classification": (
        _TEXT,
        _TEXT_PAIR,
        Field("label", "label", (
            "target", "class", "category", "gold_label", "sentiment", "intent", "score", "stars", "rating", "y",
        )),
    ),
    "regression": (
        _TEXT,
        _TEXT_PAIR,
        Field("label", "number", ("score", "target", "similarity", "rating", "stars", "value", "y")),
    ),
    "tagging": (
        Field("words", "texts", ("tokens", "token", "word", "text", "sentence")),
        Field("tags", "labels", ("ner_tags", "labels", "pos_tags", "upos", "chunk_tags", "ner", "pos", "tag", "label")),
    ),
    "question_answering": (
        Field("id", "name", ("qid", "question_id"), optional=True),
        Field("question", "text", ("query",)),
        Field("context", "text", ("passage", "paragraph", "document")),
        Field("answers", "answers", ("answer",)),
    ),
    "seq2seq": (
        Field("source", "text", ("src", "input", "article", "document", "dialogue", "text", "question")),
        Field("target", "text", ("tgt", "output", "summary", "highlights", "title", "answer")),
    ),
    "instruction": (
        Field("prompt", "text", ("instruction", "question", "query")),
        Field("input", "text", ("context",), optional=True),  # Alpaca's: what the instruction is to be applied to
        Field("response", "text", ("output", "completion", "answer", "target")),
        Field("messages", "messages", ("conversations", "conversation"), optional=True),
    ),
}  # fmt: skip

ROLES = {  # ShareGPT's, OpenAI's and others' names
    "human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "developer": "system",
    "function": "tool",
}  # fmt: skip
KNOWN_ROLES = ("system", "user", "assistant", "tool")
TEXT_PARTS = ("text", "input_text", "output_text")  # what a part of a message's content is called that is text
# What a message may have besides, and would be lost without a word.
NOT_READ = {
    "tool_calls": "write the call into content, or leave the conversation out",
    "function_call": "write the call into content, or leave the conversation out",
    "reasoning_content": "write it into content, as <think>...</think>, or remove it",
    "reasoning": "write it into content, as <think>...</think>, or remove it",
    "thinking": "write it into content, as <think>...</think>, or remove it",
    "images": "leave the conversation out",
    "audio": "leave the conversation out",
}
GAP = "remove the row, or fill it in"


def known_names(task: str) -> set[str]:
    """Every column name that a field of the task is looked for under."""
    return {name for field in FIELDS[task] for name in (field.name, *field.aliases)}


# -------------------------------------------------------------------------------------------------- columns


def resolve(task: str, table: Table, given: dict[str, Any], path: Path) -> dict[str, str]:
    """Field name -> the column of this table that holds it; `given` (data.columns) goes first, then names and aliases.

    Raises ConfigError for a column that is not there, and for a field that no column was found for.
    """
    fields = {field.name: field for field in FIELDS[task]}
    for name in given:
        if name not in fields:
            raise unknown_key(f"data.columns.{name}", fields)
    found = {name: _given(name, column, table, path) for name, column in given.items()}
    if len(table.names) == 2 and not table.header and not found:
        return _two_columns(task, table, path)
    by_lower = {name.strip().lower(): name for name in reversed(table.names)}
    guess_more_text = not any(fields[name].kind == "text" for name in given)
    for field in fields.values():
        if field.name in found or (field.optional and field.kind == "text" and not guess_more_text):
            continue
        for alias in (field.name, *field.aliases):
            column = by_lower.get(alias)
            if column is not None and column not in found.values():
                found[field.name] = column
                break
    if "messages" in found and ("messages" in given or not given):
        return {"messages": found["messages"]}
    found.pop("messages", None)
    missing = [field.name for field in fields.values() if field.name not in found and not field.optional]
    if missing:
        raise _not_found(missing, table, path)
    return found


def _given(name: str, column: Any, table: Table, path: Path) -> str:
    text = str(column)
    if text in table.names or ("." in text and text.split(".")[0] in table.names):
        return text
    if text.isdigit() and int(text) < len(table.names):
        return table.names[int(text)]
    close = nearest(text, table.names)
    raise ConfigError(
        f"data.columns.{name}", column, f"no such column in {path}",
        f"did you mean {close}?" if close and table.header else f"there are: {_listed(table)}",
    )  # fmt: skip


def _not_found(missing: list[str], table: Table, path: Path) -> ConfigError:
    wanted = ", ".join(missing)
    example = ", ".join(f"{name}: {'COLUMN' if table.header else number}" for number, name in enumerate(missing))
    return ConfigError(
        "data.columns", NO_VALUE, f"{path} has no column that is known to hold {wanted}",
        f"there are: {_listed(table)}; name it: data.columns={{{example}}}",
    )  # fmt: skip


def _listed(table: Table) -> str:
    if table.header:
        return ", ".join(table.names)
    return (
        f"columns 0 to {len(table.names) - 1} (the file has no header line)" if len(table.names) > 1 else "one column"
    )


def _two_columns(task: str, table: Table, path: Path) -> dict[str, str]:
    """Which column is which in a file of two without names: the label is the one of few values, or of numbers."""
    fields = [field for field in FIELDS[task] if not field.optional]
    if task not in ("classification", "regression"):
        if len(fields) != 2:
            raise _not_found([field.name for field in fields], table, path)
        return dict(zip([field.name for field in fields], table.names, strict=True))
    columns = {name: [row.get(name, "") for row in table.head] for name in table.names}
    labels = _label_columns(columns, numbers=task == "regression")
    if len(labels) != 1:
        which = "either" if labels else "neither"
        raise ConfigError(
            "data.columns", NO_VALUE, f"{path} has no header line, and {which} of its 2 columns looks like the label",
            "say which it is: data.columns={text: 0, label: 1}",
        )  # fmt: skip
    text = next(name for name in table.names if name not in labels)
    return {"text": text, "label": labels[0]}


def _label_columns(columns: dict[str, list[Any]], numbers: bool) -> list[str]:
    """Those that could hold the label: numbers where they are wanted, else fewest values, else no spaces."""
    if numbers:
        return [name for name, values in columns.items() if sum(map(is_number, values)) * 2 > len(values)]
    distinct = {name: len(set(values)) for name, values in columns.items()}
    few = [name for name, count in distinct.items() if count == min(distinct.values())]
    words = [name for name in few if not any(" " in value.strip() for value in columns[name])]
    return few if len(few) == 1 or not words else words


# --------------------------------------------------------------------------------------------------- values


def record(task: str, row: dict[str, Any], columns: dict[str, str], number: str, fail: Failure) -> dict[str, Any]:
    """One row -> one record of the task. `number` names a question without an id. Raises what `fail` makes."""
    found: dict[str, Any] = {}
    for field in FIELDS[task]:
        if field.name in columns:
            called = _called(field.name, columns[field.name])
            value = _cell(row, columns[field.name], field)
            if value is not None or field.kind == "answers":
                found[field.name] = _CONVERT[field.kind](value, called, fail)
            elif not field.optional:
                raise fail(f"no {called}", GAP)
    if task == "tagging":
        _check_lengths(found, columns, fail)
    elif task == "question_answering":
        found = {"id": found.pop("id", number), **found}
        check_answers(found["context"], found["answers"], fail)
    elif task == "instruction" and "input" in found:
        found["prompt"] = f"{found['prompt']}\n\n{found.pop('input')}"
    return found


def _called(name: str, column: str) -> str:
    """What a message calls a field: the user's column, with ours where that does not tell."""
    if column == name:
        return name
    return f"column {column} ({name})" if column.isdigit() else f"{column} ({name})"


def _cell(row: dict[str, Any], column: str, field: Field) -> Any:
    """The value, None for a gap: null, NaN (which is how pandas writes one), or nothing but blanks."""
    if column in row:
        value = row[column]
    else:  # a.b: b inside the object a, as translation sets have {translation: {en, de}}
        value = row
        for part in column.split("."):
            value = value.get(part) if isinstance(value, dict) else None
    return None if is_gap(value) else value


def is_gap(value: object) -> bool:
    if isinstance(value, (float, Decimal)):
        return math.isnan(value)
    return value is None or (isinstance(value, str) and not value.strip())


def _text(value: Any, name: str, fail: Failure) -> str:
    if not isinstance(value, str):
        quoted = f'write it in quotes: "{value}"' if isinstance(value, (int, float)) else ""
        messages = "name a column of whole conversations: data.columns={messages: COLUMN}"
        raise fail(f"{name} is {_type(value)}, text is wanted", quoted or (messages if _is_chat(value) else ""))
    return value


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) and "content" in item for item in value)


def _type(value: object) -> str:
    return "null" if value is None else type(value).__name__


def _name(value: Any, name: str, fail: Failure) -> str:
    return str(value)


def _texts(value: Any, name: str, fail: Failure) -> list[str]:
    words = value.split() if isinstance(value, str) else value
    if not isinstance(words, list):
        raise fail(f"{name} is {_type(words)}, a list of words is wanted", "")
    if not words:
        raise fail(f"empty {name}", GAP)
    for number, word in enumerate(words, start=1):
        if not isinstance(word, str):
            raise fail(f"{name}: word {number} is {_type(word)}, text is wanted", f'write it in quotes: "{word}"')
        if not word.strip():
            raise fail(f"{name} has an empty word, number {number}", "remove it and its tag")
    return words


def _label(value: Any, name: str, fail: Failure) -> str:
    if is_gap(value) or (isinstance(value, (float, Decimal)) and not math.isfinite(value)):
        raise fail(f"{name} is {'null' if value is None else repr(value)}, which is no label", GAP)
    if not isinstance(value, (str, int, float, Decimal)):
        raise fail(f"{name} is {_type(value)}, one word or number is wanted", "")
    return same_label(value)


def same_label(value: str | int | float | Decimal) -> str:
    """The label as every format has it: 1.0, which is how pandas writes 1 in a column with gaps, is 1; true is True."""
    text = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()
    if re.fullmatch(r"-?(0|[1-9][0-9]*)\.0+", text):
        text = text.partition(".")[0]
    if text == "-0":
        return "0"
    return text.capitalize() if text.lower() in ("true", "false") else text


def _labels(value: Any, name: str, fail: Failure) -> list[str]:
    labels = value.split() if isinstance(value, str) else value
    if not isinstance(labels, list):
        raise fail(f"{name} is {_type(value)}, a list is wanted", "")
    return [_label(label, f"{name}: tag {number}", fail) for number, label in enumerate(labels, start=1)]


def _number(value: Any, name: str, fail: Failure) -> float:
    if isinstance(value, bool) or not is_number(value) or not math.isfinite(float(value)):
        raise fail(f"{name} is {value!r}, a number is wanted", "mend it, or take task.regression=false for names")
    return float(value)


def _messages(value: Any, name: str, fail: Failure) -> list[dict[str, str]]:
    if not isinstance(value, list):
        raise fail(f"{name} is {_type(value)}, a list of {{role, content}} is wanted", "")
    messages = []
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict):
            raise fail(f"{name}: message {number} is {_type(message)}, {{role, content}} is wanted", "")
        where = f"{name}: message {number}"
        role = message.get("role", message.get("from"))
        role = ROLES.get(str(role), role)
        if role not in KNOWN_ROLES:
            raise fail(f"{where} has the role {role!r}", f"one of {', '.join((*KNOWN_ROLES, *ROLES))}")
        for key, way_out in NOT_READ.items():
            if message.get(key):
                raise fail(f"{where} has {key}, which is not read", way_out)
        if message.get("weight") == 0 or message.get("train") is False:
            raise fail(f"{where} is not to be learned, every answer is", "leave out weight and train, or the message")
        key = "content" if "content" in message else "value" if "value" in message else "content"
        content = _content(message.get(key), f"{where}: its {key}", fail)
        if not content.strip():
            raise fail(f"{where} has no {key}", "remove the message, or fill it in")
        messages.append({"role": role, "content": content})
    if not any(message["role"] == "assistant" for message in messages):
        raise fail(f"{name} has no answer of the assistant to learn from", "remove the row")
    return messages


def _content(value: Any, name: str, fail: Failure) -> str:
    """The text of a message: itself, or a list of parts (OpenAI's newer form), each text part on lines of its own."""
    if value is None or isinstance(value, str):
        return value or ""
    texts = []
    for part in value if isinstance(value, list) else [value]:
        if isinstance(part, dict) and part.get("type", "text") in TEXT_PARTS and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and part.get("type", "text") not in TEXT_PARTS:
            raise fail(f"{name} has a part of the type {part['type']!r}, only text is read", "leave the row out")
        else:
            raise fail(f"{name} is neither text nor a list of parts of text", 'as {"type": "text", "text": "..."}')
    return "\n".join(texts)


def _answers(value: Any, name: str, fail: Failure) -> list[dict[str, Any]]:
    """SQuAD's [{text, answer_start}], datasets' {text: [...], answer_start: [...]}, or either as JSON in a cell."""
    as_json = 'as [{"text": "Paris", "answer_start": 17}], or [] where there is no answer'
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise fail(f"{name} is no list of answers as JSON", as_json) from None
    if isinstance(value, dict) and isinstance(value.get("text"), list):
        key = _start_key(value)
        texts, starts = value["text"], value.get(key)
        if not isinstance(starts, list) or len(starts) != len(texts):
            has = f"{len(starts)} of {key}" if isinstance(starts, list) else f"no list {key}"
            raise fail(f"{name} has {len(texts)} of text and {has}", "each text needs the place where it starts")
        value = [{"text": text, key: start} for text, start in zip(texts, starts, strict=True)]
    found = []
    for number, answer in enumerate(value if isinstance(value, list) else [value] if value is not None else [], 1):
        where = f"{name}: answer {number}" if isinstance(value, list) and len(value) > 1 else name
        if not isinstance(answer, dict):
            raise fail(f"{where} is {_type(answer)}, an object with text and answer_start is wanted", as_json)
        key = _start_key(answer)
        text, start = answer.get("text"), answer.get(key)
        start = int(start) if isinstance(start, float) and start.is_integer() else start
        if not isinstance(text, str):
            raise fail(f"{where} has {_no('text', answer)}, text is wanted", as_json)
        if not isinstance(start, int) or isinstance(start, bool):
            raise fail(f"{where} has {_no(key, answer)}, the number of a character is wanted", as_json)
        found.append({"text": text, "start": start})
    return found


def _start_key(answer: dict[str, Any]) -> str:
    return "start" if "start" in answer and "answer_start" not in answer else "answer_start"


def _no(key: str, answer: dict[str, Any]) -> str:
    """How a message says that an object has not what is wanted of a key."""
    if key not in answer:
        return f"no {key}"
    return f"{key} {'null' if answer[key] is None else repr(answer[key])}"


def _check_lengths(found: dict[str, Any], columns: dict[str, str], fail: Failure) -> None:
    words, tags = found["words"], found["tags"]
    if len(words) != len(tags):
        called = [_called(name, columns[name]) for name in ("words", "tags")]
        raise fail(f"{len(words)} in {called[0]}, {len(tags)} in {called[1]}", "each word needs one tag")


def check_answers(context: str, answers: list[dict[str, Any]], fail: Failure) -> None:
    """Raises what `fail` makes where the context does not hold an answer's text at its start (in characters)."""
    for answer in answers:
        text, start = answer["text"], answer["start"]
        if not text:
            raise fail("the text of an answer is empty", "answers is [] where there is no answer")
        stands = context[start : start + len(text)] if start >= 0 else ""
        if stands != text:
            at = context.find(text)
            way_out = f"it stands at {at}" if at >= 0 else "the context does not hold it"
            shown = repr(stands) if stands else "nothing"
            raise fail(f"the answer {text!r} is said to start at {start}, where {shown} stands", way_out)


_CONVERT: dict[str, Callable[[Any, str, Failure], Any]] = {
    "text": _text,
    "name": _name,
    "texts": _texts,
    "label": _label,
    "number": _number,
    "labels": _labels,
    "answers": _answers,
    "messages": _messages,
}
