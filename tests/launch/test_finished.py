"""A finished run answers for the data that it was trained on, and for no other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bigtrain.config import Config, TextDataConfig
from bigtrain.errors import BigtrainError, ConfigError
from bigtrain.launch import train

BEFORE = Config(run_dir="/run", data=TextDataConfig(path="a.txt", prepared_dir="/cache/old"))
ASKED = replace(BEFORE, data=TextDataConfig(path="a.txt"))  # not prepared yet
RESULT = {"train/steps": 6}


def data_now(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(train, "_prepared_at", lambda config: Path("/elsewhere", name))


def test_the_same_data_in_another_cache_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    data_now(monkeypatch, "old")
    train._check_finished(ASKED, BEFORE, None, RESULT, pytest.fail)


def test_other_data_are_told_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    data_now(monkeypatch, "new")
    with pytest.raises(ConfigError, match=r"data \(fingerprint\) is old there, new here\); .*resume_allow=\[data\]"):
        train._check_finished(ASKED, BEFORE, None, RESULT, pytest.fail)
    with pytest.raises(ConfigError, match=r"finished 6 steps, none is left for .*old there, new here.*ask for more"):
        train._check_finished(replace(ASKED, resume_allow=["data"]), BEFORE, None, RESULT, pytest.fail)


def test_data_that_are_gone_do_not_hide_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(config: Config) -> Path:
        raise BigtrainError("no such file")

    monkeypatch.setattr(train, "_prepared_at", gone)
    said: list[str] = []
    train._check_finished(ASKED, BEFORE, None, RESULT, said.append)
    assert said == ["whether the data of /run has changed cannot be told: no such file"]
