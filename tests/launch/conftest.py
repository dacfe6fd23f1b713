"""What the tests of real launches share."""

from __future__ import annotations

import random
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    letters = random.Random(0)
    for number in range(8):
        words = ("".join(letters.choices("etaoinshrdlu", k=letters.randint(1, 9))) for _ in range(400))
        (folder / f"{number}.txt").write_text(" ".join(words))
    return folder
