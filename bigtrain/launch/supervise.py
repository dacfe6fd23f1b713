"""Watch the processes of one launch: pass on a wish to stop, end them all when one fails, leave none behind.

The deepspeed launcher alone does not do that: SIGTERM to it orphans the ranks, and if its middle process is killed
it reports success with the ranks still running. So signals go to the ranks themselves, and what happened is judged
by what is seen of each rank. A launcher that a signal asked to stop is taken as asked on the ranks' behalf; one that
was killed leaves ranks that can still save what they have.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import FrameType

import psutil

from bigtrain.launch.hang import Hang

LAUNCH_ID = "BIGTRAIN_LAUNCH_ID"  # in the environment of every process of a launch, however far it detaches itself
WORKER = "bigtrain.worker"
POLL_SECONDS = 0.2
FAILURE_GRACE_SECONDS = 1.5  # for the other ranks to say what they saw, once one has failed
LAUNCHER_GRACE_SECONDS = 10.0  # for the launcher to end after its ranks
HELPER_GRACE_SECONDS = 5.0  # for helpers of the ranks (an uploader) to end after a good run


@dataclass
class Ending:
    """How a launch ended."""

    exit_code: int = 0  # the launcher's own
    # rank -> exit status (negative: the signal), None if nobody saw it; in the order in which they ended
    ranks: dict[int, int | None] = field(default_factory=dict)
    signals: int = 0  # how often somebody asked this process (or the launcher) to stop
    launcher_lost: bool = False  # the launcher ended before its ranks did
    killed: bool = False  # this process had to kill them
    hang: Hang | None = None  # why it did
    lost: str | None = None  # a host that was cut off or died: which, and what was seen of it
    last_words: str = ""  # of the launcher, if it was listened to
    hosts: dict[int, str] = field(default_factory=dict)  # where each rank ran, if not here

    def where(self, rank: object) -> str:
        """Rank N, with its host if that is not this machine."""
        host = next((host for number, host in self.hosts.items() if str(number) == str(rank)), None)
        return f"rank {rank} on {host}" if host else f"rank {rank}"


# Given the live ranks and the numbers of those that have ended: a rank that hangs, or None.
Look = Callable[[Mapping[int, psutil.Process], set[int]], Hang | None]
ASKS_TO_STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def supervise(
    command: list[str],
    environment: dict[str, str],
    ranks: int,
    stop_seconds: float,
    failed: Callable[[], bool],
    look: Look = lambda alive, ended: None,
) -> Ending:
    """Run `command` in a session of its own until it and its ranks have ended, and return how.

    `environment` holds LAUNCH_ID. SIGINT, SIGTERM or SIGHUP here or to the launcher becomes SIGTERM to each rank; a
    second one, or `stop_seconds` without an end, kills. `failed()` says whether a rank has reported a failure; `look`
    is called several times a second, and if it finds a rank that hangs, all are killed.
    """
    ending = Ending()
    with counting_signals(ending):
        launcher = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=die_with(os.getpid()),
        )
        try:
            _watch(launcher, ending, ranks, stop_seconds, failed, look)
            failed_ranks = any(ending.ranks.values())
            clean = not (ending.killed or ending.launcher_lost or failed_ranks) and ending.exit_code == 0
            if clean:
                launcher.kill()  # it would see the ends of its ranks only when it next looks, within a second
            _end_all(launcher, environment[LAUNCH_ID], HELPER_GRACE_SECONDS if clean else 0)
        except BaseException:
            _end_all(launcher, environment[LAUNCH_ID], 0)
            raise
    return ending


def _watch(
    launcher: subprocess.Popen[bytes],
    ending: Ending,
    ranks: int,
    stop_seconds: float,
    failed: Callable[[], bool],
    look: Look,
) -> None:
    workers: dict[int, psutil.Process] = {}  # by rank, all that were ever seen
    told: set[int] = set()  # ranks that were asked to stop
    deadline = float("inf")
    with _Watch() as watch:
        while True:
            status = launcher.poll()
            if len(workers) < ranks and status is None:
                for rank, process in find_workers(lambda process: os.getsid(process.pid) == launcher.pid).items():
                    if rank not in workers:
                        workers[rank] = process
                        watch.add(process.pid)
            for rank, process in workers.items():
                if rank not in ending.ranks:
                    alive, code = state_of(process)
                    if not alive:
                        ending.ranks[rank] = code
            alive_ranks = {rank: process for rank, process in workers.items() if rank not in ending.ranks}
            if status is not None and not ending.launcher_lost:
                ending.exit_code = status
                ending.signals += -status in ASKS_TO_STOP
                if not alive_ranks:
                    return
                ending.launcher_lost = True
            all_came = len(workers) == ranks
            if all_came and not alive_ranks and (ending.launcher_lost or _told_enough(ending)):
                return

            now = time.monotonic()
            if failed() or any(ending.ranks.values()) or (ending.launcher_lost and not all_came):
                deadline = min(deadline, now + FAILURE_GRACE_SECONDS)
            if all_came and not alive_ranks:
                deadline = min(deadline, now + LAUNCHER_GRACE_SECONDS)
            if ending.signals or ending.launcher_lost:
                deadline = min(deadline, now + stop_seconds)
                for rank, process in alive_ranks.items():
                    if rank not in told:
                        told.add(rank)
                        with contextlib.suppress(psutil.Error):
                            process.terminate()
            if ending.signals > 1 or now >= deadline or (ending.signals and not workers):
                ending.killed = True
                return
            ending.hang = look(alive_ranks, set(ending.ranks))
            if ending.hang is not None:
                ending.killed = True
                return
            watch.wait(POLL_SECONDS)


def _told_enough(ending: Ending) -> bool:
    """Whether the ranks' own statuses say how it ended, so that the launcher's need not be waited for."""
    codes = set(ending.ranks.values())
    return None not in codes and (codes == {0} or bool(codes - {0, -signal.SIGKILL}))


class _Watch:
    """Waits until one of some processes ends: at once, so that what it left behind is seen before its parent reaps it,
    and the first to end is seen first. Without pidfds (no Linux) it only waits."""

    def __init__(self) -> None:
        self.handles: dict[int, int] = {}  # pid -> pidfd, readable once the process has ended

    def __enter__(self) -> _Watch:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles.values():
            os.close(handle)

    def add(self, pid: int) -> None:
        if pid not in self.handles and hasattr(os, "pidfd_open"):
            with contextlib.suppress(OSError):
                self.handles[pid] = os.pidfd_open(pid)

    def wait(self, seconds: float) -> None:
        poll = select.poll()
        for handle in self.handles.values():
            poll.register(handle, select.POLLIN)
        for handle, _ in poll.poll(seconds * 1000):
            self.handles = {pid: other for pid, other in self.handles.items() if other != handle}
            os.close(handle)


# ------------------------------------------------------------------------------------------- what is running


def find_workers(belongs: Callable[[psutil.Process], bool]) -> dict[int, psutil.Process]:
    """The ranks' own processes of a launch: not the launcher, whose arguments name the module too, nor children."""
    found: dict[int, tuple[int, psutil.Process]] = {}
    pids = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError, ValueError, KeyError):
            arguments = process.cmdline()
            if ("-m", WORKER) in itertools.pairwise(arguments) and belongs(process):
                rank, parent = int(process.environ()["RANK"]), process.ppid()
                pids.add(process.pid)
                if rank not in found or found[rank][0] in pids:
                    found[rank] = (parent, process)
    return {rank: process for rank, (parent, process) in found.items() if parent not in pids}


