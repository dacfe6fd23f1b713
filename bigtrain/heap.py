"""What the C library keeps of freed memory. Parameters that are whole for a moment, one after another, leave holes
between their parts, which together are as much as the model."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

EVERY_BYTES = 8 * 2**20  # of tensors that have come and gone


class Trimmer:
    """Gives freed memory back once so much may have gathered."""

    def __init__(self) -> None:
        self._bytes = 0

    def freed(self, tensor: Tensor) -> None:
        """It is about to be; what is on a GPU is not the C library's."""
        self._bytes += tensor.nbytes if tensor.device.type == "cpu" else 0
        if self._bytes >= EVERY_BYTES:
            trim()
            self._bytes = 0


@contextlib.contextmanager
def trimmed_while_born() -> Iterator[None]:
    """Around `deepspeed.zero.Init`: each parameter is whole until its module is there."""
    from torch.nn.modules.module import register_module_parameter_registration_hook

    trimmer = Trimmer()
    handle = register_module_parameter_registration_hook(lambda _, __, parameter: trimmer.freed(parameter))
    try:
        yield
    finally:
        handle.remove()


def trim() -> None:
    """Give freed memory back to the system; nothing where the C library is not glibc."""
    _malloc_trim()(0)


@functools.cache
def _malloc_trim() -> Callable[[int], object]:
    try:
        found: Callable[[int], object] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return lambda _: None
    return found
