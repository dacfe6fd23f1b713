"""The command, its launcher and its ranks as real processes that are forked instead of started.

Starting one costs what importing torch and DeepSpeed costs: seconds, for hundreds of commands most of the test suite's
time. Here a command is forked from a process that has imported everything (tests/zygote.py), and what it would start
by `python -m MODULE` is forked in turn: a child of its own with pid, session, signals, standard streams, arguments and
environment as /proc shows them, but with Python and its imports ready.

What it does not show: what depends on the interpreter's start (PYTHONPATH, LD_PRELOAD, glibc's tunables), and that a
rank knows only what it is given (memory of the parent is inherited). Tests of that say `fresh=True` to
`tests.runs.bigtrain`; a different PYTHONPATH or LD_PRELOAD for a child starts it for real.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import inspect
import io
import logging
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
import warnings
from pathlib import Path
from typing import Any, NoReturn

MODULES = ("bigtrain.launch.light_launcher", "bigtrain.worker")  # what is forked; all else is started
AT_START = ("PYTHONPATH", "LD_PRELOAD", "PYTHONHASHSEED", "PYTHONOPTIMIZE", "PYTHONWARNINGS")  # read by Python's start
_modules: dict[str, Any] = {}  # those of the zygote
_levels: dict[str, int] = {}  # of its loggers
_shown: list[Any] = []  # memory that /proc reads


def run(arguments: list[str], environment: dict[str, str], directory: str, out: str, err: str) -> NoReturn:
    """Be `bigtrain ARGUMENTS`: called in a process that has just been forked from the zygote."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _modules.update(sys.modules)
    _levels.update({name: logging.getLogger(name).level for name in logging.Logger.manager.loggerDict})
    for path, number in ((os.devnull, 0), (out, 1), (err, 2)):
        handle = os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(handle, number)
        os.close(handle)
    subprocess.Popen = ForkingPopen  # type: ignore[misc]
    _become([sys.executable, "-m", "bigtrain.cli", *arguments], environment, directory)


class ForkingPopen(subprocess.Popen):
    """A Popen whose `python -m MODULE` of our own is forked from this process."""

    def _execute_child(self, *values: Any, **keywords: Any) -> None:  # type: ignore[override]
        start = super()._execute_child  # type: ignore[misc]
        given = inspect.signature(start).bind(*values, **keywords).arguments
        arguments, environment = given["args"], given["env"]
        environment = dict(os.environ) if environment is None else environment
        if not _is_ours(arguments) or any(environment.get(name) != os.environ.get(name) for name in AT_START):
            start(*values, **keywords)
            return
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                _child(given, [os.fspath(word) for word in arguments], environment)
            except BaseException:
                traceback.print_exc()
            os._exit(255)
        self._child_created = True
        names = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(given[name] for name in names))


def _is_ours(arguments: Any) -> bool:
    if not isinstance(arguments, (list, tuple)) or not arguments or arguments[0] != sys.executable:
        return False
    words = [str(word) for word in arguments]
    return any(words[index : index + 2] == ["-m", module] for module in MODULES for index in (1, 2))


def _child(given: dict[str, Any], arguments: list[str], environment: dict[str, str]) -> NoReturn:
    """What happens between fork and exec, then what a new Python would do."""
    for number, name in ((0, "p2cread"), (1, "c2pwrite"), (2, "errwrite")):
        if given[name] >= 0:
            os.dup2(given[name], number)
    if given["start_new_session"]:
        os.setsid()
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if given["preexec_fn"] is not None:
        given["preexec_fn"]()
    keep = {0, 1, 2, *given["pass_fds"]}
    for handle in map(int, os.listdir("/proc/self/fd")):
        if handle not in keep:
            with contextlib.suppress(OSError):
                os.close(handle)
    for name in set(sys.modules) - set(_modules):
        if name.partition(".")[0] in ("bigtrain", "deepspeed"):  # others may have told torch of operators: but once
            del sys.modules[name]
    sys.modules.update(_modules)  # the launcher puts stand-ins for DeepSpeed's
    for name, level in _levels.items():
        logging.getLogger(name).setLevel(level)
    subprocess.Popen = ForkingPopen  # type: ignore[misc]
    atexit._clear()
    _become(arguments, environment, given["cwd"] and os.fspath(given["cwd"]))


