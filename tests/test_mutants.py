"""The planted bugs of tests/mutants.yaml fit the code and name tests that there are; `make mutants` tries them."""

from __future__ import annotations

import pytest

from tests import mutants


def test_every_mutant_fits() -> None:
    found = mutants.read()
    stale = {mutant.id: why for mutant in found if (why := mutants.problem(mutant)) is not None}
    assert not stale, "the code has moved on: give these mutants of tests/mutants.yaml the text of today, or drop them"
    assert len(found) >= 45


def test_what_cannot_be_planted_is_said() -> None:
    mutant = mutants.Mutant("one", "a.py", "x = 1", "x = (", "", ["tests/a.py"])
    with pytest.raises(ValueError, match=r"2 times in a\.py"):
        mutant.planted("x = 1\nx = 1\n")
    with pytest.raises(SyntaxError):
        mutant.planted("x = 1\n")
