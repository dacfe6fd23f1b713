"""Real runs through the real deepspeed launcher: the command in one process, two tiny ranks under it."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from bigtrain.config import from_dict
from bigtrain.launch import local
from bigtrain.launch.supervise import WORKER
from tests.runs import Running

pytestmark = pytest.mark.timeout(300)
FOREVER = "train.steps=1000000"


class Command:
    """`bigtrain train` on a tiny model in one folder."""

    def __init__(self, folder: Path, corpus: Path) -> None:
        self.folder = folder
        self.base = [
            "experiment=tiny", "data=text", f"data.path={corpus}", f"data.cache_dir={corpus}-cache",
            "data.tokenizer.vocab_size=300", "data.held_out=0.2", "model.max_seq_len=16", "model.dim=16",
            "train.eval_every=0", "logger.progress=false", "launch.ranks=2", "launch.device=cpu",
        ]  # fmt: skip
        self.started: list[Running] = []
        self.owned = Owned(folder)

    def start(self, *overrides: str) -> Running:
        process = Running("train", *self.base, *overrides, cwd=self.folder)
        self.started.append(process)
        return process

    def run(self, *overrides: str) -> tuple[int, str, str]:
        """Exit status, stdout, stderr (where progress of a build of native ops is left out)."""
        return finish(self.start(*overrides))


@pytest.fixture
def command(tmp_path: Path, corpus: Path) -> Iterator[Command]:
    yield from commands(tmp_path, corpus)


def commands(folder: Path, corpus: Path) -> Iterator[Command]:
    """One that is ended with the test, and held to leaving neither a process nor shared memory of its runs."""
    command = Command(folder, corpus)
    with command.owned:
        yield command
        for process in command.started:
            process.kill()
            process.wait()
        left = ranks(folder)
        for rank in left.values():
            rank.kill()
    assert not left, "processes were left behind"
    assert command.owned.left_behind() == []


def finish(process: Running) -> tuple[int, str, str]:
    out, error = process.communicate(timeout=240)
    return process.wait(), out, "".join(line for line in error.splitlines(True) if "native op" not in line)


def ranks(folder: Path) -> dict[int, psutil.Process]:
    """The live ranks of runs below `folder`."""
    found = {}
    for process in psutil.process_iter(["cmdline"]):
        arguments = process.info["cmdline"] or []
        if arguments[2:4] == ["-m", WORKER] and arguments[4].startswith(f"{folder}/"):
            found[int(process.environ()["RANK"])] = process
    return found


class Owned:
    """What in /dev/shm belongs to the launches of runs below a folder, whatever other programs have there: their names
    hold a launch's port (DeepSpeed's) or a rank's process (torch's), which are noted while the launches live."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ports, self.pids = folder, set[str](), set[str]()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._note_until_done)

    def __enter__(self) -> Owned:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _note_until_done(self) -> None:
        while not self._done.wait(0.3):
            self.pids |= {str(process.pid) for process in ranks(self.folder).values()}
            for path in self.folder.rglob("launch.json"):
                self.ports |= set(re.findall(r"--master_port=(\d+)", path.read_text()))

    def left_behind(self) -> list[str]:
        """Those that stay without an owner."""
        limit = time.monotonic() + 15
        while (names := [name for name in shared_memory() if self.has(name)]) and time.monotonic() < limit:
            time.sleep(0.5)
        return names

    def has(self, name: str) -> bool:
        words = name.split("_")
        return words[-2] in self.ports if name.startswith("deepspeed_") else words[1] in self.pids


def shared_memory() -> list[str]:
    """Segments of runs that have ended: those that no process has mapped."""
    names = {name for name in os.listdir("/dev/shm") if name.startswith(("deepspeed_allreduce_buffer_", "torch_"))}
    for process in psutil.process_iter():
        try:
            names -= {Path(mapped.path).name for mapped in process.memory_maps()}
        except (psutil.Error, OSError):
            continue
    return sorted(names)


def wait_for_steps(process: Running, run: Path, count: int) -> None:
    """Return once the run has taken so many steps."""
    limit = time.monotonic() + 150
    while len(steps(run)) < count:
        assert process.poll() is None, finish(process)
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.05)


