"""A teacher's likeliest tokens on the disk: each sample is asked about once, in whichever run, by whichever rank.

A folder for each teacher, temperature, K and prepared data. Every session of a rank appends to three files of its own:
`.index` (of each sample its key, where its rows begin and how many they are), `.logp` (float16) and `.columns` (int32),
K of each a row. Rows are written before the index says that they are there; what a crash has cut off is not looked at.
A sample's key is a hash of what the teacher was shown: padding, the order and the number of ranks do not matter.
"""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bigtrain.batch import Batch
from bigtrain.config import Config
from bigtrain.models.soft_targets import TopK

ENTRY = np.dtype([("key", "S32"), ("begin", "<u8"), ("rows", "<u4")])
FOLDER = "teachers"  # in data.cache_dir
UNSCORED = -20.0  # log-probability in rows that nobody reads: finite, so that 0 times it is 0


class TeacherCache:
    def __init__(self, directory: Path, k: int, rank: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory, self.k = directory, k
        self.mine = directory / f"{time.time_ns():x}-{os.getpid()}-{rank}"
        self.written = 0  # rows
        self.places: dict[bytes, tuple[Path, int, int]] = {}
        self._read: dict[Path, int] = {}  # entries of each index that are known

    @classmethod
    def of(cls, config: Config, teacher: str, rank: int) -> TeacherCache:
        settings = config.compress.distil
        assert settings is not None
        what = f"{teacher} {settings.temperature!r} {settings.cache_top_k} {config.data.prepared_dir}"
        name = hashlib.sha256(what.encode()).hexdigest()[:32]
        return cls(Path(config.data.cache_dir).expanduser() / FOLDER / name, settings.cache_top_k, rank)

    def keys(self, batch: Batch, scored: Tensor) -> list[bytes]:
        """Of each sample of a batch; scored (B, T) or (B, 1)."""
        tokens, mask, types = (batch.get(name) for name in ("tokens", "attention_mask", "token_types"))
        assert tokens is not None
        found = []
        for index, row in enumerate(tokens.cpu()):
            places = scored[index].nonzero().flatten().cpu()
            end = int(mask[index].sum()) if mask is not None else int(places[-1]) + 1 if len(places) else 0
            seen = [row[:end], places, *(part[index, :end].cpu() for part in (types,) if part is not None)]
            for name in ("targets_in", "document_ids"):
                if name in batch:
                    seen.append(batch[name][index, : int(places[-1]) + 1 if len(places) else 0].cpu())
            text = b"|".join(part.numpy().astype("<i8").tobytes() for part in seen)
            found.append(hashlib.blake2b(text, digest_size=16).hexdigest().encode())
        return found

    def missing(self, keys: list[bytes]) -> list[int]:
        """Which of the samples nobody has asked about."""
        if any(key not in self.places for key in keys):
            self._look()
        first: dict[bytes, int] = {}
        for index, key in enumerate(keys):
            if key not in self.places:
                first.setdefault(key, index)
        return list(first.values())

    def add(self, key: bytes, taught: TopK) -> None:
        rows = len(taught.log_p)
        log_p, columns = np.full((rows, self.k), -np.inf, "<f2"), np.zeros((rows, self.k), "<i4")
        width = taught.log_p.size(-1)  # a vocabulary may be smaller than k
        log_p[:, :width], columns[:, :width] = taught.log_p.float().cpu().numpy(), taught.columns.cpu().numpy()
        for suffix, values in ((".logp", log_p), (".columns", columns)):
            with open(f"{self.mine}{suffix}", "ab") as file:
                file.write(values.tobytes())
        with open(f"{self.mine}.index", "ab") as file:
            file.write(np.array([(key, self.written, rows)], ENTRY).tobytes())
        self.places[key] = (self.mine, self.written, rows)
        self.written += rows

    def rows(self, keys: list[bytes], scored: Tensor) -> TopK:
        """What is known of each row of scored (B, T), flattened; the samples are all there."""
        log_p = torch.full((*scored.shape, self.k), UNSCORED)
        columns = torch.zeros((*scored.shape, self.k), dtype=torch.int64)
        for index, key in enumerate(keys):
            path, begin, rows = self.places[key]
            where = scored[index].cpu()
            if not rows:
                continue
            for suffix, dtype, target in ((".logp", "<f2", log_p), (".columns", "<i4", columns)):
                stored = np.memmap(f"{path}{suffix}", dtype, "r").reshape(-1, self.k)[begin : begin + rows]
                target[index, where] = torch.from_numpy(np.array(stored)).to(target.dtype)
        log_p.clamp_(min=UNSCORED * 5)  # columns that a smaller vocabulary does not have
        device = scored.device
        return TopK(log_p.flatten(0, 1).to(device), columns.flatten(0, 1).to(device))

    def _look(self) -> None:
        """Read what others have written since."""
        for path in self.directory.glob("*.index"):
            base, known = path.with_suffix(""), self._read.get(path, 0)
            entries = path.stat().st_size // ENTRY.itemsize
            if entries <= known:
                continue
            with path.open("rb") as file:
                file.seek(known * ENTRY.itemsize)
                found = np.frombuffer(file.read((entries - known) * ENTRY.itemsize), ENTRY)
            there = base.with_suffix(".columns").stat().st_size // (4 * self.k)
            for key, begin, rows in found.tolist():
                if begin + rows <= there:
                    self.places.setdefault(key, (base, begin, rows))
            self._read[path] = entries
