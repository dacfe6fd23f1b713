"""The report as a browser shows it, and as its readers of a broken run meet it."""

from __future__ import annotations

import base64
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import yaml
from PIL import Image

from bigtrain import config as schema
from bigtrain import confusion
from bigtrain.config import Config, TaskConfig, dump
from bigtrain.errors import BigtrainError, ConfigError
from bigtrain.report import LOSS_UNITS, load_runs, loss_unit, not_comparable, smooth, thin, write_report

CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH (Debian package: chromium)")
PICTURES = ["loss", "bits_per_byte", "lr", "grad_norm", "throughput", "memory", "step_time"]


def make_run(run: Path, lr: float = 1e-3, loss: float = 2.5, steps: int = 60, finished: bool = True) -> Path:
    run.mkdir(parents=True)
    config = Config(run_dir=str(run))
    config.optimizer.lr = lr
    config.launch.env = {"HF_TOKEN": "do-not-show"}
    (run / "config.yaml").write_text(dump(config))
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            value = loss + 5 * math.exp(-step / 10)
            row = {
                "step": step, "time": 1e9 + step, "train/loss": value, "train/lr": lr, "train/grad_norm": 1 / step,
                "perf/tokens_per_second": 12e3, "perf/peak_memory_gib": 1.25,
                "perf/step_seconds": 0.25, "data/tokens": 8192 * step,
            }  # fmt: skip
            file.write(json.dumps(row) + "\n")
            if step % 20 == 0:
                row = {"step": step, "time": 1e9 + step, "eval/loss": value + 0.1, "eval/bits_per_byte": value / 2}
                file.write(json.dumps(row) + "\n")
    if finished:
        result = {
            "status": "finished", "eval/loss": loss, "eval/bits_per_byte": 1.234, "eval/gzip_bits_per_byte": 2.05,
            "eval/perplexity": math.exp(loss), "train/loss": loss, "train/steps": steps, "time/train_seconds": 75.0,
            "time/total_seconds": 90.0, "perf/tokens_per_second": 12e3, "model/parameters": 3_300_000,
        }  # fmt: skip
        (run / "result.json").write_text(json.dumps(result))
    return run


def chromium(*arguments: str) -> str:
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def picture(path: Path) -> np.ndarray:
    """(height, width, 3) uint8."""
    return np.asarray(Image.open(path).convert("RGB"))


def has_colour(pixels: np.ndarray, colour: str) -> bool:
    """Whether at least 200 pixels are about of this colour (#rrggbb)."""
    wanted = np.array([int(colour[index : index + 2], 16) for index in (1, 3, 5)])
    return int((np.abs(pixels.astype(int) - wanted).max(axis=-1) < 12).sum()) > 200


def cells(html: str, label: str) -> list[str]:
    """The cells of the table row that `label` heads, as HTML."""
    (row,) = re.findall(rf'<tr><th scope="row">{re.escape(label)}</th>(.*?)</tr>', html)
    return re.findall(r"<td>(.*?)</td>", row)


def test_one_run_gets_a_page_and_pictures_in_its_directory(tmp_path: Path) -> None:
    run = make_run(tmp_path / "first")
    page = write_report([run])
    assert page == run / "report" / "index.html"
    assert sorted(path.name for path in page.parent.iterdir()) == sorted(
        ["index.html", *(f"{name}.png" for name in PICTURES)]
    )
    for name in PICTURES:
        pixels = picture(page.parent / f"{name}.png")
        assert has_colour(pixels, "#0072b2"), name
        assert (pixels == 255).all(axis=-1).mean() > 0.5  # a light background
    assert has_colour(picture(page.parent / "loss.png"), "#d55e00")  # the held-out points


def test_the_page_needs_nothing_else_and_shows_no_secret(tmp_path: Path) -> None:
    html = write_report([make_run(tmp_path / "first")]).read_text()
    assert set(re.findall(r'(?:src|href)="([^"]{,15})', html)) == {"data:image/png;"}
    assert not re.search(r"@import|url\(|https?://", html)
    assert "do-not-show" not in html
    assert "launch.env.HF_TOKEN" in html
    assert cells(html, "Held-out loss") == ["2.5000"]
    assert cells(html, "Training time") == ["0:01:15"]
    assert "3.3M parameters" in html


