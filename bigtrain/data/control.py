"""Control tokens, such as <|endoftext|> and [SEP]: a text is read without them, whatever it holds, and only a template
writes them.

The tokenizers library takes a token's spelling in a text for the token, unless it is told not to; and some models
(Unigram's of T5 and XLM-R are an example) find it in their vocabulary even then. For those the token has another
spelling in a copy of the tokenizer, which no text has.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bigtrain.data.tokenizer import special_ids, tokenizer_config

# Noncharacters of Unicode around a number that nobody can guess: no text has this by chance or intent.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"


def text_reader(tokenizer: Any, names: Sequence[str] | None = None) -> Any:
    """The tokenizer itself, or if need be a copy, in whose encodings of a text no control token is but those that the
    tokenizer puts around it. `names`: those of `control_tokens`, where they are known already."""
    tokenizer.encode_special_tokens = True
    names = control_tokens(tokenizer) if names is None else names
    if not _leaks(tokenizer, names):
        return tokenizer
    reader = _respelled(tokenizer, _spellings(names))
    reader.encode_special_tokens = True
    return reader


def leaks(tokenizer: Any) -> bool:
    """Whether `text_reader` is a copy: then its encodings are others than the tokenizer's own."""
    tokenizer.encode_special_tokens = True
    return _leaks(tokenizer, control_tokens(tokenizer))


class TemplateReader:
    """Encodes what a template has written around users' texts: its control tokens are tokens, those in the texts text.

    Texts are `guarded` before the template gets them, and what it writes is `marked` before it is encoded. `also` are
    tokens of the tokenizer that this template has for control tokens.
    """

    def __init__(self, tokenizer: Any, also: Sequence[str] = ()) -> None:
        self.marks = _spellings(sorted({*control_tokens(tokenizer), *also}))
        self._tokenizer = _respelled(tokenizer, self.marks)
        self._tokenizer.encode_special_tokens = False
        guards = _spellings([str(number) for number in range(len(self.marks))])
        self._guards = dict(zip(self.marks, guards.values(), strict=True))

    def guarded(self, text: str) -> str:
        return _replaced(text, self._guards)

    def unguarded(self, text: str) -> str:
        return _replaced(text, {guard: name for name, guard in self._guards.items()})

    def marked(self, text: str) -> str:
        return self.unguarded(_replaced(text, self.marks))

    def unmarked(self, text: str) -> str:
        return _replaced(text, {mark: name for name, mark in self.marks.items()})

    def encode(self, marked: str) -> Any:
        """The encoding of a marked text, to which its offsets refer."""
        return self._tokenizer.encode(marked, add_special_tokens=False)


def control_tokens(tokenizer: Any) -> list[str]:
    """The spellings of those that the tokenizer flags, that it or its directory names, or that are usual."""
    flagged = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    used = {tokenizer.id_to_token(number) for number in special_ids(tokenizer).values()}
    told = {name for name in _told(tokenizer_config(tokenizer)) if tokenizer.token_to_id(name) is not None}
    return sorted((flagged | used | told) - _unknown(tokenizer) - {""})


def _unknown(tokenizer: Any) -> set[str]:
    """What a model writes for what it does not know: it comes of any text, and models look for it by its spelling."""
    number = special_ids(tokenizer).get("unk")
    named = {tokenizer.id_to_token(number)} if number is not None else set()
    return named | {getattr(tokenizer.model, "unk_token", None) or ""}


def _told(config: Mapping[str, Any]) -> Iterator[str]:
    for key in ("additional_special_tokens", "extra_special_tokens"):
        found = config.get(key)
        for token in found.values() if isinstance(found, dict) else found if isinstance(found, list) else ():
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                yield token


def _leaks(tokenizer: Any, names: Sequence[str]) -> bool:
    """Whether a text that spells one of these tokens has it."""
    spelled = [(name, text) for name in names for text in (name, f"a {name} b", f"a{name}b")]
    found = tokenizer.encode_batch([text for _, text in spelled], add_special_tokens=False)
    return any(tokenizer.token_to_id(name) in each.ids for (name, _), each in zip(spelled, found, strict=True))


def _spellings(names: Sequence[str]) -> dict[str, str]:
    number = secrets.token_hex(8)
    return {name: f"{_OPEN}{number}{name}{_CLOSE}" for name in names}


def _respelled(tokenizer: Any, spellings: Mapping[str, str]) -> Any:
    """A copy in which tokens have other spellings, and the ids that they had."""
    described = json.loads(tokenizer.to_str())
    model, vocabulary = described["model"], described["model"]["vocab"]
    spelled = set(vocabulary) if isinstance(vocabulary, dict) else {token for token, _ in vocabulary}
    unknown = _unknown(tokenizer) & spelled  # the model's own business: no text spells it either
    added = [token for token in described["added_tokens"] if token["content"] not in unknown]
    for token in added:
        if token["content"] in spellings:
            token |= {"content": spellings[token["content"]], "special": True, "normalized": False}
    known = {token["content"] for token in added}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    for name, spelling in spellings.items():
        if spelling not in known:
            added.append({"id": tokenizer.token_to_id(name), "content": spelling, **plain})
    described["added_tokens"] = added
    if isinstance(vocabulary, dict):
        model["vocab"] = {spellings.get(token, token): number for token, number in vocabulary.items()}
    else:  # Unigram: [token, score], numbered by their order
        model["vocab"] = [[spellings.get(token, token), score] for token, score in vocabulary]
    if "merges" in model:
        merges = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
        model["merges"] = [pair for pair in merges if not spellings.keys() & {*pair, "".join(pair)}]
    copy = type(tokenizer).from_str(json.dumps(described))
    copy.config = tokenizer_config(tokenizer)
    return copy


def _replaced(text: str, by: Mapping[str, str]) -> str:
    """The longest of the keys goes first where several stand."""
    if not any(key in text for key in by):
        return text
    return re.sub("|".join(map(re.escape, sorted(by, key=len, reverse=True))), lambda found: by[found[0]], text)
