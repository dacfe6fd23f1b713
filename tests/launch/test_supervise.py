"""The supervisor against real processes: small ranks of known behaviour under a small launcher.

The ranks are `python -m bigtrain.worker` of a package in a temporary folder, because that is how the supervisor knows
a rank. The same against the real launcher and worker is in test_local.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import psutil
import pytest

from bigtrain.launch import supervise as module
from bigtrain.launch.supervise import LAUNCH_ID, Ending, belonging, supervise

LAUNCHER = """
import os, subprocess, sys
command = [sys.executable, "-m", "bigtrain.worker", *sys.argv[2:]]
ranks = [subprocess.Popen(command, env=dict(os.environ, RANK=str(rank))) for rank in range(int(sys.argv[1]))]
sys.exit(max(rank.wait() % 256 for rank in ranks))
"""

WORKER = """
import os, pathlib, signal, subprocess, sys, time
rank, action, folder = int(os.environ["RANK"]), sys.argv[1], pathlib.Path(sys.argv[2])
stopped = []
if action == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
else:
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
if action == "detach" and rank == 0:
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"], start_new_session=True)
    sys.exit(0)
if action == "fork":
    os.fork()  # a data loader's process: same command line, same RANK
(folder / f"started-{rank}-{os.getpid()}").touch()
for turn in range(600):
    if stopped:
        (folder / f"stopped-{rank}").touch()
        sys.exit(0)
    if action == "die" and rank == 1 and turn == 20:
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "fail" and rank == 1 and turn == 20:
        sys.exit(3)
    if action in ("finish", "detach"):
        sys.exit(0)
    time.sleep(0.05)
"""


@pytest.fixture
def start(tmp_path: Path, monkeypatch):  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)  # `python -m` looks here first
    package = tmp_path / "bigtrain"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "worker.py").write_text(WORKER)
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    identity = uuid.uuid4().hex

    def run(action: str, ranks: int = 2, stop_seconds: float = 20) -> Ending:
        environment = dict(os.environ, **{LAUNCH_ID: identity})
        command = [sys.executable, str(tmp_path / "launcher.py"), str(ranks), action, str(tmp_path)]
        return supervise(command, environment, ranks, stop_seconds, failed=lambda: False)

    run.identity = identity  # type: ignore[attr-defined]
    return run


def once_started(folder: Path, ranks: int, act) -> threading.Thread:  # type: ignore[no-untyped-def]
    """Call `act` from a thread once so many ranks run."""

    def wait() -> None:
        while len(list(folder.glob("started-*"))) < ranks:
            time.sleep(0.02)
        time.sleep(2 * module.POLL_SECONDS)  # until the supervisor has seen them
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def pids(folder: Path) -> dict[int, int]:
    """rank -> process, as the ranks noted it."""
    return {int(rank): int(pid) for _, rank, pid in (path.name.split("-") for path in folder.glob("started-*"))}


def test_a_good_end(start) -> None:  # type: ignore[no-untyped-def]
    ending = start("finish")
    assert (ending.exit_code, ending.killed, ending.launcher_lost, ending.signals) == (0, False, False, 0)
    assert not any(ending.ranks.values())


def test_a_signal_becomes_sigterm_to_each_rank_and_the_supervisor_waits(start, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    thread = once_started(tmp_path, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
    ending = start("run")
    thread.join()
    assert (ending.signals, ending.killed, ending.exit_code) == (1, False, 0)
    assert (tmp_path / "stopped-0").exists()
    assert (tmp_path / "stopped-1").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("signals", [1, 2], ids=["stop_seconds", "second-signal"])
def test_ranks_that_do_not_listen_are_killed(start, tmp_path: Path, signals: int) -> None:  # type: ignore[no-untyped-def]
    def act() -> None:
        for _ in range(signals):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)

    thread = once_started(tmp_path, 2, act)
    began = time.monotonic()
    ending = start("deaf", stop_seconds=1 if signals == 1 else 60)
    thread.join()
    assert ending.killed
    assert time.monotonic() - began < 10
    assert belonging(-1, start.identity) == []


def test_a_signal_before_any_rank_runs_ends_at_once(start) -> None:  # type: ignore[no-untyped-def]
    thread = threading.Timer(0.05, lambda: os.kill(os.getpid(), signal.SIGINT))
    thread.start()
    environment = dict(os.environ, **{LAUNCH_ID: start.identity})
    began = time.monotonic()
    ending = supervise([sys.executable, "-c", "import time; time.sleep(60)"], environment, 2, 60, failed=lambda: False)
    thread.join()
    assert (ending.signals, ending.killed, ending.ranks) == (1, True, {})
    assert time.monotonic() - began < 5


def test_a_killed_rank_is_seen_with_its_signal_and_ends_the_others(start, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(module, "FAILURE_GRACE_SECONDS", 0.5)
    ending = start("die")
    assert next(iter(ending.ranks.items())) == (1, -signal.SIGKILL)
    assert ending.killed
    assert belonging(-1, start.identity) == []


def test_a_failed_rank_is_seen_with_its_exit_status(start, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(module, "FAILURE_GRACE_SECONDS", 0.5)
    assert start("fail").ranks[1] == 3


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_ranks_without_their_launcher_save_and_end(start, tmp_path: Path, number: int) -> None:  # type: ignore[no-untyped-def]
    def act() -> None:
        rank = psutil.Process(pids(tmp_path)[0])
        rank.parent().send_signal(number)  # type: ignore[union-attr]

    thread = once_started(tmp_path, 2, act)
    ending = start("run")
    thread.join()
    assert (ending.launcher_lost, ending.killed) == (True, False)
    assert ending.signals == (number == signal.SIGTERM)  # SIGTERM to the launcher is a wish to stop
    assert (tmp_path / "stopped-0").exists()
    assert (tmp_path / "stopped-1").exists()
    assert belonging(-1, start.identity) == []


def test_a_child_of_a_rank_is_not_taken_for_the_rank(start, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(module, "HELPER_GRACE_SECONDS", 0.5)
    thread = once_started(tmp_path, 4, lambda: os.kill(os.getpid(), signal.SIGINT))
    ending = start("fork")
    thread.join()
    assert set(ending.ranks) == {0, 1}
    assert belonging(-1, start.identity) == []


def test_a_helper_that_detached_itself_is_ended(start, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(module, "HELPER_GRACE_SECONDS", 0.5)
    start("detach")
    assert belonging(-1, start.identity) == []


def test_the_launcher_dies_with_a_killed_parent(tmp_path: Path) -> None:
    """SIGKILL leaves this process no word to say: the kernel has to end the launcher."""
    launcher_code = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    code = f"""
import os, sys
from bigtrain.launch.supervise import supervise, LAUNCH_ID
supervise([sys.executable, "-c", {launcher_code!r}], dict(os.environ, **{{LAUNCH_ID: "x"}}), 1, 5, lambda: False)
"""
    parent = subprocess.Popen([sys.executable, "-c", code])
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.02)
    launcher = psutil.Process(int((tmp_path / "pid").read_text()))
    parent.kill()
    parent.wait()
    assert psutil.wait_procs([launcher], timeout=5)[1] == []