def steps(run: Path) -> list[int]:
    """The steps of metrics.jsonl that have a training loss."""
    try:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines(True) if line[-1] == "\n"]
    except FileNotFoundError:
        return []
    return [line["step"] for line in lines if "train/loss" in line]


def test_a_run_from_command_to_result_and_on(command: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    code, out, error = command.run("run_dir=run", "train.steps=4", "launch.env.MY_WORDS=it's me")
    assert (code, error) == (0, "")
    assert "finished at step 4" in out
    result = json.loads((run / "result.json").read_text())
    assert (result["status"], result["train/steps"], result["world_size"]) == ("finished", 4, 2)
    assert steps(run) == [1, 2, 3, 4]
    text = (run / "config.yaml").read_bytes()
    launch = json.loads((run / "launch.json").read_text())
    assert (run / "config.sha256").read_text().strip() == hashlib.sha256(text).hexdigest() == launch["command"][-1]
    assert launch["environment"]["MY_WORDS"] == "it's me"
    assert "HYDRA_FULL_ERROR" in launch["removed_from_environment"]

    began = time.monotonic()
    code, out, error = command.run("run_dir=run", "train.steps=4")
    assert (code, error) == (0, "")
    assert "is finished at step 4" in out
    assert time.monotonic() - began < 5

    code, out, error = command.run("run_dir=run", "train.steps=4", "optimizer.lr=0.5", "train.seed=9")
    assert code == 2
    assert "holds another run (train.seed is 0 there, 9 here, optimizer.lr is 0.002 there, 0.5 here: the order" in error

    code, out, error = command.run("run_dir=run", "train.steps=4", "resume=never")
    assert (code, error.count("\n")) == (2, 1)
    assert "already holds a run" in error

    code, out, error = command.run("run_dir=run", "train.steps=6")
    assert (code, error) == (0, "")
    assert "resumed at step 4" in out
    assert steps(run) == [1, 2, 3, 4, 5, 6]


def test_ctrl_c_saves_and_the_line_it_prints_continues(command: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = command.start("run_dir=run", FOREVER, "schedule=constant", "schedule.warmup_steps=0")
    wait_for_steps(process, run, 3)

    code, _, error = command.run("run_dir=run", FOREVER, "schedule=constant", "schedule.warmup_steps=0")
    assert code == 1
    assert f"in use by process {process.pid}" in error

    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    code, out, error = finish(process)
    assert (code, error) == (0, "")
    assert time.monotonic() - began < 30
    assert json.loads((run / "result.json").read_text())["status"] == "stopped"
    match = re.search(r"stopped at step (\d+); to continue: (.*)", out)
    assert match
    stopped, words = int(match[1]), shlex.split(match[2])
    assert words[:2] == ["bigtrain", "train"]
    assert f"run_dir={run}" in words
    assert steps(run)[-1] == stopped

    code, out, error = command.run(*words[2:], f"train.steps={stopped + 2}")
    assert (code, error) == (0, "")
    assert f"resumed at step {stopped}" in out
    assert steps(run) == list(range(1, stopped + 3))


def test_a_killed_rank_ends_the_run_with_one_line(command: Command, tmp_path: Path) -> None:
    process = command.start("run_dir=run", FOREVER, "launch.restarts=0")
    wait_for_steps(process, tmp_path / "run", 2)
    others = ranks(tmp_path)
    began = time.monotonic()
    others[1].kill()
    code, _, error = finish(process)
    assert time.monotonic() - began < 15
    assert code == 1
    assert error.count("\n") == 1
    assert re.match(r"bigtrain: error: rank 1 was killed( by SIGKILL)? after step \d+ .*logs/rank-1.log", error), error
    assert not psutil.wait_procs(list(others.values()), timeout=10)[1]  # init may take its time to reap what is dead


@pytest.mark.parametrize("victim", ["the command", "the launcher"])
def test_a_killed_supervisor_leaves_no_rank(command: Command, tmp_path: Path, victim: str) -> None:
    process = command.start("run_dir=run", FOREVER, "launch.restarts=0")
    wait_for_steps(process, tmp_path / "run", 2)
    family = psutil.Process(process.pid).children(recursive=True)
    if victim == "the command":
        process.kill()
        process.wait()  # as a shell reaps it; a zombie would still pass for alive
    else:
        (parent,) = {rank.ppid() for rank in ranks(tmp_path).values()}
        os.kill(parent, signal.SIGKILL)
    assert not psutil.wait_procs(family, timeout=15)[1]
    code, _, error = finish(process)
    if victim == "the launcher":
        assert code == 1
        assert error.count("\n") == 1
        assert error.startswith("bigtrain: error: ")
    else:
        for path in Path("/dev/shm").glob("deepspeed_allreduce_buffer_*"):  # nobody is left who could remove them
            if command.owned.has(path.name):
                path.unlink()


def test_a_loss_that_is_not_finite_is_one_line(command: Command, tmp_path: Path) -> None:
    code, _, error = command.run("run_dir=run", "optimizer.lr=1e38", "schedule.warmup_steps=0", "train.grad_clip=0")
    assert code == 1
    assert error.startswith("bigtrain: error: ")
    assert error.count("\n") == 1
    assert "finite" in error or "nan" in error.lower()
    assert not (tmp_path / "run" / "result.json").exists()


def test_a_sweep_goes_on_after_a_failed_job(command: Command, tmp_path: Path) -> None:
    code, out, error = command.run("-m", "run_dir=sweep", "train.steps=2", "launch.ranks=1", "model.dim=17,16,32")
    assert code == 1
    assert error.count("\n") == 1
    assert "job 0: model.dim=17: not divisible" in error
    assert "sweep: 2 of 3 jobs finished" in out
    summary = out[out.index("sweep: 2 of 3") :].splitlines()[2:5]
    assert [line.split()[0] for line in summary] == ["0", "1", "2"]
    assert "failed: model.dim=17: not divisible" in summary[0]
    for number, dim in ((1, 16), (2, 32)):
        result = json.loads((tmp_path / "sweep" / str(number) / "result.json").read_text())
        assert f"{result['eval/loss']:.6g}" == summary[number].split()[-1]
        assert f"dim: {dim}\n" in (tmp_path / "sweep" / str(number) / "config.yaml").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sweep"]


def test_ctrl_c_stops_a_sweep(command: Command, tmp_path: Path) -> None:
    process = command.start("-m", "run_dir=sweep", FOREVER, "launch.ranks=1", "model.dim=16,32")
    wait_for_steps(process, tmp_path / "sweep" / "0", 2)
    process.send_signal(signal.SIGINT)
    code, out, _ = finish(process)
    assert code == 130
    assert "job 0" in out
    assert "job 1" not in out
    assert "sweep: 0 of 1 jobs finished" in out
    assert not (tmp_path / "sweep" / "1" / "config.yaml").exists()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_large_tensors_reuse_the_memory_of_those_before() -> None:
    """Without the setting each of these takes new pages from the kernel, which is slower than filling them."""
    script = """
import resource, torch
kept = []
for turn in range(20):
    x = torch.ones(2**24)
    kept.append(bytes(100 + 8 * turn))  # what a run allocates in between, and keeps
    del x
    if turn == 3:
        before = resource.getrusage(resource.RUSAGE_SELF)
after = resource.getrusage(resource.RUSAGE_SELF)
print(after.ru_minflt - before.ru_minflt)
"""
    environment = {**os.environ, "GLIBC_TUNABLES": local.KEEP_FREED_MEMORY}
    faults = int(subprocess.check_output([sys.executable, "-c", script], env=environment, text=True))
    assert faults < 2000  # 16 tensors of 16,384 pages


def test_a_run_that_offloads_to_the_disk_keeps_no_freed_memory(tmp_path: Path) -> None:
    on_disk = {"kind": "deepspeed", "stage": 3, "offload_optimizer": "nvme", "nvme_path": str(tmp_path)}
    assert local.heap_settings(from_dict({"engine": on_disk})) == local.GIVE_FREED_MEMORY_BACK
    assert local.heap_settings(from_dict({"engine": on_disk | {"offload_optimizer": "cpu"}})) == local.KEEP_FREED_MEMORY
