"""Values that a shell would run: they arrive as they are, and nothing runs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

import bigtrain
from bigtrain.config import Config, LaunchConfig
from bigtrain.hardware import Placement, place
from bigtrain.launch import dryrun, local
from tests.runs import TINY, command

HOSTILE = [
    "$(touch PWNED)", "`touch PWNED`", "; touch PWNED;", "a' ; touch PWNED ; '", 'a" ; touch PWNED ; "',
    "&& touch PWNED", "| touch PWNED", "a\ntouch PWNED\n", "${IFS}$(touch${IFS}PWNED)",
    "-rf", "%s%n", "> PWNED", "\\$(touch PWNED)", "é ü",
]  # fmt: skip


def _placement(config: Config) -> Placement:
    return place(config.launch)


@pytest.mark.parametrize("value", HOSTILE)
def test_commands_and_scripts(value: str, tmp_path: Path) -> None:
    """The command is a list of words, and the script that a dry run prints quotes every one of them."""
    config = Config(run_dir=f"/nowhere/{value}", launch=LaunchConfig(ranks=1, device="cpu", env={"VALUE": value}))
    start = local.start_of(config, _placement(config), "0" * 64)
    assert f"/nowhere/{value}/config.yaml" in start.command
    assert start.environment["VALUE"] == value
    script = dryrun.show(config, _placement(config))
    report = f"{sys.executable} -c 'import os, sys; print([os.environ[\"VALUE\"], sys.argv])' "
    lines = script.split("\n# effective")[0].rstrip()
    at = lines.rindex(sys.executable)
    done = subprocess.run(
        ["bash", "-c", lines[:at] + report + lines[at:].replace(sys.executable, "x", 1)],
        cwd=tmp_path, capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    environment, words = ast.literal_eval(done.stdout)
    assert environment == value
    assert f"/nowhere/{value}/config.yaml" in words
    assert not list(tmp_path.iterdir())


def test_a_run_in_a_hostile_directory(tmp_path: Path, data_cache: Path) -> None:
    """Through the real launcher, with the value in the run directory's name, a variable and a data path."""
    value = "$(touch PWNED);`touch PWNED` 'a\" & b"
    corpus, run = tmp_path / f"corpus {value}", tmp_path / f"run {value}"
    corpus.mkdir()
    for number in range(40):  # which are held out depends on their names: enough that some are
        (corpus / f"{number}.txt").write_text(f"{number} the quick brown fox jumps over the lazy dog. " * 40)
    quoted = {name: "'" + text.replace("'", "\\'") + "'" for name, text in
              {"run": str(run), "corpus": str(corpus), "value": value}.items()}  # fmt: skip
    done = subprocess.run(
        command("train", *TINY, "data=text", f"data.path={quoted['corpus']}", f"run_dir={quoted['run']}",
                f"launch.env.VALUE={quoted['value']}", f"data.cache_dir={data_cache}", "data.tokenizer.vocab_size=300",
                "model.max_seq_len=16", "data.held_out=0.5", "train.steps=1", "launch.ranks=1"),
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (run / "result.json").is_file()
    assert not list(tmp_path.rglob("PWNED"))
    assert not Path("PWNED").exists()
    assert not [process for process in psutil.process_iter(["cwd"]) if process.info["cwd"] == str(tmp_path)]


def test_no_shell_anywhere() -> None:
    """Every process is started from a list of words: nothing in the package hands a line to a shell."""
    for path in sorted(Path(bigtrain.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            assert name not in ("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"), path
            assert name not in ("eval", "exec"), path
            assert name.rpartition(".")[2] not in ("unsafe_load", "full_load"), path
            shell = [word for word in node.keywords if word.arg in ("shell", "trust_remote_code", "allow_pickle")]
            assert all(ast.unparse(word.value) == "False" for word in shell), path
            if name.startswith("subprocess.") and node.args:
                assert not isinstance(node.args[0], (ast.JoinedStr, ast.Constant)), path
