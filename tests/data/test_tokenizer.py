"""The tokenizer: trained the same each time, loaded from every place that may hold one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from bigtrain.config import TokenizerConfig
from bigtrain.data.tokenizer import (
    END_OF_TEXT,
    END_TOKENS,
    begin_id,
    find_tokenizer,
    load_tokenizer,
    special_ids,
    tokenizer_identity,
    train_tokenizer,
    vocabulary_size,
)
from bigtrain.errors import ConfigError
from tests.data.samples import ROOT, documents


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(documents(10), 400)


def word_tokenizer(*tokens: str) -> Tokenizer:
    return Tokenizer(models.WordLevel({token: number for number, token in enumerate(("a", *tokens))}, unk_token="a"))


def test_every_text_survives(tokenizer: Tokenizer) -> None:
    for text in (*documents(12)[10:], "é ∑ 🦊 \0 \r\n\t", " two  spaces"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert vocabulary_size(tokenizer) == 400
    assert tokenizer.token_to_id(END_OF_TEXT) == 0


def test_training_is_deterministic(tokenizer: Tokenizer) -> None:
    """In another process too: hash seeds and thread timing must not show."""
    script = (
        "import sys\n"
        "from bigtrain.data.tokenizer import train_tokenizer\n"
        "from tests.data.samples import ROOT, documents\n"
        "sys.stdout.write(train_tokenizer(documents(10), 400).to_str())\n"
    )
    for _ in range(2):
        command = [sys.executable, "-c", script]
        other = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, cwd=ROOT).stdout
        assert other == tokenizer.to_str()


@pytest.mark.parametrize("place", ["tokenizer.json", "", "other.json"])
def test_loads_from_file_directory_and_run(tmp_path: Path, tokenizer: Tokenizer, place: str) -> None:
    tokenizer.save(str(tmp_path / (place or "tokenizer.json")))
    loaded, eos_id = load_tokenizer(str(tmp_path / place))
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert eos_id == 0


def test_loads_from_a_run(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "tokenizer").mkdir()
    tokenizer.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    assert load_tokenizer(str(tmp_path))[0].get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("token", END_TOKENS)
def test_usual_end_tokens_are_found(tmp_path: Path, token: str) -> None:
    word_tokenizer("b", token).save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(str(tmp_path))[1] == 2


@pytest.mark.parametrize("form", ["<stop>", {"content": "<stop>"}])
def test_the_directory_says_which_token_ends_text(tmp_path: Path, form: object) -> None:
    word_tokenizer("</s>", "<stop>").save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": form}))
    assert load_tokenizer(str(tmp_path))[1] == 2


def test_the_directory_says_which_tokens_are_special(tmp_path: Path) -> None:
    """As Qwen2.5-Instruct's does: its vocabulary has <|endoftext|> too, which pads."""
    word_tokenizer(END_OF_TEXT, "<|im_end|>", "<what>", "<s>").save(str(tmp_path / "tokenizer.json"))
    assert special_ids(find_tokenizer(str(tmp_path))) == {"cls": 4, "eos": 1, "bos": 4}
    plain = tokenizer_identity(TokenizerConfig(), find_tokenizer(str(tmp_path)), False)
    told = {"eos_token": "<|im_end|>", "pad_token": END_OF_TEXT, "unk_token": {"content": "<what>"}, "bos_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(told))
    tokenizer, eos_id = load_tokenizer(str(tmp_path))
    assert special_ids(tokenizer) == {"cls": 4, "eos": 2, "pad": 1, "unk": 3}
    assert eos_id == begin_id(tokenizer) == 2
    assert tokenizer_identity(TokenizerConfig(), tokenizer, False) != plain, "other token ids, other examples"


def test_a_text_begins_with_the_token_for_that_where_there_is_one(tmp_path: Path, tokenizer: Tokenizer) -> None:
    word_tokenizer("</s>", "<s>").save(str(tmp_path / "tokenizer.json"))
    assert begin_id(find_tokenizer(str(tmp_path))) == 2
    assert begin_id(tokenizer) == 0  # our own have <|endoftext|> alone


def test_a_broken_tokenizer_config_says_nothing(tmp_path: Path) -> None:
    word_tokenizer("</s>").save(str(tmp_path / "tokenizer.json"))
    for text in ("[1]", "{", '{"eos_token": 7}', '{"eos_token": "<gone>"}'):
        (tmp_path / "tokenizer_config.json").write_text(text)
        assert load_tokenizer(str(tmp_path))[1] == 1


def test_padding_and_truncation_of_the_file_are_off(tmp_path: Path, tokenizer: Tokenizer) -> None:
    other = Tokenizer.from_str(tokenizer.to_str())
    other.enable_truncation(4)
    other.enable_padding(length=100)
    other.save(str(tmp_path / "tokenizer.json"))
    text = documents(1)[0]
    assert load_tokenizer(str(tmp_path))[0].encode(text).ids == tokenizer.encode(text).ids


def test_gaps_in_the_ids_count_as_rows(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "</s>": 70_000}, unk_token="a"))
    assert vocabulary_size(tokenizer) == 70_001


def test_what_is_no_tokenizer_is_one_clear_line(tmp_path: Path) -> None:
    cases = {
        "nothing.json": (None, "no such file or directory"),
        "a.json": ("{}", "no tokenizer"),
        "b.json": ("not json", "no tokenizer"),
        "c.json": (word_tokenizer("b").to_str(), "no end-of-text token; one of <|endoftext|>"),
    }
    for name, (text, problem) in cases.items():
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(ConfigError) as raised:
            load_tokenizer(str(tmp_path / name))
        line = str(raised.value)
        assert line.startswith("data.tokenizer.path=")
        assert problem in line
        assert "\n" not in line
    with pytest.raises(ConfigError, match=r"no tokenizer\.json in this directory"):
        load_tokenizer(str(tmp_path))


def test_offline_hub_name_fails_at_once(tmp_path: Path) -> None:
    script = (
        "import time\n"
        "from bigtrain.data.tokenizer import load_tokenizer\n"
        "start = time.time()\n"
        "try:\n"
        "    load_tokenizer('nobody/no-such-model-here')\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, error, time.time() - start < 15)\n"
    )
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": ""}
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=env)
    assert out.stdout.startswith("ConfigError data.tokenizer.path='nobody/no-such-model-here': no such file")
    assert "hub cannot be reached" in out.stdout
    assert out.stdout.endswith("True\n")
    assert out.stderr == ""
