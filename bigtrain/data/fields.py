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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bigtrain.data.tables import Table, is_number
from bigtrain.errors import NO_VALUE, ConfigError, nearest, unknown_key

Kind = Literal["text", "texts", "label", "number", "labels", "answers", "messages"]
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
        Field("id", "text", ("qid", "question_id"), optional=True),
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

ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}  # ShareGPT's and others' names
KNOWN_ROLES = ("system", "user", "assistant", "tool")


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
        if field.name in found or (
            field.optional and field.kind == "text" and field.name != "id" and not guess_more_text
        ):
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
            value = _cell(row, columns[field.name], field, fail)
            if value is not None or field.kind == "answers":
                found[field.name] = _CONVERT[field.kind](value, field.name, fail)
            elif not field.optional:
                raise fail(
                    f"no {field.name}" + (f" ({columns[field.name]})" if columns[field.name] != field.name else ""), ""
                )
    if task == "tagging":
        _check_lengths(found, fail)
    elif task == "question_answering":
        found = {"id": found.pop("id", number), **found}
        check_answers(found["context"], found["answers"], fail)
    elif task == "instruction" and "input" in found:
        found["prompt"] = f"{found['prompt']}\n\n{found.pop('input')}"
    return found


def _cell(row: dict[str, Any], column: str, field: Field, fail: Failure) -> Any:
    if column in row:
        value = row[column]
    else:  # a.b: b inside the object a, as translation sets have {translation: {en, de}}
        value = row
        for part in column.split("."):
            value = value.get(part) if isinstance(value, dict) else None
    empty = value is None or (isinstance(value, str) and not value.strip())
    if empty and isinstance(value, str) and not field.optional and field.kind != "answers":
        raise fail(f"empty {field.name}", "remove the row, or fill it in")
    return None if empty else value


def _text(value: Any, name: str, fail: Failure) -> str:
    if not isinstance(value, str):
        if name == "id":
            return str(value)
        raise fail(f"{name} is {type(value).__name__}, text is wanted", "")
    return value


def _texts(value: Any, name: str, fail: Failure) -> list[str]:
    words = value.split() if isinstance(value, str) else value
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise fail(f"{name} is not a list of words", "")
    if not words or not all(word.strip() for word in words):
        raise fail(f"empty {name}" if not words else f"{name} has an empty word", "")
    return words


def _label(value: Any, name: str, fail: Failure) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a column of whole numbers with gaps comes out of pandas as floats
    if not isinstance(value, (str, int, float)):
        raise fail(f"{name} is {type(value).__name__}, one word or number is wanted", "")
    return str(value).strip()


def _labels(value: Any, name: str, fail: Failure) -> list[str]:
    labels = value.split() if isinstance(value, str) else value
    if not isinstance(labels, list):
        raise fail(f"{name} is {type(value).__name__}, a list is wanted", "")
    return [_label(label, name, fail) for label in labels]


def _number(value: Any, name: str, fail: Failure) -> float:
    if isinstance(value, bool) or not is_number(value) or not math.isfinite(float(value)):
        raise fail(f"{name} is {value!r}, a number is wanted", "or task.regression=false for names")
    return float(value)


def _messages(value: Any, name: str, fail: Failure) -> list[dict[str, str]]:
    messages = []
    for number, message in enumerate(value if isinstance(value, list) else [None], start=1):
        if not isinstance(message, dict):
            raise fail(f"{name} is not a list of {{role, content}}", "")
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        role = ROLES.get(str(role), role)
        if role not in KNOWN_ROLES:
            raise fail(f"message {number} has the role {role!r}", f"one of {', '.join(KNOWN_ROLES)}")
        if not isinstance(content, str) or not content.strip():
            raise fail(f"message {number} has no content", "")
        messages.append({"role": role, "content": content})
    if not any(message["role"] == "assistant" for message in messages):
        raise fail(f"{name} has no answer of the assistant to learn from", "")
    return messages


def _answers(value: Any, name: str, fail: Failure) -> list[dict[str, Any]]:
    """SQuAD's [{text, answer_start}], datasets' {text: [...], answer_start: [...]}, or either as JSON in a cell."""
    problem = f"{name} is not a list of {{text, start}}"
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise fail(f"{problem} as JSON", 'as [{"text": "Paris", "start": 17}]') from None
    if isinstance(value, dict) and isinstance(value.get("text"), list):
        starts = value.get("answer_start", value.get("start"))
        if not isinstance(starts, list) or len(starts) != len(value["text"]):
            raise fail(f"{name} has not as many starts as texts", "")
        value = [{"text": text, "start": start} for text, start in zip(value["text"], starts, strict=True)]
    found = []
    for answer in value if isinstance(value, list) else [value] if value is not None else []:
        if not isinstance(answer, dict):
            raise fail(problem, "")
        text, start = answer.get("text"), answer.get("start", answer.get("answer_start"))
        if not isinstance(text, str) or not isinstance(start, int) or isinstance(start, bool):
            raise fail(problem, "")
        found.append({"text": text, "start": start})
    return found


def _check_lengths(found: dict[str, Any], fail: Failure) -> None:
    words, tags = found["words"], found["tags"]
    if len(words) != len(tags):
        raise fail(f"{len(words)} words and {len(tags)} tags", "each word needs one tag")


def check_answers(context: str, answers: list[dict[str, Any]], fail: Failure) -> None:
    """Raises what `fail` makes where the context does not hold an answer's text at its start (in characters)."""
    for answer in answers:
        text, start = answer["text"], answer["start"]
        stands = context[start : start + len(text)] if start >= 0 else ""
        if not text or stands != text:
            at = context.find(text) if text else -1
            way_out = f"it stands at {at}" if at >= 0 else "the context does not hold it"
            shown = repr(stands) if stands else "nothing"
            raise fail(
                f"the answer {text!r} is said to start at {start}, where {shown} stands", way_out if text else ""
            )


_CONVERT: dict[str, Callable[[Any, str, Failure], Any]] = {
    "text": _text,
    "texts": _texts,
    "label": _label,
    "number": _number,
    "labels": _labels,
    "answers": _answers,
    "messages": _messages,
}
