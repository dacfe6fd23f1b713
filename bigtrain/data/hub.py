"""The Hugging Face hub: datasets as sources, tokenizers by name.

One question with a time limit comes first, because the hub's client retries for half a minute when there is no network.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from bigtrain.data.formats import SourceFile, kind_of
from bigtrain.data.text_rows import column
from bigtrain.errors import BigtrainError, ConfigError

STAMP = (-1, -1)  # marks a SourceFile that is a dataset of the hub, not a file
MISSING = "no such file or directory"


def looks_like_name(name: str) -> bool:
    """org/name or name, and not the name of a file of a known kind."""
    like_file = kind_of(name) != ("text", None) or name.endswith((".txt", ".md", ".py", ".conll", ".bio"))
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", name)) and not like_file


def dataset_source(name: str, key: str, config_name: str | None) -> SourceFile:
    """The dataset's revision stands for its content. Raises ConfigError if there is neither such a path nor dataset."""
    if not looks_like_name(name):
        raise ConfigError(key, name, f"{MISSING}, and no file matches it")
    try:
        import datasets  # noqa: F401
    except ImportError:
        problem = f"{MISSING}, and a hub dataset needs the package datasets"
        raise ConfigError(key, name, problem, "pip install 'bigtrain[data]'") from None
    return SourceFile(Path(name), f"{name}:{config_name}", key, 0, STAMP, _revision("dataset", name, key))


def dataset_rows(file: SourceFile, config_name: str | None, text_field: str) -> Iterator[str | None]:
    """The text of each row of the dataset's train split, streamed; None where it has none."""
    import datasets

    name = str(file.path)
    try:
        stream = datasets.load_dataset(name, config_name, split="train", streaming=True, revision=file.digest or None)
        for number, row in enumerate(stream, start=1):
            yield column(row, text_field, name, number)
    except BigtrainError:
        raise
    except Exception as error:  # whatever a loader or the network raises: the user needs its first line
        raise file.error(f"the dataset cannot be read ({_first_line(error)})") from None


def tokenizer_file(name: str, key: str) -> Path:
    """tokenizer.json of a hub model, from the local hub cache if it is there. Raises ConfigError."""
    if not looks_like_name(name):
        raise ConfigError(key, name, MISSING)
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "tokenizer.json", local_files_only=True))
    except Exception:
        revision = _revision("model", name, key)
    try:
        file = Path(hf_hub_download(name, "tokenizer.json", revision=revision))
    except Exception as error:
        raise ConfigError(key, name, f"no tokenizer.json can be had from the hub ({_first_line(error)})") from None
    for told in ("tokenizer_config.json", "chat_template.jinja"):
        with suppress(Exception):  # it names the special tokens; without it the usual spellings are tried
            hf_hub_download(name, told, revision=revision)
    return file


def model_directory(name: str, key: str, weights: bool = True) -> Path:
    """The files of a hub model that say what it is: config, safetensors, tokenizer. From the local hub cache if they
    are there. Raises ConfigError, also where `weights` are wanted and there are only pickled ones."""
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.jinja"]
    with suppress(Exception):
        found = Path(snapshot_download(name, allow_patterns=wanted, local_files_only=True))
        if (found / "config.json").exists() and any(found.glob("*.safetensors")):
            return found
    info = _info("model", name, key)
    files = sorted(file.rfilename for file in info.siblings or [])
    pickled = [file for file in files if file.endswith(".bin")]
    if weights and pickled and not any(file.endswith(".safetensors") for file in files):
        raise ConfigError(
            key, name, f"only pickled weights there ({pickled[0]}), which can run code when they are read",
            f'convert them: python -c "import transformers; transformers.AutoModel.from_pretrained(\'{name}\')'
            '.save_pretrained(\'DIR\')", and name DIR',
        )  # fmt: skip
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, revision=info.sha))
    except Exception as error:
        raise ConfigError(key, name, f"cannot be had from the hub ({_first_line(error)})") from None


def _revision(kind: str, name: str, key: str) -> str:
    return _info(kind, name, key).sha or ""


def _info(kind: str, name: str, key: str) -> Any:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return HfApi().repo_info(name, repo_type=kind, timeout=10)
    except RepositoryNotFoundError:
        raise ConfigError(key, name, f"{MISSING}, and the Hugging Face hub has no such {kind}") from None
    except Exception as error:  # offline, a proxy, a timeout: httpx and the hub each have their own
        problem = f"{MISSING}, and the Hugging Face hub cannot be reached ({_first_line(error)})"
        raise ConfigError(key, name, problem) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
