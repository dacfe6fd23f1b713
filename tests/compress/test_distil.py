"""Distillation: the loss is the formula's for every task, a student starts from its teacher, what cannot be is told."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bigtrain import checks, tasks
from bigtrain import config as schema
from bigtrain.batch import IGNORED
from bigtrain.checkpoint import newest
from bigtrain.checkpoint.weights import load_into, read_weights
from bigtrain.compress import distil, teacher
from bigtrain.compress.distil import Distil
from bigtrain.compress_config import DistilConfig
from bigtrain.config import Config
from bigtrain.data.example_loader import Share
from bigtrain.engine.host import HostGroup
from bigtrain.errors import BigtrainError, ConfigError
from bigtrain.export import export
from bigtrain.launch import train as launch
from bigtrain.post_training import model_directory
from tests.distributed.ranks import run_ranks

SHARE = Share(0, 1, 4, 4, 0)
ALPHA, T = 0.4, 2.0


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostGroup]:
    store = tmp_path_factory.mktemp("store") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield HostGroup(60)
    torch.distributed.destroy_process_group()


def settings(task: str, folder: Path) -> dict[str, Any]:
    """A student of two layers on a few texts, for each task."""
    encoder = {"kind": "encoder", "dim": 32, "n_layers": 2, "n_heads": 2, "max_seq_len": 32, "dropout": 0.0}
    decoder = {"kind": "decoder", "dim": 32, "n_layers": 2, "n_heads": 2, "max_seq_len": 32}
    words = [f"word{number % 7} and {number} more of {number * 31 % 11} things" for number in range(60)]
    if task == "classification":
        data, kind = "".join(f"{text}\t{'ab'[index % 2]}\n" for index, text in enumerate(words)), "labelled"
    elif task == "tagging":
        kind, data = (
            "labelled",
            "".join("\n".join(f"{w} {'XO'[len(w) % 2]}" for w in t.split()) + "\n\n" for t in words),
        )
    else:
        kind, data = "text", "\n".join(words * 4)
    file = folder / f"{task}.{'conll' if task == 'tagging' else 'tsv' if task == 'classification' else 'txt'}"
    file.write_text(data)
    more = {"sentence": "none"} if task == "masked_lm" else {"dropout": 0.0} if kind == "labelled" else {}
    tokenizer = {"vocab_size": 300}
    return {
        "run_dir": str(folder / "run"),
        "model": decoder if task == "causal_lm" else encoder,
        "task": {"kind": task} | more,
        "data": {"kind": kind, "path": str(file), "cache_dir": str(folder / "cache"), "tokenizer": tokenizer,
                 "held_out": 0.2},
        "train": {"precision": "fp32", "global_batch": 4},
    }  # fmt: skip


class Parts:
    """A task, a teacher of four layers as a directory, and a student."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.config = launch.prepare_data(launch.checked(settings(kind, folder)))
        self.task: Any = tasks.build(self.config)
        self.larger: Any = replace(self.config.model, n_layers=4)
        torch.manual_seed(1)
        self.teacher = self.task.build_model(self.larger).eval()
        for parameter in self.teacher.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
        tokenizer = folder / f"tokenizer-{kind}"
        tokenizer.mkdir()
        (tokenizer / "tokenizer.json").write_bytes(Path(self.task.tokenizer_file).read_bytes())
        named = ((name, parameter.detach()) for name, parameter in self.teacher.named_parameters())
        self.path = model_directory.write(
            folder / f"teacher-{kind}", self.config, self.larger, named, tokenizer, self.task.labels
        )
        torch.manual_seed(2)
        self.student = self.task.build_model(self.config.model).train()
        self.batch = self.task.train_loader(SHARE).batches(0)[0]

    def with_teacher(self, **changes: Any) -> Config:
        given = {"teacher": str(self.path), "alpha": ALPHA, "temperature": T} | changes
        return replace(self.config, compress=replace(self.config.compress, distil=DistilConfig(**given)))

    def distil(self, host: HostGroup, **changes: Any) -> Distil:
        found = Distil(self.with_teacher(**changes))
        found.attach(SimpleNamespace(device=torch.device("cpu"), model=self.student), host)  # type: ignore[arg-type]
        return found


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Parts] = {}

    def of(kind: str) -> Parts:
        if kind not in made:
            made[kind] = Parts(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return of


def logits(parts: Parts, model: Any) -> tuple[Any, Any]:
    """(rows of logits, which of them count), the plain way."""
    batch, kind = parts.batch, parts.config.task.kind
    if kind == "causal_lm":
        return model(batch["tokens"]).flatten(0, 1), batch["targets"].flatten() != IGNORED
    if kind == "masked_lm":
        found, _ = model(batch["tokens"], batch["attention_mask"], batch["token_types"])
        return found.flatten(0, 1), batch["targets"].flatten() != IGNORED
    found = parts.task.outputs(model, batch)
    if kind == "tagging":
        return found.flatten(0, 1), batch["targets"].flatten() != IGNORED
    return found, batch["index"] >= 0


KINDS = ("causal_lm", "masked_lm", "classification", "tagging")


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_formula_and_so_are_its_gradients(kind: str, parts: Any, host: HostGroup) -> None:
    these = parts(kind)
    student, batch, task = these.student, these.batch, these.task
    mine, scored = logits(these, student)
    with torch.no_grad():
        theirs, _ = logits(these, these.teacher)
    divergences = F.kl_div((mine / T).log_softmax(-1), (theirs / T).log_softmax(-1), log_target=True, reduction="none")
    divergence = T**2 * (divergences.sum(-1) * scored).sum()
    plain = task.loss(student, batch)
    wanted = (1 - ALPHA) * plain.loss + ALPHA * divergence
    weights = dict(student.named_parameters())
    gradients = torch.autograd.grad(wanted, list(weights.values()), allow_unused=True)

    transform = these.distil(host)
    keys = set(student.state_dict())
    found = transform.loss(task.loss)(student, batch)
    student.zero_grad()
    found.loss.backward()
    assert float(found.loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-4)
    assert float(found.nll) == pytest.approx(float(plain.nll), rel=1e-5)  # the task's own, as without a teacher
    for (name, parameter), gradient in zip(weights.items(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-4, msg=name)
    each = float(divergence.detach()) / int(scored.sum())
    assert transform.metrics()["train/distil_loss"] == pytest.approx(each, rel=1e-4)
    assert set(student.state_dict()) == keys
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in student.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_has_nothing_to_teach_itself(kind: str, parts: Any, host: HostGroup) -> None:
    these = parts(kind)
    config = replace(these.with_teacher(alpha=1.0, hidden=1.0, attention=1.0), model=these.larger)
    transform = Distil(config)
    model = these.task.build_model(these.larger).eval()
    load_into(model, newest(these.path))  # type: ignore[arg-type]
    transform.attach(SimpleNamespace(device=torch.device("cpu"), model=model), host)  # type: ignore[arg-type]
    found = transform.loss(these.task.loss)(model, these.batch)
    assert abs(float(found.loss.detach())) < 1e-3
    found.loss.backward()
    assert max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None) < 1e-3


@pytest.mark.parametrize("kind", ["causal_lm", "classification"])
def test_hidden_states_and_relations_of_layers_that_belong_together(kind: str, parts: Any, host: HostGroup) -> None:
    these = parts(kind)
    seen: dict[str, Any] = {"mine": [], "theirs": []}
    stacks = (("mine", these.student), ("theirs", these.teacher))
    handles = [
        layer.register_forward_hook(lambda _, __, y, name=name: seen[name].append(y.detach()))
        for name, model in stacks
        for layer in distil.layers(model)
    ]
    with torch.no_grad():
        logits(these, these.student)
        logits(these, these.teacher)
    for handle in handles:
        handle.remove()
    real = these.batch.get("attention_mask", torch.ones_like(these.batch["tokens"])).bool()
    _, scored = logits(these, these.student)
    pairs = ((0, 1), (1, 3))  # evenly spread; the last of each part
    wanted = sum(float((seen["mine"][a] - seen["theirs"][b])[real].square().mean()) for a, b in pairs) / 2
    transform = these.distil(host, logits=0.0, hidden=1.0, alpha=1.0)
    found = transform.loss(these.task.loss)(these.student, these.batch)
    assert float(found.loss.detach()) == pytest.approx(wanted * int(scored.sum()), rel=1e-4)
    asked = these.distil(host, logits=0.0, attention=1.0, alpha=1.0, layers=[0, 2])
    found = asked.loss(these.task.loss)(these.student, these.batch)
    found.loss.backward()
    assert float(found.loss.detach()) > 0
    assert these.student.get_parameter(  # every layer learns
        "blocks.0.attention.qkv.weight" if kind == "causal_lm" else "backbone.blocks.0.attention.qkv.weight"
    ).grad.abs().sum() > 0  # fmt: skip


def test_relations_do_not_depend_on_width_or_padding() -> None:
    torch.manual_seed(0)
    mine, theirs = [torch.randn(2, 6, 64) for _ in range(3)], [torch.randn(2, 6, 96) for _ in range(3)]
    real = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    found = distil.relation_divergence(mine, theirs, real, causal=False)
    for part in (*mine, *theirs):
        part[1, 4:] = 9.0
    assert float(distil.relation_divergence(mine, theirs, real, causal=False)) == pytest.approx(float(found))
    assert float(distil.relation_divergence(mine, mine, real, causal=True)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kind", ["causal_lm", "tagging", "classification"])
def test_a_kept_teacher_is_asked_once_and_says_the_same(kind: str, parts: Any, host: HostGroup) -> None:
    these = parts(kind)
    k = 64 if kind == "causal_lm" else 2  # of labels, all of them
    whole = these.distil(host, cache_top_k=0)
    kept = these.distil(host, cache_top_k=k)
    first = kept.loss(these.task.loss)(these.student, these.batch)
    plain = whole.loss(these.task.loss)(these.student, these.batch)
    near = pytest.approx(float(plain.loss.detach()), rel=0.05 if kind == "causal_lm" else 2e-3)  # float16 on the disk
    assert float(first.loss.detach()) == near

    again = these.distil(host, cache_top_k=k)
    turned = {name: tensor.flip(0) for name, tensor in these.batch.items()}  # the order of a batch does not matter
    second = again.loss(these.task.loss)(these.student, turned)
    assert again.teacher is None  # it was not even loaded
    assert float(second.loss.detach()) == pytest.approx(float(first.loss.detach()), rel=1e-3)


def test_a_student_begins_with_the_layers_that_it_learns_from(parts: Any) -> None:
    these = parts("causal_lm")
    theirs = read_weights(newest(these.path))  # type: ignore[arg-type]
    student = these.task.build_model(these.config.model)
    distil.initialize(student, these.path, these.with_teacher(init_from_teacher=True, layers=[0, 2]))
    for name, parameter in student.named_parameters():
        number = name.split(".")[1] if name.startswith("blocks.") else ""
        source = name.replace("blocks.1.", "blocks.2.") if number == "1" else name
        assert torch.equal(parameter, theirs[source]), name


def test_accumulation_resuming_and_where_the_teacher_is_change_nothing(parts: Any, tmp_path: Path) -> None:
    """Logits and hidden states, under ZeRO-2: two micro-batches a step teach what one of both does, a run that is
    continued what one that never stopped does, to the last bit, and a teacher that is sharded, or a Hugging Face
    directory, what one that is a run's whole copy does."""
    these = parts("causal_lm")
    data = schema.to_dict(these.with_teacher(hidden=1.0))
    data |= {
        "train": data["train"] | {"micro_batch": 2, "steps": 5},
        "engine": {"kind": "deepspeed", "stage": 2},
        "optimizer": {"kind": "adamw", "lr": 1e-3},
    }
    told_by = data["compress"]["distil"]
    exported = export(these.path, tmp_path / "hf")
    changes = {
        "at once": {"train": {"micro_batch": 4}},
        "sharded": {"compress": {"distil": told_by | {"teacher_sharded": True}}},
        "exported": {"compress": {"distil": told_by | {"teacher": str(exported)}}},
    }
    teacher.check(these.with_teacher(teacher=str(exported)))
    arguments = {"config": data, "changes": changes, "folder": str(tmp_path), "saved": 3, "end": 5}
    (found,) = run_ranks("tests.compress.composed:continued", 1, arguments)
    told = found["told"]
    assert found["resumed"] == told[3:]
    for name in ("loss", "train/distil_loss"):
        for change in changes:
            assert [line[name] for line in found[change]] == pytest.approx([line[name] for line in told], rel=1e-4), (
                change
            )
        assert len({line[name] for line in told}) == 5
        assert min(line[name] for line in told) > 0


# ------------------------------------------------------------------------------------------------- refusals


def test_layers_that_there_are_not() -> None:
    assert teacher.layer_map([], 2, 6) == [2, 5]
    assert teacher.layer_map([], 3, 4) == [0, 1, 3]
    assert teacher.layer_map([0, 0], 2, 6) == [0, 0]
    for asked, student, message in (
        ([], 7, "the student has 7 layers, more than the teacher's 6"),
        ([0], 2, "names 1 layers, the student has 2; name one for each"),
        ([0, 6], 2, "the teacher has no layer 6; its layers are 0 to 5"),
    ):
        with pytest.raises(ConfigError, match=message):
            teacher.layer_map(asked, student, 6)


def test_a_teacher_with_another_vocabulary_is_refused(parts: Any) -> None:
    mine, other = parts("causal_lm"), parts("masked_lm")
    config = mine.with_teacher(teacher=str(other.path))
    with pytest.raises(ConfigError) as caught:
        teacher.check(config)
    said = str(caught.value)
    assert said.startswith(f"compress.distil.teacher='{other.path}': its vocabulary (")
    assert "tokens or numbers differ; take data.tokenizer.path=" in said
    assert "\n" not in said
    teacher.check(mine.with_teacher())


def test_a_teacher_of_other_labels_width_or_length_is_refused(parts: Any, tmp_path: Path) -> None:
    these = parts("classification")
    teacher.check(these.with_teacher(hidden=1.0))
    (these.path / "labels.json").write_text('["b", "a"]')
    with pytest.raises(ConfigError, match="its labels are b, a, the student's a, b"):
        teacher.check(these.with_teacher())
    (these.path / "labels.json").write_text('["a", "b"]')
    wider = replace(these.with_teacher(hidden=1.0), model=replace(these.config.model, dim=64))
    with pytest.raises(ConfigError, match=r"32 wide and the student's 64; take compress\.distil\.attention"):
        teacher.check(wider)
    longer = replace(these.with_teacher(), model=replace(these.config.model, max_seq_len=64))
    with pytest.raises(ConfigError, match="has 32 positions, the student 64"):
        teacher.check(longer)
    with pytest.raises(ConfigError, match="is no run and no Hugging Face directory"):
        teacher.check(these.with_teacher(teacher=str(tmp_path)))
    started = replace(these.with_teacher(init_from_teacher=True), model=replace(these.config.model, ffn_dim=48))
    with pytest.raises(ConfigError, match=r"init_from_teacher=True: model\.ffn_dim is 48, the teacher's None"):
        teacher.check(started)


def test_a_teacher_without_the_tasks_head_is_refused(parts: Any) -> None:
    """A model for masked words knows no labels."""
    mine, other = parts("classification"), parts("masked_lm")
    with pytest.raises(BigtrainError, match=r"has no weights for backbone\.pooler\.weight, which this task needs"):
        teacher.build(mine.with_teacher(teacher=str(other.path)), mine.task, torch.device("cpu"))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("causal_lm", {"teacher": None}, "compress.distil.teacher=None: missing"),
        ("causal_lm", {"alpha": 1.5}, "compress.distil.alpha=1.5"),
        ("causal_lm", {"temperature": 0.0}, "compress.distil.temperature=0.0"),
        ("causal_lm", {"logits": 0.0}, "nothing is learned from the teacher"),
        ("causal_lm", {"cache_top_k": 4, "hidden": 1.0}, "compress.distil.hidden looks inside the teacher"),
        ("masked_lm", {"cache_top_k": 4}, "other tokens are masked each time"),
    ],
)
def test_settings_that_do_not_go_together(kind: str, changes: dict[str, Any], message: str, parts: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        checks.check(parts(kind).with_teacher(**changes))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_students_tokenizer_is_the_teachers_unless_told(parts: Any) -> None:
    these = parts("causal_lm")
    data = schema.to_dict(these.with_teacher())
    data["data"]["tokenizer"]["path"] = None
    data["compress"]["distil"]["teacher"] = os.path.relpath(these.path)
    config = launch.checked(data)
    assert config.data.tokenizer.path == str(these.path)
    assert config.compress.distil is not None
    assert config.compress.distil.teacher == str(these.path)