def of_task(run: Path, task: dict[str, Any], tokenizer: str) -> Path:
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["task"] = task
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "tokenizer").mkdir()
    (run / "tokenizer" / "tokenizer.json").write_text(tokenizer)
    return run


def test_a_loss_is_in_the_unit_of_its_task(tmp_path: Path) -> None:
    runs = {
        "squared error": of_task(make_run(tmp_path / "a"), {"kind": "classification", "regression": True}, "1"),
        "nats per text": of_task(make_run(tmp_path / "b"), {"kind": "classification", "regression": False}, "2"),
        "nats per word": of_task(make_run(tmp_path / "c"), {"kind": "tagging"}, "1"),
        "nats per token": of_task(make_run(tmp_path / "d"), {"kind": "causal_lm"}, "1"),
    }
    for unit, path in runs.items():
        assert loss_unit(*load_runs([path])) == unit
        assert f'alt="loss in {unit} over steps of' in write_report([path]).read_text()
    kinds = {kind for task in get_args(TaskConfig) for kind in schema.kinds(task)}
    assert kinds == set(LOSS_UNITS)  # of every task
    mixed = load_runs([runs["nats per text"], runs["nats per word"]])
    assert not_comparable(mixed) == "Different tasks: nats per text, nats per word are not comparable."
    alike = [runs["nats per text"], of_task(make_run(tmp_path / "e"), {"kind": "classification"}, "3")]
    assert not not_comparable(load_runs(alike))  # texts are texts, however they are cut
    assert not not_comparable(load_runs([runs["nats per token"]]))


def test_two_tokenizers_are_compared_by_bytes(tmp_path: Path) -> None:
    first = of_task(make_run(tmp_path / "first"), {"kind": "causal_lm"}, "1")
    other = of_task(make_run(tmp_path / "other", loss=2.0), {"kind": "causal_lm"}, "2")
    html = write_report([first, other], tmp_path / "both").read_text()
    assert "Different tokenizers: nats per token are not comparable; bits per byte of the same text are." in html
    assert not any("<b>" in cell for cell in cells(html, "Held-out loss") + cells(html, "Held-out perplexity"))
    assert has_colour(picture(tmp_path / "both" / "bits_per_byte.png"), "#d55e00")
    (other / "tokenizer" / "tokenizer.json").write_text("1")
    html = write_report([first, other], tmp_path / "same").read_text()
    assert "not comparable" not in html
    assert "<b>" in cells(html, "Held-out loss")[1]


def test_an_evaluated_classifier_shows_its_labels(tmp_path: Path) -> None:
    run = make_run(tmp_path / "first")
    assert "confusion" not in write_report([run]).read_text()
    counts = confusion.matrix([0, 0, 1, 1, 1], [0, 1, 1, 1, 0], 2)
    found = {"labels": confusion.by_label(counts, ["<b>", "dog"]), "checkpoint": "step-60", "data": "held-out"}
    (run / "evaluation").mkdir()
    (run / "evaluation" / "metrics.json").write_text(json.dumps(found))
    (run / "evaluation" / "confusion.png").write_bytes(png := confusion.picture(counts, ["<b>", "dog"]))
    html = write_report([run]).read_text()
    assert cells(html, "&lt;b&gt;") == ["0.5000", "0.5000", "0.5000", "2"]
    assert cells(html, "dog") == ["0.6667", "0.6667", "0.6667", "3"]
    assert f'id="confusion" alt="confusion matrix" src="data:image/png;base64,{base64.b64encode(png).decode()}"' in html
    assert "step-60 on held-out" in html
    assert "confusion" not in write_report([run, make_run(tmp_path / "other")], tmp_path / "both").read_text()

    (run / "evaluation" / "metrics.json").write_text('{"labels": [')  # torn
    assert "confusion" not in write_report([run]).read_text()


