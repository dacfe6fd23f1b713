"""wandb as it really writes: each test reads the offline run's own file back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bigtrain.config import Config, WandbConfig
from bigtrain.errors import BigtrainError
from bigtrain.hooks import wandb as module
from bigtrain.hooks.jsonl import JsonlHook
from bigtrain.hooks.wandb import WandbHook, choose_mode, find_key, read_records
from tests.hooks.runs import run_info


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No key, no settings of this machine's user."""
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))


def make_config(run_dir: Path) -> Config:
    config = Config(run_dir=str(run_dir))
    config.logger.wandb = WandbConfig(enabled=True, project="trials", name="first", group="g", tags=["a", "b"])
    config.launch.env = {"HF_TOKEN": "hidden-1", "PLAIN": "shown"}
    return config


def train(
    run_dir: Path, first: int, last: int, state: dict[str, Any] | None = None, warnings: list[str] | None = None
) -> dict[str, Any]:
    """Log steps first..last through both hooks, as a run does, and return the wandb hook's state."""
    run_dir.mkdir(exist_ok=True)
    hook, jsonl = WandbHook(), JsonlHook()
    if warnings is not None:
        hook.warn = warnings.append
    hook.load_state(state or {})
    info = run_info(run_dir, start_step=first - 1, config=make_config(run_dir))
    jsonl.on_start(info)
    hook.on_start(info)
    for step in range(first, last + 1):
        for each in (jsonl, hook):
            each.on_step(step, {"train/loss": 10.0 - step})
    for each in (jsonl, hook):
        each.on_evaluate(last, {"eval/loss": 2.5})
    hook.on_end({"eval/loss": 2.5, "status": "finished"})
    hook.close()
    jsonl.close()
    return hook.state()


def records(run_dir: Path, kind: str) -> list[Any]:
    """Records of a kind from every file of the run directory, in the order of their start."""
    paths = sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb"))
    every = [record for path in paths for record in read_records(path)]
    return [getattr(record, kind) for record in every if record.WhichOneof("record_type") == kind]


def history(run_dir: Path) -> list[dict[str, Any]]:
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.item}
        for record in records(run_dir, "history")
    ]


