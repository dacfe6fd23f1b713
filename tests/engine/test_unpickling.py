"""A pickle that runs code, in the place of every file that an engine reads, runs nothing."""

from __future__ import annotations

import io
import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from bigtrain.checkpoint import checkpoints, store
from bigtrain.engine import unpickling
from bigtrain.errors import BigtrainError
from tests.distributed.curves import ENGINES, build, join, make
from tests.distributed.ranks import run_ranks
from tests.payload import payloads

CHOICES = ("zero0", "zero2", "zero3", "ddp", "fsdp2")


def attacked(folder: str) -> dict[str, dict[str, str]]:
    """Runs in each rank: {engine: {kind of file: what loading a checkpoint with payloads there raised}}."""
    host = join()
    marker = Path(folder) / "marker"
    said: dict[str, dict[str, str]] = {}
    for choice in CHOICES:
        built = build(make(ENGINES[choice], "fp32"))
        store.save(Path(folder) / choice, 1, built, host, {}, keep=1)
        host.gather(None)
        (checkpoint,) = checkpoints(Path(folder) / choice)
        files = [path for path in sorted(checkpoint.path.rglob("*")) if path.is_file() and path.suffix != ".json"]
        groups: dict[str, list[Path]] = {}  # all ranks' files of one kind: else only some ranks would fail
        for path in files:
            if path.parent != checkpoint.path or path.name.startswith("random"):
                groups.setdefault(re.sub(r"\d+", "N", str(path.relative_to(checkpoint.path))), []).append(path)
        said[choice] = {}
        for kind, members in groups.items():
            for number, payload in enumerate(payloads(marker)):
                before = {path: path.read_bytes() for path in members}
                host.gather(None)
                if host.rank == 0:
                    for path in members:
                        path.write_bytes(payload)
                host.gather(None)
                try:
                    with unpickling.refusals(checkpoint.path):
                        store.load(checkpoint, built)
                    message = ""
                except BaseException as error:
                    message = f"{type(error).__name__}: {error}"
                assert not marker.exists(), (choice, kind, number)
                host.gather(None)
                if host.rank == 0:
                    for path, content in before.items():
                        path.write_bytes(content)
                host.gather(None)
                said[choice][f"{kind} {number}"] = message
        store.load(checkpoint, built)  # the good files are taken
    return said


def test_no_payload_in_a_checkpoint_runs(tmp_path: Path) -> None:
    for said in run_ranks("tests.engine.test_unpickling:attacked", 2, {"folder": str(tmp_path)}):
        for choice, messages in said.items():
            assert len(messages) >= 4, (choice, messages)
            for kind, message in messages.items():
                if "random_states" in kind:  # Accelerate's own copy, for which ours is what counts
                    continue
                assert message, (choice, kind)
                if kind.endswith(".pt 1"):
                    assert message.startswith("BigtrainError"), (choice, kind, message)
                    assert "asks for posix.mkdir" in message
                    assert "\n" not in message


def test_the_payload_is_real(tmp_path: Path) -> None:
    """Else no test that looks for its marker could fail."""
    for payload, read in zip(
        payloads(tmp_path / "marker"),
        (pickle.loads, lambda data: torch.load(io.BytesIO(data), weights_only=False)),
        strict=True,
    ):
        with pytest.raises(FileExistsError) if (tmp_path / "marker").exists() else _nothing():  # it runs twice there
            read(payload)
        assert (tmp_path / "marker").is_dir()


def _nothing() -> Any:
    import contextlib

    return contextlib.nullcontext()


def test_an_index_names_nothing_but_its_own_classes(tmp_path: Path) -> None:
    for data in payloads(tmp_path / "marker")[:1]:
        with pytest.raises(pickle.UnpicklingError, match=r"posix.mkdir"):
            unpickling._load_index(io.BytesIO(data))
    through_a_module = (
        b"ctorch.distributed.checkpoint.filesystem\nos.mkdir\n(V" + os.fsencode(tmp_path / "m") + b"\ntR."
    )
    with pytest.raises(pickle.UnpicklingError):
        unpickling._load_index(io.BytesIO(through_a_module))
    assert not list(tmp_path.iterdir())


def test_refusals_leave_other_errors_alone(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="full"), unpickling.refusals(tmp_path):
        raise OSError("full")
    with pytest.raises(BigtrainError, match=r"asks for os\.system"), unpickling.refusals(tmp_path):
        raise pickle.UnpicklingError("Weights only load failed. ... Unsupported global: GLOBAL os.system was not")
