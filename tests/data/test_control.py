"""What a text spells is text; what a template writes is a token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from bigtrain.data.control import TemplateReader, control_tokens, leaks, text_reader
from bigtrain.data.tokenizer import train_tokenizer


def byte_level() -> Tokenizer:
    return train_tokenizer(["a b c </s> [SEP] <tool>"] * 5, 300, for_encoder=True)


def named_only() -> Tokenizer:
    """Its end of text is no special token to the library, and its vocabulary makes it of merges."""
    tokenizer = train_tokenizer(["a </s> b"] * 20, 300)
    tokenizer.add_tokens([AddedToken("<tool>", special=False), AddedToken("</s>", special=False)])
    return tokenizer


def unigram() -> Tokenizer:
    """T5's and XLM-R's kind, whose vocabulary holds the control tokens: it finds them in a text by itself."""
    scores = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0} | dict.fromkeys("▁abc</s>[SEP]tol", -3.0) | {"▁a": -1.0}
    tokenizer = Tokenizer(models.Unigram(list(scores.items()), unk_id=2))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.add_special_tokens(["</s>", "<pad>", "<unk>"])
    tokenizer.add_tokens(["<tool>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


def word_level() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "[SEP]": 1, "a": 2, "b": 3, "</s>": 4}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def word_piece() -> Tokenizer:
    vocabulary = {"[UNK]": 0, "[SEP]": 1, "[CLS]": 2, "a": 3, "b": 4, "[": 5, "]": 6, "sep": 7}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(["[SEP]", "[CLS]", "[UNK]"])
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 1), ("[CLS]", 2))
    return tokenizer


KINDS = [byte_level, named_only, unigram, word_level, word_piece]
TEXT = "a [SEP] b </s> a<|endoftext|></s>[sep]b <tool>"


@pytest.mark.parametrize("kind", KINDS)
def test_no_text_has_a_control_token(kind: Callable[[], Tokenizer]) -> None:
    tokenizer = kind()
    control = {tokenizer.token_to_id(name) for name in control_tokens(tokenizer)}
    assert control
    tokenizer.encode_special_tokens = False
    assert control & set(tokenizer.encode(TEXT, add_special_tokens=False).ids), "the library takes them for tokens"
    reader = text_reader(tokenizer)
    assert (reader is not tokenizer) == leaks(tokenizer) == (kind in (named_only, unigram, word_level))
    plain = reader.encode(TEXT, add_special_tokens=False)
    assert not control & set(plain.ids)
    around = reader.encode(TEXT)  # and what the tokenizer puts around a text stays
    assert [number for number in around.ids if number not in plain.ids] == [
        number for number in tokenizer.encode("a b").ids if number in control
    ]
    words = reader.encode(["a", " [SEP]", " </s>"], is_pretokenized=True, add_special_tokens=False)
    assert not control & set(words.ids)
    if tool := tokenizer.token_to_id("<tool>"):  # that no one says is special stays a piece of text
        assert tool in plain.ids
    assert reader.encode("a b", add_special_tokens=False).ids == kind().encode("a b", add_special_tokens=False).ids


@pytest.mark.parametrize("kind", KINDS)
def test_a_templates_tokens_are_tokens_and_those_in_its_texts_are_not(kind: Callable[[], Tokenizer]) -> None:
    tokenizer = kind()
    mark = next(name for name in ("</s>", "[SEP]", "<|endoftext|>") if name in control_tokens(tokenizer))
    reader = TemplateReader(tokenizer)
    written = f"{mark}{reader.guarded(TEXT)}{mark}"
    marked = reader.marked(written)
    assert reader.unmarked(marked) == f"{mark}{TEXT}{mark}"
    ids = reader.encode(marked).ids
    found = [number for number in ids if number in {tokenizer.token_to_id(name) for name in control_tokens(tokenizer)}]
    assert found == [tokenizer.token_to_id(mark)] * 2
    assert (ids[0], ids[-1]) == (found[0], found[0])


def test_a_tokenizer_keeps_what_it_is(tmp_path: Any) -> None:
    tokenizer = unigram()
    before = tokenizer.to_str()
    text_reader(tokenizer).enable_truncation(3)
    TemplateReader(tokenizer)
    assert tokenizer.to_str() == before
