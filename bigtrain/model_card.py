"""README.md of an exported model, as the Hugging Face hub shows it: filled from what the run has kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from bigtrain import __version__, sentence_encoder
from bigtrain.config import Config, to_dict
from bigtrain.models import count_parameters
from bigtrain.redact import redact

SECTIONS = ("model", "task", "optimizer", "schedule", "train")  # of the config, the ones that made the model
METRICS = ("eval/", "train/", "time/", "perf/")  # of result.json

# task -> the hub's name of it, the class for its users, what they do with it
USES = {
    "causal_lm": (
        "text-generation", "AutoModelForCausalLM",
        'inputs = tokenizer(tokenizer.bos_token + "Once", return_tensors="pt")  # a text begins with this token\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))",
    ),
    "masked_lm": (
        "fill-mask", "AutoModelForMaskedLM",
        'inputs = tokenizer(f"The {tokenizer.mask_token} is open.", return_tensors="pt")\n'
        "print(model(**inputs).logits.argmax(-1))",
    ),
    "classification": (
        "text-classification", "AutoModelForSequenceClassification",
        'print(model(**tokenizer("A text.", return_tensors="pt")).logits, model.config.id2label)',
    ),
    "tagging": (
        "token-classification", "AutoModelForTokenClassification",
        'print(model(**tokenizer("A text.", return_tensors="pt")).logits.argmax(-1), model.config.id2label)',
    ),
    "question_answering": (
        "question-answering", "AutoModelForQuestionAnswering",
        'inputs = tokenizer("A question?", "A context.", return_tensors="pt")\n'
        "output = model(**inputs)\n"
        "print(output.start_logits.argmax(-1), output.end_logits.argmax(-1))  # tokens; both 0: no answer",
    ),
    "translation": (
        "translation", "AutoModelForSeq2SeqLM",
        'inputs = tokenizer("A text.", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**inputs)[0], skip_special_tokens=True))",
    ),
}  # fmt: skip
# What transformers has no class for, sentence-transformers reads (sentence_encoder.py).
SENTENCE_ENCODER = (
    "from sentence_transformers import SentenceTransformer\n\n"
    "model = SentenceTransformer({quoted})\n"
    'print(model.encode("A text."), model[0].auto_model.config.id2label)  # logits'
)
# A graph holds no weights that transformers loads.
GRAPH = (
    "import onnxruntime\n"
    "from transformers import AutoTokenizer\n\n"
    "tokenizer = AutoTokenizer.from_pretrained({quoted})\n"
    'graph = onnxruntime.InferenceSession({quoted} + "/model.onnx")\n'
    'inputs = tokenizer({texts}, return_tensors="np")\n'
    "print(graph.run(None, {{given.name: inputs[given.name] for given in graph.get_inputs()}}))"
)
USES["instruction"] = USES["causal_lm"]


def model_card(run: Path, name: str, config: Config, checkpoint: Path, format: str = "huggingface") -> str:
    """Markdown with the hub's YAML header. Secrets and the training machine's folders are left out of it."""
    library, use = _use(name, config, format)
    header = {
        "library_name": library,
        "pipeline_tag": USES[config.task.kind][0],
        "license": "unknown",
        "tags": ["bigtrain", config.task.kind],
    }
    made = redact(to_dict(config))
    result = _result(run)
    rows = [
        ("Parameters", f"{result.get('model/parameters') or count_parameters(config.model):,}"),
        ("Data", _data(made["data"])),
        ("Started from", _last_part(made["init_from"]) if made["init_from"] else "random weights"),
        ("Checkpoint", checkpoint.name),
        ("Trained with", f"bigtrain {__version__}, engine {config.engine.kind}, {config.train.precision}"),
    ]
    if "privacy/epsilon" in result:
        rows.append(("Privacy", _privacy(result)))
    metrics = [
        (key, f"{value:,.6g}")
        for key, value in sorted(result.items())
        if key.startswith(METRICS) and isinstance(value, (int, float))
    ]
    sections = yaml.safe_dump({key: made[key] for key in SECTIONS}, sort_keys=False, allow_unicode=True)
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {_one_line(name)}",
        _table(("", ""), rows),
        "## Licence\n\nNot chosen yet: name it here and in the header (`license`). Mind the licence of the data.",
        f"## Use\n\n```python\n{use}\n```",
        "## Metrics\n\n" + (_table(("metric", "value"), metrics) if metrics else "The run has no result yet."),
        f"## Config\n\n```yaml\n{sections}```",
    ]
    return "\n\n".join(parts) + "\n"


def _use(name: str, config: Config, format: str) -> tuple[str, str]:
    """(the library that reads it, Python that uses it)"""
    _, auto_class, example = USES[config.task.kind]
    quoted = json.dumps(name, ensure_ascii=False)  # as Python writes it too
    if format == "onnx":
        texts = '"A question?", "A context."' if config.task.kind == "question_answering" else '"A text."'
        return "onnx", GRAPH.format(quoted=quoted, texts=texts)
    if sentence_encoder.is_one(config):
        return "sentence-transformers", SENTENCE_ENCODER.format(quoted=quoted)
    return "transformers", (
        f"from transformers import {auto_class}, AutoTokenizer\n\n"
        f"model = {auto_class}.from_pretrained({quoted})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({quoted})\n{example}"
    )


def _privacy(result: dict[str, Any]) -> str:
    known = "" if result["privacy/noise"] == "secret" else "; no privacy from who knows train.privacy.seed"
    return (
        f"epsilon {result['privacy/epsilon']:.3g} at delta {result['privacy/delta']:g} ({result['privacy/unit']}):"
        f" DP-SGD, {result['privacy/steps']} steps, noise multiplier {result['privacy/noise_multiplier']:.4g},"
        f" clipping norm {result['privacy/max_grad_norm']:g}, Poisson sampling at rate"
        f" {result['privacy/sampling_rate']:.3g}, {result['privacy/accountant']} accountant{known}"
    )


def _result(run: Path) -> dict[str, Any]:
    """result.json; empty for a run that is going on or was killed."""
    try:
        result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return redact(result) if isinstance(result, dict) else {}


def _data(data: dict[str, Any]) -> str:
    if data["kind"] == "stdlib":
        return "the Python standard library's source"
    paths = data.get("path") or []
    named = [_last_part(path) for path in ([paths] if isinstance(paths, str) else paths)]
    return ", ".join(named) + (f" ({data['name']})" if data.get("name") else "")


def _last_part(path: str) -> str:
    """A dataset's or model's name as it is; of a file's path only its end, not the machine's folders."""
    return Path(path).name if path.startswith(("/", "~", ".")) else path


def _table(head: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    lines = [head, ("---", "---"), *rows]
    return "\n".join(f"| {left} | {_one_line(right).replace('|', chr(92) + '|')} |" for left, right in lines)


def _one_line(text: str) -> str:
    return " ".join(text.split())
