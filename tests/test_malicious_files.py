"""Payloads in the place of every file of a run, a Hugging Face directory and prepared data: none is run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from bigtrain import cli, compose
from bigtrain.checkpoint import transfer
from bigtrain.config import from_dict
from bigtrain.data.shards import load_prepared
from bigtrain.errors import BigtrainError, ConfigError
from bigtrain.launch import pretrained
from bigtrain.models import build
from tests.payload import payloads


def below(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]


def plant(path: Path, payload: bytes) -> None:
    """And let a manifest beside it agree, as somebody would who can write the directory."""
    size = path.stat().st_size
    path.write_bytes(payload + bytes(max(0, size - len(payload))))


def test_a_run_directory(trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, marker = tmp_path / "run", tmp_path / "marker"
    shutil.copytree(trained_run, run)
    reads = {
        "generate": ["generate", str(run), "--prompt", "a", "--max-new-tokens", "1", "--device", "cpu"],
        "export": ["export", str(run), "--out", str(tmp_path / "out")],
        "evaluate": ["evaluate", str(run), "--device", "cpu"],
        "report": ["report", str(run)],
    }
    assert cli._run(reads["generate"]) == 0
    failed = set()
    for path in below(run):
        content = path.read_bytes()
        weights = path.name == "model.safetensors"
        for payload in payloads(marker):
            plant(path, payload)
            for name, arguments in reads.items():
                if name == "evaluate" and not (weights or path.name in ("config.yaml", "labels.json")):
                    continue  # it reads what generate does, and takes a second
                if name == "report" and path.parent != run:
                    continue
                capsys.readouterr()
                status, said = cli._run(arguments), capsys.readouterr().err
                assert not marker.exists(), (path, name)
                assert "this is a bug" not in said, (path, name, said)
                assert said.count("bigtrain: error:") == (status != 0), (path, name, said)
                if status:
                    failed.add(path.name)
                shutil.rmtree(tmp_path / "out", ignore_errors=True)
        path.write_bytes(content)
    assert {"config.yaml", "manifest.json", "model.safetensors", "tokenizer.json"} <= failed


def test_prepared_data(trained_run: Path, tmp_path: Path) -> None:
    prepared = yaml.safe_load((trained_run / "config.yaml").read_text())["data"]["prepared_dir"]
    copy, marker = tmp_path / "prepared", tmp_path / "marker"
    shutil.copytree(prepared, copy)
    load_prepared(copy)
    for path in below(copy):
        content = path.read_bytes()
        for payload in payloads(marker):
            path.write_bytes(payload)
            if path.name == "tokenizer.json":
                from bigtrain.data.tokenizer import load_tokenizer

                with pytest.raises(ConfigError):
                    load_tokenizer(str(path))
            elif path.suffix == ".bin" or path.name == "meta.json":
                with pytest.raises(ConfigError, match=r"data\.prepared_dir"):
                    load_prepared(copy)
            assert not marker.exists(), path
        path.write_bytes(content)


def test_a_hugging_face_directory(trained_run: Path, tmp_path: Path) -> None:
    out, marker = tmp_path / "exported", tmp_path / "marker"
    assert cli._run(["export", str(trained_run), "--out", str(out)]) == 0
    (out / "modeling_own.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    settings = json.loads((out / "config.json").read_text())
    names = {"AutoConfig": "modeling_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}
    (out / "config.json").write_text(json.dumps(settings | {"auto_map": names}))
    for name in ("pytorch_model.bin", "model.pkl", "training_args.bin", "random.npy"):
        (out / name).write_bytes(payloads(marker)[1])

    def read() -> None:
        data = pretrained.resolved({"model": {"kind": "pretrained", "path": str(out)}, "data": {"tokenizer": {}}})
        from bigtrain.data.tokenizer import load_tokenizer

        load_tokenizer(data["data"]["tokenizer"]["path"])
        transfer.load_initial(build(from_dict({"model": data["model"]}).model), data["init_from"])

    read()
    assert not marker.exists()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        content = (out / name).read_bytes()
        for payload in payloads(marker):
            (out / name).write_bytes(payload)
            if name == "tokenizer_config.json":  # only asked which token ends a text, where it is readable
                read()
            else:
                with pytest.raises(BigtrainError):
                    read()
            assert not marker.exists(), name
        (out / name).write_bytes(content)
    (out / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="only pickled weights"):
        read()
    assert not marker.exists()


@pytest.mark.parametrize(
    "override",
    ["+model._target_=os.mkdir", "+_target_=os.mkdir", "+train._target_=os.mkdir", "model._target_=os.mkdir",
     "+logger.wandb._target_=os.mkdir", "+engine.deepspeed._target_=os.mkdir"],
)  # fmt: skip
def test_nothing_is_instantiated_from_a_config(override: str) -> None:
    from bigtrain.launch.train import checked

    with pytest.raises(ConfigError, match="_target_: unknown key"):
        compose.run(["experiment=tiny", override], lambda job: checked(job.data) and 0.0)
