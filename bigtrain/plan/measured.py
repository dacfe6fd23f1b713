"""The memory that a run's tensors take, counted tensor by tensor while it runs.

The resident set of a process is no measure of a model: libraries, the interpreter and freed memory that is kept are
in it, hundreds of MiB that differ from run to run. Here every operator's results are seen as they are made
(`TorchDispatchMode`), and a storage's bytes count from then until its last reference goes, in whichever thread. The
sum is exact and works for tensors without memory too. Scratch memory that an operator takes and gives back inside
itself is not seen (0.7% of the peak in the run where the allocator's own count was compared).
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that were made inside the mode and are still there."""

    def __init__(self) -> None:
        super().__init__()
        # Modules that torch imports when they are first needed look at torch's functions, which ZeRO-3 replaces then.
        import torch._dynamo  # noqa: F401

        self.live, self.peak = 0, 0
        self._known: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self.peaks: dict[str, int] = {}  # of each phase that was named
        self.phase = ""

    def note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known or tensor.device.type == "meta":
            return
        size = storage.nbytes()
        self._known[storage] = size
        weakref.finalize(storage, self._gone, size)
        self.live += size
        self.peak = max(self.peak, self.live)
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), self.live)

    def _gone(self, size: int) -> None:
        self.live -= size

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, Tensor):
                self.note(each)
        return result
