"""Secrets in every kind of config field: the ranks get them, and no file, log, page or process list shows them."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from bigtrain import cli
from bigtrain import config as schema
from bigtrain.config import Config, LaunchConfig, from_dict, to_dict
from bigtrain.launch.supervise import WORKER
from bigtrain.redact import HELD_BACK, MASK
from tests.runs import TINY, bigtrain, command


def secret(number: int) -> str:
    return f"s3cr3t{number}zq"


# override -> in which field of what kind
PLANTED = [
    f"launch.env.STORAGE_PASSWORD={secret(0)}",  # a mapping's value, by its key
    f"launch.env.ENDPOINT=https://user:{secret(1)}@host/path",  # a login in a URL
    f"logger.wandb.name=password={secret(2)}",  # text
    f"logger.wandb.group=token={secret(3)}",
    f"logger.wandb.tags=['api_key={secret(4)}','https://u:{secret(5)}@host']",  # a list's items
    f"engine.deepspeed.comet.api_key={secret(6)}",  # passed through
    f"train.lora.targets=['password={secret(7)}','{secret(8)}']",  # the second is the value of a variable
    f"launch.env.NOTE='{secret(0)} again'",  # a value of a secret variable under another name
]
VARIABLES = {"CLOUD_SECRET": secret(8), "HF_TOKEN": secret(9), "WANDB_API_KEY": f"{'0' * 32}{secret(10)}"}
SECRETS = [secret(number) for number in range(11)]


def found(text: str) -> list[str]:
    return [name for name in SECRETS if name in text]


def test_no_output_shows_a_secret(
    tmp_path: Path, data_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SERVICE", f"3-1-unix-{tmp_path}/none")  # as a process has it that used wandb itself
    run = tmp_path / "run"
    shared = [*TINY, f"data.cache_dir={data_cache}", f"run_dir={run}", "launch.ranks=1", "logger.wandb.enabled=true",
              "train.eval_every=0", *PLANTED]  # fmt: skip
    process = subprocess.Popen(
        command("train", *shared, "train.steps=4"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    environments, command_lines = [], []
    while process.poll() is None:
        for child in psutil.Process(process.pid).children(recursive=True):
            try:
                words = child.cmdline()
                command_lines.append(" ".join(words))
                if WORKER in words and "RANK" in (environment := child.environ()):
                    environments.append(environment)
            except psutil.Error:
                continue
        time.sleep(0.2)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    # A second session finds the same run, and its line says so without them; then one that stops with an error.
    output += bigtrain("train", *shared, "train.steps=4")
    output += bigtrain("train", *shared, "train.steps=4", f"logger.wandb.nmae=token={secret(3)}", expect=2)
    output += bigtrain("train", *shared, f"optimizer.lr=password={secret(2)}", expect=2)
    output += bigtrain("train", *shared, "launch=dryrun")
    assert cli._run(["report", str(run)]) == 0
    output += "".join(capsys.readouterr())

    assert environments, "no rank was seen"
    assert environments[0]["STORAGE_PASSWORD"] == secret(0)
    assert environments[0]["ENDPOINT"] == f"https://user:{secret(1)}@host/path"
    assert any(WORKER in line for line in command_lines)
    assert found(output) == []
    assert found("\n".join(command_lines)) == []
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    shown = {str(path.relative_to(run)): found(path.read_bytes().decode("latin-1")) for path in files}
    assert {name: names for name, names in shown.items() if names} == {}
    assert not [path for path in tmp_path.rglob("*") if found(path.name)]
    assert MASK in (run / "config.yaml").read_text()


def test_the_ranks_get_what_the_file_leaves_out(tmp_path: Path) -> None:
    data = to_dict(Config(launch=LaunchConfig(env={"MY_TOKEN": secret(0), "PLAIN": "yes"})))
    data["engine"]["deepspeed"] = {"comet": {"api_key": secret(6), "project": "p"}}
    data["logger"]["wandb"]["tags"] = ["a", f"password={secret(4)}"]
    config = from_dict(data)
    (tmp_path / "config.yaml").write_text(schema.dump(config))
    assert found((tmp_path / "config.yaml").read_text()) == []
    carried = json.loads(json.dumps(schema.held_back(config)))
    assert schema.with_secrets(schema.load(tmp_path / "config.yaml"), carried) == config
    assert schema.fingerprint(config) == schema.fingerprint(schema.load(tmp_path / "config.yaml"))


def test_columns_of_a_table_are_no_secrets() -> None:
    data = to_dict(Config()) | {"data": {"kind": "labelled", "path": "a.tsv", "columns": {"token": "word"}}}
    assert schema.public(from_dict(data))["data"]["columns"] == {"token": "word"}
    assert schema.held_back(from_dict(data)) == []


@pytest.mark.parametrize("key", ["run_dir", "data.cache_dir"])
def test_a_directory_that_everybody_sees(key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = cli._run(["train", *TINY, f"{key}={tmp_path}/password={secret(0)}", "launch=dryrun"])
    said = "".join(capsys.readouterr())
    assert (status, said.count("\n")) == (2, 1)
    assert f"{key}=" in said
    assert "holds a secret" in said
    assert found(said) == []


def test_a_sweep(tmp_path: Path, data_cache: Path) -> None:
    """Its own files (multirun.yaml) and lines."""
    output = bigtrain(
        "train", "-m", *TINY, f"data.cache_dir={data_cache}", f"run_dir={tmp_path}/sweep", "launch=dryrun",
        f"launch.env.MY_PASSWORD={secret(0)}", f"logger.wandb.group=token={secret(3)}", "optimizer.lr=1e-3,2e-3",
        expect=0,
    )  # fmt: skip
    assert found(output) == []
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or found(path.read_text()) == [], path


def test_the_variable_does_not_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import hashlib
    import os

    from bigtrain.worker import read_config

    config = Config(launch=LaunchConfig(env={"MY_TOKEN": secret(0)}))
    text = schema.dump(config)
    (tmp_path / "config.yaml").write_text(text)
    monkeypatch.setenv(HELD_BACK, json.dumps(schema.held_back(config)))
    assert read_config(tmp_path / "config.yaml", hashlib.sha256(text.encode()).hexdigest()) == config
    assert HELD_BACK not in os.environ