def test_several_runs_share_axes_and_their_differences_are_listed(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "low"), make_run(tmp_path / "high", 3e-3, 2.25), make_run(tmp_path / "x", steps=30)]
    page = write_report(runs, tmp_path / "out")
    html = page.read_text()
    assert cells(html, "Held-out loss") == ["2.5000", "<b>2.2500</b>", "2.5000"]
    assert cells(html, "optimizer.lr") == ["0.001", "0.003", "0.001"]
    differences = html[html.index("Where the configs differ") :]
    assert re.findall(r'<th scope="row">(.*?)</th>', differences) == ["optimizer.lr"]  # not run_dir
    for name in ("loss", "lr"):
        pixels = picture(page.parent / f"{name}.png")
        for colour in ("#0072b2", "#d55e00", "#009e73"):
            visible = has_colour(pixels, colour)
            assert visible, (name, colour)


def test_several_runs_go_to_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [make_run(tmp_path / "low"), make_run(tmp_path / "high", 3e-3)]
    monkeypatch.chdir(tmp_path)
    assert write_report(runs) == Path("report/index.html")
    assert (tmp_path / "report" / "loss.png").exists()


@needs_chromium
def test_a_browser_shows_the_page(tmp_path: Path) -> None:
    page = write_report([make_run(tmp_path / "low"), make_run(tmp_path / "high", 3e-3, 2.25)], tmp_path / "out")
    # The browser itself says how large each picture came out, and what the page's text is.
    script = (
        "<script>addEventListener('load', () => { document.title = JSON.stringify({"
        "text: document.body.innerText, width: document.body.scrollWidth,"
        "images: [...document.images].map(i => [i.id, i.naturalWidth, i.clientWidth, i.clientHeight])}) })</script>"
    )
    probe = page.with_name("probe.html")
    probe.write_text(page.read_text().replace("</body>", script + "</body>"))
    dom = chromium("--window-size=1200,2200", "--dump-dom", probe.as_uri())
    title = re.search(r"<title>(.*?)</title>", dom, re.DOTALL)
    assert title is not None
    shown = json.loads(title.group(1).replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))
    assert [image[0] for image in shown["images"]] == PICTURES
    assert all(natural > 800 and width > 400 and height > 200 for _, natural, width, height in shown["images"])
    for text in ("2 runs", "low", "high", "Held-out loss", "2.2500", "Where the configs differ", "optimizer.lr"):
        assert text in shown["text"]

    shot = tmp_path / "shot.png"
    chromium("--window-size=1200,2200", "--hide-scrollbars", f"--screenshot={shot}", page.as_uri())
    pixels = picture(shot)
    assert pixels.shape == (2200, 1200, 3)
    for colour in ("#0072b2", "#d55e00"):
        assert has_colour(pixels, colour)
    ink = (pixels.astype(int).sum(axis=-1) < 300).mean()
    assert 0.003 < ink < 0.2  # dark text on a light page


@needs_chromium
def test_a_narrow_screen_does_not_scroll_sideways(tmp_path: Path) -> None:
    page = write_report([make_run(tmp_path / "run")])
    frame = tmp_path / "phone.html"  # a headless window is never narrower than 500 pixels
    frame.write_text(
        f'<iframe id="f" width="390" height="800" src="{page.as_uri()}"></iframe>'
        "<script>addEventListener('load', () => {"
        "const root = document.getElementById('f').contentDocument.documentElement;"
        "document.title = `${root.scrollWidth} of ${root.clientWidth}` })</script>"
    )
    dom = chromium("--allow-file-access-from-files", "--dump-dom", frame.as_uri())
    width = re.search(r"<title>(\d+) of (\d+)</title>", dom)
    assert width is not None
    assert width.group(1) == width.group(2)
    assert int(width.group(2)) <= 390


# --------------------------------------------------------------------------------------- runs that are not whole


