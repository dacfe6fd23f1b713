"""What tests' ranks are forked from: a process in which everything that a rank imports is there, and no thread is.

Imported by multiprocessing's fork server alone (tests/distributed/ranks.py). Half of what a rank imports it imports
late, when it first needs it: torch._dynamo under ZeRO-3, DeepSpeed's optimizers when they are built.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import os

# Read once, when torch and DeepSpeed are imported. A second thread would not survive a fork, what waits for it hangs.
os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}

from bigtrain.engine import lean

lean.import_deepspeed()
for name in (
    "pytest",  # which every child imports that is started from a test
    "torch._dynamo",
    "torch.numa",
    "torch.utils.cpp_extension",
    "rich.progress",
    "zstandard",
    "hydra._internal.hydra",
    "hydra.main",
    "bigtrain.cli",
    "bigtrain.compose",
    "bigtrain.doctor",
    "bigtrain.evaluate",
    "bigtrain.export",
    "bigtrain.generate",
    "bigtrain.launch.local",
    "bigtrain.launch.train",
    "bigtrain.plan.command",
    "bigtrain.report",
    "bigtrain.runs",
    "bigtrain.worker",
    "bigtrain.trainer",
    "bigtrain.compress",
    "bigtrain.engine.deepspeed",
    "bigtrain.engine.accelerate",
    "bigtrain.plan.preflight",
    "bigtrain.tasks.causal_lm",
):
    with contextlib.suppress(ImportError):  # of an extra: whoever wants it will say so
        importlib.import_module(name)
# DeepSpeed asks for the processor whenever it loads one of its ops, a second each time.
cpuinfo = importlib.import_module("cpuinfo")
cpuinfo.get_cpu_info = functools.partial(dict, cpuinfo.get_cpu_info())
gc.collect()
gc.freeze()  # else each child's first collection would copy all these pages