def test_without_a_key_the_run_is_offline_inside_the_run_directory(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    train(run_dir, 1, 5)
    rows = history(run_dir)
    assert [row["step"] for row in rows] == [row["_step"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["train/loss"] for row in rows] == [9, 8, 7, 6, 5]
    assert rows[-1]["eval/loss"] == 2.5  # an evaluation is in the row of its step
    (run,) = records(run_dir, "run")
    assert (run.project, run.display_name, run.run_group, list(run.tags)) == ("trials", "first", "g", ["a", "b"])
    (exit_record,) = records(run_dir, "exit")
    assert exit_record.exit_code == 0
    metrics = {metric.name or metric.glob_name: metric for metric in records(run_dir, "metric")}
    assert metrics["*"].step_metric == "step"


def test_the_config_is_there_without_its_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_PASSWORD", "open-sesame")
    run_dir = tmp_path / "open-sesame"
    train(run_dir, 1, 1)
    (run,) = records(run_dir, "run")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["train"]["steps"] == 1000
    assert config["launch"]["env"] == {"HF_TOKEN": "***", "PLAIN": "shown"}
    assert config["run_dir"].endswith("/***")
    assert config["run"]["parameters"] == 3_300_000
    assert config["run"]["world_size"] == 2


def test_resume_continues_the_same_run_with_each_step_once(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    state = train(run_dir, 1, 6)
    assert train(run_dir, 5, 9, json.loads(json.dumps(state))) == state  # as the checkpoint keeps it
    assert [row["_step"] for row in history(run_dir)] == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert {run.run_id for run in records(run_dir, "run")} == {state["id"]}
    assert all(run.resume for run in records(run_dir, "run"))


def test_a_checkpoint_of_another_directory_starts_a_run_of_its_own(tmp_path: Path) -> None:
    state = train(tmp_path / "first", 1, 3)
    assert train(tmp_path / "second", 3, 4, state) != state


def test_rows_that_a_kill_lost_are_sent_again(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    code = (
        "import os, sys; from pathlib import Path\n"
        "from tests.hooks.runs import run_info; from tests.hooks.test_wandb import make_config\n"
        "from bigtrain.hooks.jsonl import JsonlHook; from bigtrain.hooks.wandb import WandbHook\n"
        "run_dir = Path(sys.argv[1]); info = run_info(run_dir, config=make_config(run_dir))\n"
        "hooks = [WandbHook(), JsonlHook()]\n"
        "[hook.on_start(info) for hook in hooks]\n"
        "for step in range(1, 301):\n    [hook.on_step(step, {'train/loss': float(step)}) for hook in hooks]\n"
        "print(hooks[0].state()['id'], flush=True); os.kill(0, 9)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    killed = subprocess.run(
        [sys.executable, "-c", code, str(run_dir)],
        env=environment, capture_output=True, text=True, start_new_session=True, timeout=120,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL
    assert len(history(run_dir)) < 300  # wandb's last rows were still in its memory
    train(run_dir, 301, 305, {"id": killed.stdout.strip()})  # resumed from a checkpoint of step 300
    rows = history(run_dir)
    assert [row["_step"] for row in rows] == list(range(1, 306))
    assert [row["train/loss"] for row in rows[:300]] == list(range(1, 301))


def test_a_failed_run_says_so(tmp_path: Path) -> None:
    hook = WandbHook()
    hook.on_start(run_info(tmp_path, config=make_config(tmp_path)))
    hook.on_step(1, {"train/loss": 1.0})
    hook.on_failure(RuntimeError("boom"))
    hook.on_step(2, {"train/loss": 1.0})  # nothing left to log to, and no error
    hook.close()
    (exit_record,) = records(tmp_path, "exit")
    assert exit_record.exit_code == 1


def test_a_server_that_cannot_be_reached_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "INIT_SECONDS", 2.0)
    monkeypatch.setenv("WANDB_API_KEY", 40 * "a")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # the discard port: nobody answers
    run_dir = tmp_path / "run"
    warnings: list[str] = []
    train(run_dir, 1, 2, warnings=warnings)
    assert [line.partition(":")[0] for line in warnings] == ["wandb cannot be reached, the run is kept offline"]
    assert [row["_step"] for row in history(run_dir)] == [1, 2]


def test_mode_follows_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_key() is None
    assert choose_mode(WandbConfig()) == "offline"
    assert choose_mode(WandbConfig(mode="online")) == "offline"  # never a prompt
    netrc = tmp_path / "netrc"
    netrc.write_text("machine api.wandb.ai login user password " + 40 * "a")
    monkeypatch.setenv("NETRC", str(netrc))
    assert choose_mode(WandbConfig()) == "online"
    assert choose_mode(WandbConfig(mode="offline")) == "offline"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert choose_mode(WandbConfig()) == "offline"
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", 40 * "b")
    assert choose_mode(WandbConfig()) == "online"


def test_charts_can_be_over_tokens(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    config.logger.wandb.x_axis = "tokens"
    hook = WandbHook()
    hook.on_start(run_info(tmp_path, config=config))
    hook.on_step(1, {"train/loss": 1.0, "data/tokens": 4096.0})
    hook.on_end({})
    metrics = {metric.name or metric.glob_name: metric for metric in records(tmp_path, "metric")}
    assert metrics["*"].step_metric == "data/tokens"
    assert metrics["data/tokens"].step_metric == "step"
    assert metrics["eval/loss"].summary.min


def test_group_job_type_code_and_config_are_kept(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("train: {}\n")
    config = make_config(tmp_path)
    config.logger.wandb.job_type = "ablation"
    hook = WandbHook()
    hook.on_start(run_info(tmp_path, config=config))
    hook.on_end({})
    (run,) = records(tmp_path, "run")
    assert (run.run_group, run.job_type) == ("g", "ablation")
    artifacts = {artifact.type: artifact for artifact in records(tmp_path, "artifact")}
    assert [entry.path for entry in artifacts["config"].manifest.contents] == ["config.yaml"]
    code = {entry.path for entry in artifacts["code"].manifest.contents}
    assert {"bigtrain/trainer.py", "bigtrain/hooks/wandb.py"} <= code
    assert not any(path.endswith(".pyc") for path in code)


def test_a_checkpoint_is_a_reference_with_its_lineage(tmp_path: Path) -> None:
    paths = [tmp_path / "checkpoints" / f"step-{step}" for step in (2, 4)]
    hook = WandbHook()
    hook.on_start(run_info(tmp_path, config=make_config(tmp_path)))
    for step, path in zip((2, 4), paths, strict=True):
        path.mkdir(parents=True)
        (path / "manifest.json").write_text(json.dumps({"step": step}))
        (path / "weights.bin").write_bytes(b"x" * 1000)
        hook.on_checkpoint(step, path)
    hook.on_end({})
    first, second = (artifact for artifact in records(tmp_path, "artifact") if artifact.type == "model")
    assert first.name == second.name == f"checkpoint-{hook.state()['id']}"
    assert set(second.aliases) == {"latest", "step-4"}
    assert json.loads(first.metadata)["goes_on_from"] is None
    assert json.loads(second.metadata)["goes_on_from"] == "step-2"
    entries = {entry.path: entry for entry in second.manifest.contents}
    assert set(entries) == {"step-4/weights.bin", "step-4/manifest.json", "manifest.json"}
    weights = entries["step-4/weights.bin"]
    assert weights.ref == (paths[1].resolve() / "weights.bin").as_uri()  # where it lies: no byte of it is copied
    assert not weights.local_path


def test_alerts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIGTRAIN_RESTARTS", "1")
    run_dir = tmp_path / "run"
    state = train(run_dir, 1, 3)
    (run_dir / "restarts.jsonl").write_text(json.dumps({"cause": "rank 1 hung while in a step"}) + "\n")
    config = make_config(run_dir)
    config.logger.wandb.stall_seconds = 1
    hook = WandbHook()
    hook.load_state(state)
    hook.on_start(run_info(run_dir, start_step=3, config=config))
    hook.on_warning(4, "train/loss is nan, first in weight blocks.0")
    hook.on_warning(4, "loss 9.1 is 30 deviations above the last ones")
    hook.on_warning(5, "straggler: the others wait for rank 3 on node-b, whose forward passes take 2.1 x theirs")
    time.sleep(2)  # nothing is logged for longer than a second
    hook.on_failure(BigtrainError("train/grad_norm is inf at step 6"))
    alerts = {alert.title: alert for alert in records(run_dir, "alert")}
    assert set(alerts) == {"restarted", "not finite", "loss spike", "straggler", "stalled", "failed"}
    assert "rank 1 hung" in alerts["restarted"].text
    assert "node-b" in alerts["straggler"].text
    assert alerts["failed"].level == "ERROR"
    assert alerts["loss spike"].level == "WARN"
    assert "grad_norm is inf" in alerts["failed"].text


def test_what_is_switched_off_is_not_there(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    config.logger.wandb.artifacts = config.logger.wandb.alerts = False
    hook = WandbHook()
    hook.on_start(run_info(tmp_path, config=config))
    hook.on_warning(1, "loss spike")
    hook.on_checkpoint(1, tmp_path)
    hook.on_end({})
    assert records(tmp_path, "artifact") == records(tmp_path, "alert") == []


def test_the_machine_is_watched_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_X_STATS_SAMPLING_INTERVAL", "0.5")
    hook = WandbHook()
    hook.on_start(run_info(tmp_path, config=make_config(tmp_path)))
    time.sleep(2.5)
    hook.on_step(1, {"perf/forward_seconds_max": 2.0, "perf/slowest_rank": 1.0})
    hook.on_end({})
    names = {item.key for record in records(tmp_path, "stats") for item in record.item}
    assert any("cpu" in name for name in names)
    assert any("memory" in name for name in names)
    assert history(tmp_path)[-1]["perf/slowest_rank"] == 1.0