def test_a_run_that_goes_on(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=40, finished=False)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "train/lo')
    html = write_report([run]).read_text()
    assert cells(html, "Status") == ["not finished"]
    assert cells(html, "Steps") == ["40"]
    assert cells(html, "Total time") == ["0:00:39"]


def test_a_run_that_goes_on_shows_its_plan(tmp_path: Path) -> None:
    """plan.json is there from the start; a planned line is drawn dotted at its height, above what is measured."""
    run = make_run(tmp_path / "run", finished=False)
    drawn = {name: picture(write_report([run]).parent / f"{name}.png") for name in ("memory", "step_time")}
    assert "planned" not in (run / "report" / "index.html").read_text()
    (run / "plan.json").write_text(json.dumps({"memory": {"peak": 2.5}, "step_seconds": 0.5}))
    page = write_report([run])
    assert cells(page.read_text(), "Peak memory, planned") == ["2.50 GiB"]
    assert cells(page.read_text(), "Step, planned") == ["0.50 s"]
    for name, without in drawn.items():
        rows = rows_of_colour(without, "#0072b2"), rows_of_colour(picture(page.parent / f"{name}.png"), "#0072b2")
        assert len(rows[0]) == 1, name  # what was measured is level
        assert len(rows[1]) == 2, name
    (run / "result.json").write_text(json.dumps({"status": "finished", "plan/step_seconds": 0.75}))
    assert cells(write_report([run]).read_text(), "Step, planned") == ["0.75 s"]


def rows_of_colour(pixels: np.ndarray, colour: str) -> list[int]:
    """Where a level line of this colour (#rrggbb) begins, from the top: a fifth of a row's pixels and more."""
    wanted = np.array([int(colour[index : index + 2], 16) for index in (1, 3, 5)])
    inside = (np.abs(pixels.astype(int) - wanted).max(axis=-1) < 40).mean(axis=1) > 0.2
    return [int(row) for row in np.flatnonzero(inside & ~np.roll(inside, 1))]


def test_one_step_one_metric_and_no_config(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "train/loss": 8.5, "train/grad_norm": null}\n')
    (run / "result.json").write_text('{"status": "fin')
    page = write_report([run])
    assert [path.name for path in sorted(page.parent.glob("*.png"))] == ["loss.png"]


def test_names_and_values_are_text_not_markup(tmp_path: Path) -> None:
    run = make_run(tmp_path / "<b>run</b>")
    html = write_report([run], tmp_path / "out").read_text()
    assert "<b>run</b>" not in html
    assert "&lt;b&gt;run" in html


def test_runs_are_told_apart(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a" / "0"), make_run(tmp_path / "b" / "0")]
    assert [run.name for run in load_runs([*runs, runs[0]])] == ["a/0", "b/0"]


@pytest.mark.parametrize("content", [None, "", '{"step": 1, "train', "not json\n"])
def test_a_run_without_metrics(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(ConfigError, match="holds no metrics"):
        write_report([tmp_path])
    assert not (tmp_path / "report").exists()


def test_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such directory"):
        write_report([tmp_path / "nothing"])
    with pytest.raises(ConfigError, match="at least one"):
        write_report([])
    run = make_run(tmp_path / "run")
    (run / "config.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="cannot be read"):
        write_report([run])


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(BigtrainError, match="cannot be written"):
        write_report([run], tmp_path / "file" / "report")


def test_smoothing_follows_a_falling_curve_without_lag() -> None:
    falling = np.linspace(8, 2, 1000)
    assert np.abs(smooth(falling) - falling).max() < 0.05
    noise = np.random.default_rng(0).normal(size=10_000)
    assert smooth(noise)[200:-200].std() < 0.1
    assert smooth(np.array([3.0])) == [3.0]
    steps, values = thin(np.arange(10_000.0), noise)
    assert len(steps) == len(values) <= 4000


def test_no_torch_in_the_command(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    code = f"import sys; from pathlib import Path; from bigtrain.report import write_report\n\
write_report([Path({str(run)!r})]); sys.exit('torch' in sys.modules or 'matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
