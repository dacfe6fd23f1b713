"""`python -m tests.mutants [ID ...]` (`make mutants`): plant bugs, one at a time, and see that the tests catch each.

tests/mutants.yaml names them: a file, the text that must stand in it exactly once, what takes its place, why that line
is risky, and the tests that are to fail. Each is planted in a copy of this tree, and only its tests run there. One that
no test catches is a hole in the suite: write the missing test.

--check only looks whether every mutant still fits; --all-tests runs all of `make test`'s tests on what survives.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
LIST = Path(__file__).with_suffix(".yaml")
COPIED = ("bigtrain", "hydra_plugins", "conf", "tests", "benchmarks", "launch")  # and the files beside them
SECONDS = 900  # of one mutant's tests
CAUGHT, SURVIVED, STALE, BROKEN = "caught", "SURVIVED", "stale", "broken"
FAILED, PASSED = 1, 0  # pytest's exit status; any other: it could not run them


@dataclass(frozen=True)
class Mutant:
    id: str
    file: str
    old: str
    new: str
    why: str
    tests: list[str]  # files or node ids

    def planted(self, text: str) -> str:
        """The file's text with the bug in it. Raises ValueError where it does not fit, SyntaxError for no Python."""
        if (found := text.count(self.old)) != 1:
            raise ValueError(f"its old text is {found} times in {self.file}")
        changed = text.replace(self.old, self.new)
        if changed == text:
            raise ValueError("it changes nothing")
        if self.file.endswith(".py"):
            compile(changed, self.file, "exec")
        return changed


def read() -> list[Mutant]:
    """Raises ValueError where two have one id."""
    mutants = [Mutant(id=name, **entry) for name, entry in yaml.safe_load(LIST.read_text(encoding="utf-8")).items()]
    for mutant in mutants:
        if not mutant.tests:
            raise ValueError(f"{mutant.id}: names no tests")
    return mutants


def problem(mutant: Mutant) -> str | None:
    """Why a mutant can no longer be planted, or its tests no longer run."""
    try:
        mutant.planted((ROOT / mutant.file).read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError) as error:
        return str(error)
    for test in mutant.tests:
        file, _, name = test.partition("::")
        try:
            text = (ROOT / file).read_text(encoding="utf-8")
        except OSError as error:
            return str(error)
        if name and f"def {name.partition('[')[0]}(" not in text:
            return f"{file} has no {name}"
    return None


def copy(to: Path) -> Path:
    tree = to / "tree"
    tree.mkdir()
    for path in ROOT.iterdir():
        if path.is_dir() and path.name in COPIED:
            shutil.copytree(path, tree / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        elif path.is_file():
            shutil.copyfile(path, tree / path.name)
    return tree


def run(tree: Path, tests: list[str]) -> tuple[int | None, str]:
    """pytest's exit status, None where it did not end in time, and the last lines of what it said."""
    environment = os.environ | {
        "PYTHONPATH": str(tree),
        "PYTHONDONTWRITEBYTECODE": "1",  # a stale .pyc would hide the next mutant
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not soak", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, timeout=SECONDS,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return None, f"not done after {SECONDS} s"
    return done.returncode, "\n".join((done.stdout + done.stderr).splitlines()[-15:])


def try_out(tree: Path, mutant: Mutant, all_tests: bool) -> tuple[str, str]:
    """(what became of it, a word on that)"""
    file = tree / mutant.file
    sound = file.read_text(encoding="utf-8")
    file.write_text(mutant.planted(sound), encoding="utf-8")
    try:
        status, said = run(tree, mutant.tests)
        if status == PASSED and all_tests:
            status, said = run(tree, [])
    finally:
        file.write_text(sound, encoding="utf-8")
    if status in (FAILED, None):  # a bug that makes the tests wait for ever is seen too
        return CAUGHT, "" if status else said
    return (SURVIVED, mutant.why) if status == PASSED else (BROKEN, said)


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.mutants", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("ids", nargs="*", help="default: all")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--all-tests", action="store_true")
    arguments = parser.parse_args()
    mutants = read()
    if unknown := set(arguments.ids) - {mutant.id for mutant in mutants}:
        parser.error(f"no such mutant: {', '.join(sorted(unknown))}")
    mutants = [mutant for mutant in mutants if not arguments.ids or mutant.id in arguments.ids]
    stale = {mutant.id: why for mutant in mutants if (why := problem(mutant)) is not None}
    for name, why in stale.items():
        print(f"{STALE:9} {name}: {why}")
    fit = [mutant for mutant in mutants if mutant.id not in stale]
    if arguments.check:
        print(f"{len(fit)} of {len(mutants)} mutants fit")
        return 1 if stale else 0
    results = dict.fromkeys(stale, STALE)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = copy(Path(folder))
        tests = sorted({test for mutant in fit for test in mutant.tests})
        status, said = run(tree, tests)
        if status != PASSED:
            print(f"without any mutant the tests do not pass:\n{said}")
            return 1
        for mutant in fit:
            began = time.monotonic()
            results[mutant.id], word = try_out(tree, mutant, arguments.all_tests)
            seconds = time.monotonic() - began
            print(f"{results[mutant.id]:9} {seconds:6.1f} s  {mutant.id}{f': {word}' if word else ''}", flush=True)
    counts = {outcome: list(results.values()).count(outcome) for outcome in (CAUGHT, SURVIVED, STALE, BROKEN)}
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()), f"of {len(results)}")
    return 0 if counts[CAUGHT] == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