def _become(arguments: list[str], environment: dict[str, str], directory: str | None) -> NoReturn:
    """Run `python [-u] -m MODULE ...` in this process to its end."""
    show(arguments, environment)
    os.environ.clear()
    os.environ.update(environment)
    if directory:
        os.chdir(directory)
    tempfile.tempdir = None
    sys.stdin, sys.stdout, sys.stderr = _text(0, "r"), _text(1), _text(2)
    for handler in logging.root.handlers + list(logging.getLogger("DeepSpeed").handlers):
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
            handler.setStream(sys.stdout)
    _use_threads(environment)
    use_heap(environment.get("GLIBC_TUNABLES", ""))
    warnings.resetwarnings()
    at = arguments.index("-m")
    sys.modules.pop(arguments[at + 1], None)  # in a new process it is __main__ alone
    sys.argv = [arguments[at + 1], *arguments[at + 2 :]]
    status = 0
    try:
        runpy.run_module(arguments[at + 1], run_name="__main__", alter_sys=True)
    except SystemExit as exit:
        if isinstance(exit.code, int) or exit.code is None:
            status = exit.code or 0
        else:
            print(exit.code, file=sys.stderr)
            status = 1
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def _text(number: int, mode: str = "w") -> io.TextIOWrapper:
    return io.TextIOWrapper(open(number, f"{mode}b", closefd=False), encoding="utf-8", line_buffering=True)


def _use_threads(environment: dict[str, str]) -> None:
    """As many threads as a new process would take from OMP_NUM_THREADS."""
    import torch

    with contextlib.suppress(ValueError):
        torch.set_num_threads(int(environment.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))))


# <malloc.h>'s numbers of what GLIBC_TUNABLES names; mallopt takes an int.
_HEAP = {"mmap_max": -4, "trim_threshold": -1, "top_pad": -2, "mmap_threshold": -3}


def use_heap(tunables: str) -> None:
    """Have the C library keep freed memory as these GLIBC_TUNABLES ask: else every large tensor is a fault a page."""
    libc = ctypes.CDLL(None)
    for setting in filter(None, tunables.split(":")):
        name, value = setting.removeprefix("glibc.malloc.").split("=")
        if name in _HEAP:
            libc.mallopt(_HEAP[name], min(int(value), 2**31 - 1))


class _Map(ctypes.Structure):
    """struct prctl_mm_map of <linux/prctl.h>."""

    _fields_ = [
        *((name, ctypes.c_uint64) for name in (
            "start_code", "end_code", "start_data", "end_data", "start_brk", "brk", "start_stack",
            "arg_start", "arg_end", "env_start", "env_end", "auxv",
        )),
        ("auxv_size", ctypes.c_uint32), ("exe_fd", ctypes.c_uint32),
    ]  # fmt: skip


def show(arguments: list[str], environment: dict[str, str]) -> None:
    """Have /proc/PID/cmdline and environ show these, as after an exec. Raises OSError where the kernel cannot."""
    words = b"".join(os.fsencode(word) + b"\0" for word in arguments)
    variables = b"".join(os.fsencode(f"{name}={value}") + b"\0" for name, value in environment.items())
    memory = ctypes.create_string_buffer(words + variables)
    stat = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()

    def field(number: int) -> int:
        return int(stat[number - 3])  # as proc(5) counts them

    libc = ctypes.CDLL(None, use_errno=True)
    libc.sbrk.restype = ctypes.c_void_p
    start = ctypes.addressof(memory)
    layout = _Map(
        field(26), field(27), field(45), field(46), field(47), libc.sbrk(0), field(28),
        start, start + len(words), start + len(words), start + len(words) + len(variables), 0, 0, 0xFFFFFFFF,
    )  # fmt: skip
    set_mm, set_map = 35, 14  # PR_SET_MM, PR_SET_MM_MAP
    if libc.prctl(set_mm, set_map, ctypes.byref(layout), ctypes.c_ulong(ctypes.sizeof(layout)), 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_MM_MAP)")
    _shown[:] = [memory]
