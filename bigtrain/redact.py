"""Take secrets out of what leaves the machine: the config that wandb gets, the pages of a report."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

MASK = "***"
HELD_BACK = "BIGTRAIN_HELD_BACK"  # the variable that takes a config's secrets to the ranks, for their owner alone

# "token" is a secret, "tokens", "tokenizer" and "batch_tokens" are not: whole words only, at the end of the name.
_NAME = (
    r"(?:token|secrets?|password|passwd|passphrase|credentials?|authorization"
    r"|(?:api|access|private|secret|encryption)[_-]?key(?:[_-]?id)?)"
)
_SECRET_NAME = re.compile(rf"(?:^|[^a-z]){_NAME}$", re.IGNORECASE)
_ASSIGNMENT = re.compile(rf"(\b(?:[\w-]*[_-])?{_NAME}=)[^&\s'\",;]+", re.IGNORECASE)  # in a URL's query or a command
_URL_LOGIN = re.compile(r"\b([a-z][a-z0-9+.-]*://)[^/\s@]+@", re.IGNORECASE)
_KNOWN_KEYS = re.compile(r"\b(?:hf_\w{20,}|sk-[\w-]{20,}|gh[pousr]_\w{20,}|github_pat_\w{20,}|AKIA[A-Z0-9]{16})")
_SHORTEST_VALUE = 6  # an environment value shorter than this is in every other word


def is_secret_name(name: str) -> bool:
    """Whether a key, option or environment variable of this name holds a secret (HF_TOKEN, apiKey, db.password)."""
    return bool(_SECRET_NAME.search(re.sub(r"([a-z])([A-Z])", r"\1_\2", name)))


def redact(data: Any, also: Mapping[str, str] | None = None) -> Any:
    """A copy of plain data (dicts, lists, scalars) in which secrets read `***`.

    Secret are: values under a secret's name, logins in URLs, `name=value` of such names, keys of well-known shapes,
    and wherever it stands the value of an environment variable with such a name. `also`: variables to be set.
    """
    variables = [*os.environ.items(), *(also or {}).items()]
    values = {value for name, value in variables if is_secret_name(name) and len(value) >= _SHORTEST_VALUE}
    return _redact(data, sorted(values, key=len, reverse=True))


def differences(data: Any, clean: Any, path: tuple[Any, ...] = ()) -> list[Any]:
    """Where `data` and its redacted copy differ: [[path of keys, value] ...]."""
    if isinstance(data, dict) and list(data) == list(clean):
        parts = [differences(value, clean[key], (*path, key)) for key, value in data.items()]
    elif isinstance(data, list) and isinstance(clean, list):
        parts = [
            differences(old, new, (*path, index)) for index, (old, new) in enumerate(zip(data, clean, strict=True))
        ]
    else:
        return [] if data == clean else [[list(path), data]]
    return [difference for part in parts for difference in part]


def _redact(data: Any, values: list[str]) -> Any:
    if isinstance(data, dict):
        return {
            _redact(key, values): MASK
            if is_secret_name(str(key)) and isinstance(item, (str, int, float)) and not isinstance(item, bool)
            else _redact(item, values)
            for key, item in data.items()
        }
    if isinstance(data, (list, tuple)):
        return [_redact(item, values) for item in data]
    if not isinstance(data, str):
        return data
    for value in values:
        data = data.replace(value, MASK)
    data = _URL_LOGIN.sub(rf"\1{MASK}@", data)
    data = _ASSIGNMENT.sub(rf"\1{MASK}", data)
    return _KNOWN_KEYS.sub(MASK, data)
