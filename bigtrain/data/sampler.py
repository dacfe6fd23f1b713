"""Which windows of the corpus an optimizer step trains on: a pure function of (seed, step), for any world size.

Every epoch visits each window once, in a fresh pseudo-random order that is never written down: a Feistel network over
the next even power of two permutes the numbers (Luby & Rackoff 1988), and what falls outside [0, n) is sent
through again until it lands inside (cycle walking, Black & Rogaway 2002). A run that resumes at any step, at any world
size, therefore continues the same order with no state but the step.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ROUNDS = 6
GROUPED = 50  # global batches of labelled examples that are sorted by length together
MULTIPLE = 8  # labelled examples' lengths are padded to a multiple of it: matrix units like that

U64 = NDArray[np.uint64]


def sample_windows(seed: int, step: int, global_batch: int, n_windows: int, shift: int = 0) -> NDArray[np.int64]:
    """The windows of optimizer step `step` (from 0), in global order: int64 (global_batch,), each in [0, n_windows).

    They are the numbers step * global_batch + shift and up of the one order that the seed names.
    Raises ValueError without a window to choose from.
    """
    if n_windows < 1:
        raise ValueError("the split holds no whole window")
    position = np.arange(step * global_batch + shift, (step + 1) * global_batch + shift, dtype=np.uint64)
    epoch, index = np.divmod(position, np.uint64(n_windows))
    return permute(index, n_windows, epoch + _mix(np.uint64(seed))).astype(np.int64)


def by_length(lengths: NDArray[np.int64], seed: int, span: int, global_batch: int) -> NDArray[np.int64]:
    """The examples of GROUPED steps: (GROUPED, global_batch) numbers of examples, each row in order of length."""
    drawn = sample_windows(seed, span, GROUPED * global_batch, len(lengths))
    batches = drawn[np.argsort(lengths[drawn], kind="stable")].reshape(GROUPED, global_batch)
    key = np.full(GROUPED, seed * 1_000_003 + span, dtype=np.uint64)
    return batches[permute(np.arange(GROUPED, dtype=np.uint64), GROUPED, key).astype(np.int64)]


def padded(longest: int, limit: int) -> int:
    """Tokens of a batch whose longest example has `longest` of at most `limit`."""
    return max(longest, min(-(-longest // MULTIPLE) * MULTIPLE, limit))


def permute(index: U64, n: int, key: U64) -> U64:
    """Image of each `index` in [0, n) under the permutation of [0, n) that its `key` names."""
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    round_keys = [_mix(key + np.uint64((0x9E3779B97F4A7C15 * (i + 1)) % 2**64)) for i in range(ROUNDS)]
    image = index.copy()
    outside = np.arange(len(index))
    while len(outside):
        left, right = image[outside] >> half, image[outside] & mask
        for round_key in round_keys:
            left, right = right, left ^ (_mix(right + round_key[outside]) & mask)
        image[outside] = (left << half) | right
        outside = outside[image[outside] >= n]
    return image


def _mix(value: U64 | np.uint64) -> U64:
    """splitmix64's finaliser (Steele et al. 2014): every input bit moves every output bit. Wraps at 2**64."""
    value = np.atleast_1d(np.asarray(value, dtype=np.uint64))
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