def state_of(process: psutil.Process) -> tuple[bool, int | None]:
    """Whether a process (no child of ours) lives, and if it has just died its exit status: -9 for SIGKILL."""
    try:
        if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            return True, None
    except psutil.Error:
        return False, None
    try:
        with open(f"/proc/{process.pid}/stat", "rb") as file:
            word = int(file.read().rpartition(b")")[2].split()[49])  # field 52, as wait() gives it
    except (OSError, ValueError, IndexError):
        return False, None
    return False, os.waitstatus_to_exitcode(word)


def belonging(session: int, launch_id: str) -> list[psutil.Process]:
    """Every live process of a launch: in its session, or started with its LAUNCH_ID."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            if os.getsid(process.pid) == session or process.environ().get(LAUNCH_ID) == launch_id:
                found.append(process)
    return found


def _end_all(launcher: subprocess.Popen[bytes], launch_id: str, grace_seconds: float) -> None:
    """Return when no process of the launch is left; kill what is still there after the grace."""
    limit = time.monotonic() + grace_seconds
    while processes := belonging(launcher.pid, launch_id):
        if time.monotonic() >= limit:
            for process in processes:
                with contextlib.suppress(psutil.Error):
                    process.kill()
        launcher.poll()  # reap it
        if time.monotonic() > limit + 10:  # unkillable (stuck in the kernel): nothing more can be done from here
            return
        time.sleep(0.05)
    launcher.wait()


# -------------------------------------------------------------------------------------------------- signals


@contextlib.contextmanager
def counting_signals(ending: Ending) -> Iterator[None]:
    """While the ranks run, a signal to this process is a wish, counted here and carried out by the loop."""

    def count(_signal: int, _frame: FrameType | None) -> None:
        ending.signals += 1

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    before = {}
    for number in ASKS_TO_STOP:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            before[number] = signal.signal(number, count)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def die_with(parent: int) -> Callable[[], None] | None:
    """For the launcher's start: have the kernel kill it when this process dies, even by SIGKILL (Linux only).

    The ranks see to themselves: they watch BIGTRAIN_PARENT_PID.
    """
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG

    def in_child() -> None:
        prctl(set_parent_death_signal, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    return in_child
