"""prepare() in a process of its own, to be limited or killed: prepare_script.py '{"data": {...}, "limits": {...}}'.

`constants` overrides bigtrain.data.prepare's, `limits` are resource limits. Prints one line of JSON.
"""

from __future__ import annotations

import json
import resource
import sys

from bigtrain.config import from_dict
from bigtrain.data import prepare as prepare_function
from bigtrain.errors import BigtrainError

# `bigtrain.data.prepare` is the function: the package exports it under the module's name.
module = sys.modules["bigtrain.data.prepare"]


def peak_kib() -> int:
    """VmHWM; getrusage's own figure begins at the size of the process that started this one."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))


def main() -> int:
    order = json.loads(sys.argv[1])
    for name, value in order.pop("constants", {}).items():
        setattr(module, name, value)
    for name, value in order.pop("limits", {}).items():
        resource.setrlimit(getattr(resource, name), (value, value))
    try:
        prepared = prepare_function(from_dict({"model": {"max_seq_len": 64}, **order}))
    except BigtrainError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    peak = {"own_kib": peak_kib(), "worker_kib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss}
    print(json.dumps({"directory": str(prepared.directory), "torch": "torch" in sys.modules, **peak}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
