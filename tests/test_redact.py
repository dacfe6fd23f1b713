from __future__ import annotations

from typing import Any

import pytest

from bigtrain.config import Config, to_dict
from bigtrain.redact import is_secret_name, redact


@pytest.mark.parametrize(
    "name",
    ["HF_TOKEN", "token", "hub.token", "api_key", "WANDB_API_KEY", "apiKey", "APIKEY", "db_password", "client-secret",
     "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "authorization", "credentials"],
)  # fmt: skip
def test_secret_names(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize("name", ["tokenizer", "tokens", "batch_tokens", "tokens_per_step", "n_kv_heads", "keys"])
def test_names_that_only_look_like_it(name: str) -> None:
    assert not is_secret_name(name)


@pytest.mark.parametrize(
    ("data", "clean"),
    [
        ({"api_key": "abc", "nested": [{"password": 1234}]}, {"api_key": "***", "nested": [{"password": "***"}]}),
        ({"token": None, "secret": True}, {"token": None, "secret": True}),  # nothing hidden in these
        ("s3://user:pw@host/corpus", "s3://***@host/corpus"),
        ("https://host/a?token=xyz&page=2", "https://host/a?token=***&page=2"),
        ("run --api-key=xyz --steps=5", "run --api-key=*** --steps=5"),
        ("max_tokens=5 tokenizer=gpt2", "max_tokens=5 tokenizer=gpt2"),
        ("login hf_" + 30 * "a", "login ***"),
        (3, 3),
    ],
)
def test_redact(data: Any, clean: Any) -> None:
    assert redact(data) == clean


def test_values_of_secret_environment_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_PASSWORD", "open-sesame")
    monkeypatch.setenv("SHORT_TOKEN", "a")
    assert redact({"path": "/data/open-sesame/a"}) == {"path": "/data/***/a"}


def test_a_plain_config_is_left_as_it_is() -> None:
    assert redact(to_dict(Config())) == to_dict(Config())
