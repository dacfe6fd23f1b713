"""What a spoiled checkpoint, a spoiled or another run, and a changed config get: one clear line within five seconds."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from bigtrain import cli
from bigtrain.checkpoint import integrity
from tests.runs import TINY
from tests.test_bad_input import AS_USER

LIMIT_SECONDS = 5.0
ON = ["resume=required", "train.steps=4"]  # go on with the run, which is at step 2


@dataclass
class Row:
    """How to spoil the run, what to type (RUN and DIR stand for the run and the folder around it), what is said."""

    name: str
    spoil: Callable[[Path], object]
    said: list[str]
    type: list[str] = field(default_factory=lambda: ["train", *ON])
    prefix: list[str] = field(default_factory=list)


def nothing(run: Path) -> None: ...


def step(run: Path) -> Path:
    return run / "checkpoints" / "step-00000002"


def manifest(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def spoil(run: Path) -> None:
        data = json.loads((step(run) / "manifest.json").read_text())
        changed = change(data)
        (step(run) / "manifest.json").write_text(json.dumps(data if changed is None else changed))

    return spoil


def truncated(pattern: str) -> Callable[[Path], None]:
    def spoil(run: Path) -> None:
        path = next(iter(sorted(step(run).rglob(pattern))))
        os.truncate(path, path.stat().st_size // 2)

    return spoil


def config(old: str, new: str) -> Callable[[Path], None]:
    def spoil(run: Path) -> None:
        text = (run / "config.yaml").read_text()
        assert old in text
        (run / "config.yaml").write_text(text.replace(old, new, 1))

    return spoil


def write(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda run: (run / name).write_bytes(data)


def replaced_by_file(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").write_text("I am a file")


def step_is_a_file(run: Path) -> None:
    shutil.rmtree(step(run))
    step(run).write_text("I am a file")


def config_is_a_directory(run: Path) -> None:
    (run / "config.yaml").unlink()
    (run / "config.yaml").mkdir()


def scrambled_weights(run: Path) -> None:
    path = step(run) / "model.safetensors"
    path.write_bytes(os.urandom(64) + path.read_bytes()[64:])


def other_heads(run: Path) -> None:
    config("dim: 64", "dim: 128")(run)


def encrypted_note(run: Path) -> None:
    note = {"format": "AES-256-GCM STREAM", "key_id": "00", "key_file": str(run / "key"), "key_env": None}
    (step(run) / "encryption.json").write_text(json.dumps(note))
    facts = json.loads((step(run) / "manifest.json").read_text())
    integrity.seal(step(run), {name: facts[name] for name in facts if name not in ("files", "manifest_sha256")})


def key_for_all(run: Path) -> None:
    encrypted_note(run)
    (run / "key").write_text("00" * 32)
    (run / "key").chmod(0o644)


def foreign(run: Path) -> None:
    (run.parent / "foreign").mkdir()
    (run.parent / "foreign" / "config.json").write_text('{"model_type": "t5"}')


def no_tokens(run: Path) -> None:
    shutil.rmtree(run / "tokenizer")


GENERATE = ["generate", "RUN", "--prompt", "a", "--max-new-tokens", "1", "--device", "cpu"]
WRONG_MODEL = ["init_from=DIR/foreign", "run_dir=DIR/new"]

ROWS = [
    # a checkpoint that is not whole
    Row("weights cut off", truncated("model.safetensors"), ["checkpoint"]),
    Row("optimizer state cut off", truncated("*optim*"), ["checkpoint"]),
    Row("model state cut off", truncated("*model_states*"), ["checkpoint"]),
    Row("random state missing", lambda run: next(step(run).glob("random-*.pt")).unlink(), ["checkpoint"]),
    Row("manifest missing", lambda run: (step(run) / "manifest.json").unlink(), ["checkpoint"]),
    Row("manifest cut off", truncated("manifest.json"), ["checkpoint"]),
    Row("manifest empty", lambda run: (step(run) / "manifest.json").write_text(""), ["checkpoint"]),
    Row("manifest is a list", manifest(lambda data: [data]), ["checkpoint"]),
    Row("manifest without files", manifest(lambda data: data.pop("files") and None), ["checkpoint"]),
    Row("manifest with a step in words", manifest(lambda data: data.update(step="many")), ["checkpoint"]),
    Row("manifest in another encoding", write("checkpoints/step-00000002/manifest.json", b"\xff\xfe{"), ["checkpoint"]),
    Row("no checkpoint in the folder", lambda run: shutil.rmtree(step(run)), ["checkpoint"]),
    Row("no folder", lambda run: shutil.rmtree(run / "checkpoints"), ["checkpoint"]),
    Row("the folder is a file", replaced_by_file, ["checkpoint"]),
    Row("the checkpoint is a file", step_is_a_file, ["checkpoint"]),
    Row("only staged", lambda run: step(run).rename(step(run).with_name(".staging-00000002")), ["checkpoint"]),
    Row("no permission", lambda run: step(run).chmod(0), ["checkpoint"], prefix=AS_USER),
    # a place to resume from that is none
    Row("resume from a file", write("a", b"x"), ["resume=", "run/a"], ["train", "train.steps=4", "resume=RUN/a"]),
    Row("resume from nowhere", nothing, ["resume=", "elsewhere"], ["train", "train.steps=4", "resume=DIR/elsewhere"]),
    Row("resume from an empty directory", lambda run: (run.parent / "empty").mkdir(), ["resume=", "empty"],
        ["train", "train.steps=4", "resume=DIR/empty"]),
    Row("resume from something else", foreign, ["resume=", "foreign"],
        ["train", "train.steps=4", "resume=DIR/foreign"]),
    Row("a run that must not go on", nothing, ["resume='never'", "already holds a run"], ["train", "resume=never"]),
    # another run's config
    Row("other width", nothing, ["model.dim"], ["train", *ON, "model.dim=32"]),
    Row("other depth", nothing, ["model.n_layers"], ["train", *ON, "model.n_layers=3"]),
    Row("other heads", nothing, ["model.n_heads"], ["train", *ON, "model.n_heads=4"]),
    Row("other positions", nothing, ["model.positions"], ["train", *ON, "model.positions=rotary"]),
    Row("other batch", nothing, ["train.global_batch"], ["train", *ON, "train.global_batch=16"]),
    Row("a number of ranks that cannot share the batch", nothing, ["train.global_batch=8", "ranks, 3"],
        ["train", *ON, "launch.ranks=3"]),
    Row("other tokenizer", nothing, ["data.tokenizer"], ["train", *ON, "data.tokenizer.vocab_size=600"]),
    Row("other dtype", nothing, ["train.precision"], ["train", *ON, "train.precision=bf16"]),
    Row("other optimizer", nothing, ["optimizer"], ["train", *ON, "optimizer=lion"]),
    Row("other data", nothing, ["data"], ["train", *ON, "data=text", "data.path=DIR/run"]),
    Row("other task", nothing, ["model.kind"], ["train", *ON, "task=masked_lm"]),
    Row("a typo in a section", nothing, ["train.global_bacth: unknown key"], ["train", *ON, "train.global_bacth=16"]),
    Row("a typo in the model", nothing, ["model.dmi: unknown key"], ["train", *ON, "model.dmi=16"]),
    Row("a typo in encryption", nothing, ["train.encryption.key_fiel: unknown key", "key_file"],
        ["train", *ON, "train.encryption.key_fiel=a"]),
    Row("not that many ZeRO stages", nothing, ["engine.stage=4"], ["train", *ON, "engine.stage=4"]),
    # a spoiled config.yaml
    Row("its config has a typo", config("global_batch", "global_bacth"), ["config.yaml", "train.global_bacth"]),
    Row("its config has a wrong type", config("steps: 2", "steps: two"), ["config.yaml", "train.steps"]),
    Row("its config is no YAML", write("config.yaml", b"a: [b"), ["config.yaml", "cannot be read"]),
    Row("its config is binary", write("config.yaml", b"\x00\xff\xfe" * 50), ["config.yaml", "cannot be read"]),
    Row("its config is a directory", config_is_a_directory, ["config.yaml", "cannot be read"]),
    Row("its config is empty", write("config.yaml", b""), ["run_dir", "holds no config"]),
    # weights for another run
    Row("weights of a foreign model", foreign, ["init_from", "foreign"], ["train", *WRONG_MODEL, "model.dim=32"]),
    Row("weights of a damaged run", truncated("model.safetensors"), ["init_from", "checkpoint"],
        ["train", "init_from=RUN", "run_dir=DIR/new"]),
    Row("the model of no run", foreign, ["model", "foreign"],
        ["train", "model=pretrained", "model.path=DIR/foreign", "run_dir=DIR/new"]),
    # keys
    Row("no key file", nothing, ["train.encryption.key_file", "No such file", "openssl rand"],
        ["train", *ON, "train.encryption.key_file=DIR/key"]),
    Row("no key variable", nothing, ["train.encryption.key_env='NO_KEY'"],
        ["train", *ON, "train.encryption.key_env=NO_KEY"]),
    Row("two keys", write("key", b"0" * 64), ["train.encryption.key_env", "a key_file is named too"],
        ["train", *ON, "train.encryption.key_env=A", "train.encryption.key_file=RUN/key"]),
    # commands on a spoiled run
    Row("generate without a checkpoint", replaced_by_file, ["RUN=", "no complete checkpoint"], GENERATE),
    Row("generate from scrambled weights", scrambled_weights, ["model.safetensors"], GENERATE),
    Row("generate with another model's config", other_heads, ["parameter", "in this model"], GENERATE),
    Row("generate without a tokenizer", no_tokens, ["tokenizer"], GENERATE),
    Row("generate from no run", lambda run: shutil.rmtree(run) or run.mkdir(), ["config.yaml", "no such file"],
        GENERATE),
    Row("generate without the key", encrypted_note, ["train.encryption.key_file", "cannot be read"], GENERATE),
    Row("generate with everybody's key", key_for_all, ["train.encryption.key_file", "others may read it"], GENERATE),
    Row("evaluate scrambled weights", scrambled_weights, ["model.safetensors"], ["evaluate", "RUN", "--device", "cpu"]),
    Row("export into a full directory", nothing, ["out=", "exists already"], ["export", "RUN", "--out", "RUN"]),
    Row("export of no checkpoint", lambda run: shutil.rmtree(step(run)), ["RUN=", "no complete checkpoint"],
        ["export", "RUN", "--out", "DIR/out"]),
    Row("export encrypted without a key", nothing, ["train.encryption.key_file", "no key is named"],
        ["export", "RUN", "--encrypt", "--out", "DIR/out"]),
    Row("decrypt what is not encrypted", nothing, ["is not encrypted"], ["decrypt", "RUN", "--out", "DIR/out"]),
    Row("report without metrics", lambda run: (run / "metrics.jsonl").unlink(), ["RUN=", "no metrics"],
        ["report", "RUN"]),
]  # fmt: skip


def arguments(row: Row, folder: Path, cache: Path) -> list[str]:
    typed = [word.replace("RUN", str(folder / "run")).replace("DIR", str(folder)) for word in row.type]
    if typed[0] != "train":
        return typed
    tiny = [] if "model=pretrained" in typed else TINY
    shared = [*tiny, f"data.cache_dir={cache}", "launch.ranks=1", "train.eval_every=0", "logger=quiet"]
    here = [] if any(word.startswith("run_dir=") for word in typed) else [f"run_dir={folder}/run"]
    return ["train", *shared, *here, *typed[1:]]


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_bad_resume(
    row: Row, trained_run: Path, data_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained_run, tmp_path / "run")
    row.spoil(tmp_path / "run")
    typed = arguments(row, tmp_path, data_cache)
    began = time.perf_counter()
    if row.prefix:
        done = subprocess.run(
            [*row.prefix, sys.executable, "-m", "bigtrain.cli", *typed], capture_output=True, text=True, timeout=60
        )
        status, said = done.returncode, done.stderr
        step(tmp_path / "run").chmod(0o755)
    else:
        status, said = cli._run(typed), capsys.readouterr().err
    seconds = time.perf_counter() - began
    assert status in (1, 2), said
    assert said.startswith("bigtrain: error: "), said
    assert said.count("\n") == 1, said
    assert "this is a bug" not in said
    for words in row.said:
        assert words in said
    assert seconds < LIMIT_SECONDS, seconds
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "out").exists()


def test_a_clock_in_the_past_changes_nothing(
    trained_run: Path, data_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All that there is was written in a year to come: order goes by steps, and nothing else asks for the time."""
    run = tmp_path / "run"
    shutil.copytree(trained_run, run)
    facts = json.loads((step(run) / "manifest.json").read_text())
    later = {name: facts[name] for name in facts if name not in ("files", "manifest_sha256")}
    integrity.seal(step(run), later | {"time": "2099-01-01T00:00:00+0000"})
    for path in [run, *run.rglob("*")]:
        os.utime(path, (4e9, 4e9))
    assert cli._run(["checkpoint", "verify", str(run)]) == 0
    assert cli._run(["checkpoint", "list", str(run)]) == 0
    typed = arguments(Row("later", nothing, [], ["train", "resume=required", "train.steps=2"]), tmp_path, data_cache)
    assert cli._run(typed) == 0
    said = capsys.readouterr()
    assert "2099" in said.out
    assert "is finished at step 2" in said.out
    assert cli._run(["generate", str(run), "--prompt", "a", "--max-new-tokens", "1", "--device", "cpu"]) == 0


def test_the_run_of_this_test_is_good(trained_run: Path, data_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Else every row above might fail for the run's sake."""
    assert len(ROWS) >= 30
    assert cli._run(["generate", str(trained_run), "--prompt", "a", "--max-new-tokens", "1", "--device", "cpu"]) == 0
    row = Row("good", nothing, [], ["train", "resume=required"])
    typed = [word for word in arguments(row, trained_run.parent, data_cache) if not word.startswith("train.steps")]
    assert cli._run([*typed, "train.steps=2"]) == 0
    assert "is finished at step 2" in capsys.readouterr().out
