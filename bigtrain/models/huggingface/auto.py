"""Any architecture of transformers, in its own code, behind the calls that our tasks make.

The classes here wrap transformers' model for a task: parameters are named `model.` and then as in transformers' files.
Code of a model's own repository is never run, and weights come from safetensors only.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.initialization import no_init_weights
from transformers.modeling_outputs import BaseModelOutput

from bigtrain.batch import IGNORED
from bigtrain.config import HuggingFaceConfig
from bigtrain.errors import BigtrainError, ConfigError
from bigtrain.heap import Trimmer
from bigtrain.models.huggingface.configs import read_values
from bigtrain.models.huggingface.importing import BUFFERS, another_copy, open_weights
from bigtrain.models.network import Network
from bigtrain.models.stored import FLOATS, StoredTensors

PREFIX = "model."  # of the wrapped model's parameters
DEFAULT_LENGTH = 512  # of an architecture whose positions have no end
WRITE = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")  # their output layer is no task's head

# task -> the class of transformers that makes its model
CLASSES = {
    "causal_lm": "AutoModelForCausalLM",
    "instruction": "AutoModelForCausalLM",
    "masked_lm": "AutoModelForMaskedLM",
    "classification": "AutoModelForSequenceClassification",
    "tagging": "AutoModelForTokenClassification",
    "question_answering": "AutoModelForQuestionAnswering",
    "translation": "AutoModelForSeq2SeqLM",
}


# ------------------------------------------------------------------------------------------------- directory


def read_config(directory: Path, task: str, pretrained: bool = True, key: str = "model.path") -> HuggingFaceConfig:
    """What is in a Hugging Face directory, for a task; `key` is what errors name.

    Raises ConfigError for a directory without a config.json that transformers understands, an architecture that it has
    no class for or none for the task, quantized or pickled weights; BigtrainError where there are no weights.
    """
    values, kind = read_values(directory, key)
    if values.get("quantization_config") is not None:
        raise ConfigError(key, str(directory), "its weights are quantized", "take the original ones")
    if kind not in transformers.CONFIG_MAPPING:
        problem = f"its model_type is {kind}, which transformers {transformers.__version__} has no class for"
        raise ConfigError(key, str(directory), problem, "code that comes with a model is never run")
    values.pop("auto_map", None)  # names code of the model's repository
    try:
        theirs = _their_config(values)
        known = type(theirs) in getattr(transformers, CLASSES[task])._model_mapping
    except Exception as error:  # transformers checks types and values, and raises many kinds
        raise ConfigError(key, str(directory), f"its config.json is no {kind}'s ({_one_line(error)})") from None
    if not known:
        problem = f"its model_type is {kind}, of which transformers has no {CLASSES[task].removeprefix('Auto')}"
        raise ConfigError(key, str(directory), problem, f"task={task} needs one")
    try:
        with torch.device("meta"):
            model = _make(CLASSES[task], theirs)
    except Exception as error:
        raise ConfigError(key, str(directory), f"its config.json is no {kind}'s ({_one_line(error)})") from None
    if pretrained:
        _check_stored(open_weights(directory, key), model, key)
    if task == "translation":
        values["decoder_start_token_id"] = _decoder_start(directory, theirs, key)
    embedding = model.get_input_embeddings()
    return HuggingFaceConfig(
        path=str(directory),
        max_seq_len=_longest(model, theirs.get_text_config()),
        pretrained=pretrained,
        architecture=values,
        vocab_size=embedding.num_embeddings,
        dim=embedding.embedding_dim,
    )


def _their_config(values: dict[str, Any]) -> Any:
    return transformers.CONFIG_MAPPING[values["model_type"]].from_dict(values)


def _longest(model: nn.Module, theirs: Any) -> int:
    """Tokens that the model's positions are enough for."""
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")
    longest = next((length for name in names if isinstance(length := getattr(theirs, name, None), int)), DEFAULT_LENGTH)
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and "position" in name.split(".")[-1] and module.padding_idx is not None:
            longest = min(longest, module.num_embeddings - module.padding_idx - 1)  # RoBERTa's begin after it
    return longest


def _decoder_start(directory: Path, theirs: Any, key: str) -> int:
    """The token that the decoder begins with: the config's, the generation config's, or as T5 has it, padding."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        settings = json.loads((directory / "generation_config.json").read_text(encoding="utf-8"))
        if isinstance(start := settings.get("decoder_start_token_id"), int):
            return start
    for name in ("decoder_start_token_id", "pad_token_id"):
        if isinstance(start := getattr(theirs, name, None), int):
            return start
    raise ConfigError(key, str(directory), "its config.json names no decoder_start_token_id and no pad_token_id")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _make(auto_class: str, theirs: Any) -> Any:
    """The model, its weights not drawn. float32, whatever config.json says: the engine chooses."""
    with no_init_weights():
        model = getattr(transformers, auto_class).from_config(theirs, dtype=torch.float32, trust_remote_code=False)
    model.tie_weights()
    return model


def count_parameters(config: HuggingFaceConfig) -> int:
    """Distinct parameters, without any task's head."""
    with torch.device("meta"):
        model = _make("AutoModel", _their_config(config.architecture))
    return sum(parameter.numel() for parameter in model.parameters())


def iterate_weights(adapter: TransformersModel, directory: Path, read: bool = True) -> Iterator[tuple[str, Tensor]]:
    """(the adapter's parameter name, tensor) of a directory with safetensors; one tensor is held at a time.

    Names with and without the base model's prefix fit, and either name of a tied weight. Without `read` the tensors are
    on the meta device. What the model has no place for comes empty, to be named among what is left out. Raises
    BigtrainError for a missing weight of the base model (the task's head may be new), one in a layer that the model
    does not have, or a quantized one.
    """
    stored, model = open_weights(directory), adapter.model
    places = _places(model)
    buffers = {name for name, _ in model.named_buffers()}
    stacks = {stack for name in places if (stack := _stack(name))}
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    found: set[str] = set()
    rename = _renaming(model)
    for name in stored.names:
        candidates = _candidates(rename(name), model)
        place = next((places[candidate] for candidate in candidates if candidate in places), None)
        if place is not None and place not in found:
            found.add(place)
            yield PREFIX + place, stored.weight(name, read)
        elif place is None and not buffers.intersection(candidates) and not BUFFERS.search(name):
            known = any(pattern.search(name) for pattern in ignored)
            if not known and stacks.intersection(map(_stack, candidates)):
                raise BigtrainError(
                    f"{directory}: holds {name}, which no {type(model).__name__} of its config.json has"
                )
            yield PREFIX + name, torch.empty(0, device="meta")
    for name in _base_names(model):
        if places[name] not in found:
            raise BigtrainError(f"{directory}: has no weight {name}, which {type(model).__name__} needs")


def _places(model: Any) -> dict[str, str]:
    """Every name of a parameter -> its first; a tied one has several."""
    first: dict[int, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    return {name: first.setdefault(id(parameter), name) for name, parameter in named}


def _candidates(name: str, model: Any) -> tuple[str, str]:
    """What a tensor of a file may be in the model: files of base models lack the prefix."""
    return name, f"{model.base_model_prefix}.{name}"


def _stack(name: str) -> str:
    """The list of layers that a parameter is in, as model.layers; "" where it is in none."""
    parts = name.split(".")
    numbered = [index for index, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbered[0]]) if numbered else ""


def _check_stored(stored: StoredTensors, model: Any, key: str) -> None:
    """Raises ConfigError for what a file holds and training would silently lose: of two tensors that are one by
    config.json the other, if they differ, and numbers of a buffer that were learned, for what is trained and saved are
    parameters."""
    places, rename, first = _places(model), _renaming(model), dict[str, str]()
    kept = {name for name in model.state_dict() if name not in places}  # buffers that transformers saves
    for name in stored.names:
        candidates = _candidates(rename(name), model)
        place = next((places[candidate] for candidate in candidates if candidate in places), None)
        if place is not None and (other := first.setdefault(place, name)) != name and not stored.equal(name, other):
            raise ConfigError(key, str(stored.directory), *another_copy(name, other))
        learned = place is None and kept.intersection(candidates) and not BUFFERS.search(name)
        if learned and stored.dtype(name) in FLOATS and bool(stored.tensor(name).any()):
            problem = f"holds {name}, which was learned but is no parameter of {type(model).__name__}"
            raise ConfigError(key, str(stored.directory), problem, "it would be lost: take another model")


def _renaming(model: Any) -> Callable[[str], str]:
    """A file's name for a weight -> the model's: transformers keeps a list of what it has renamed since."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, apply_renamings
    except ImportError:  # older ones rename nothing but these
        return lambda name: name.replace("LayerNorm.gamma", "LayerNorm.weight").replace(
            "LayerNorm.beta", "LayerNorm.bias"
        )
    renamings = [part for part in get_model_conversion_mapping(model) if isinstance(part, WeightRenaming)]
    return lambda name: apply_renamings(name, renamings)


def _base_names(model: Any) -> list[str]:
    """Parameters that every file of this architecture holds: all but those of heads and poolers."""
    base = model.base_model
    prefix = "" if base is model else f"{model.base_model_prefix}."
    return [prefix + name for name, _ in base.named_parameters() if "pooler" not in name]


# ---------------------------------------------------------------------------------------------------- models


class TransformersModel(Network):
    """A model of transformers for a task; `changes` are of its config."""

    def __init__(self, config: HuggingFaceConfig, task: str, **changes: Any) -> None:
        super().__init__()
        theirs = _their_config(config.architecture)
        for name, value in changes.items():
            setattr(theirs, name, value)
        self.config = config
        self.model = _make(CLASSES[task], theirs)
        self._writes, self._base = CLASSES[task] in WRITE, frozenset(_base_names(self.model))
        parameters = inspect.signature(self.model.forward).parameters
        self.takes_types = "token_type_ids" in parameters and getattr(theirs, "type_vocab_size", 0) > 1
        self.takes_cache = "use_cache" in parameters
        self.cache_name = "cache" if "cache" in parameters else "past_key_values"  # renamed in transformers 5.24
        self.init_weights()

    def tie_weights(self) -> None:
        self.model.tie_weights()

    def head_of(self, name: str) -> str | None:
        """The task's head or the pooler that a parameter belongs to; None of the model itself, and of the layer that
        gives a writer's logits."""
        own = name.removeprefix(PREFIX)
        if "pooler" in own:
            return own.partition("pooler")[0] + "pooler"
        return None if self._writes or own in self._base else own.partition(".")[0]

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw every weight as transformers does, on whichever ranks hold it."""
        if next(self.model.parameters()).is_meta:
            return
        _draw(self.model, self.model, Trimmer())

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Raises ConfigError for an architecture that cannot compute its layers again."""
        if not enabled:
            return
        if not self.model.supports_gradient_checkpointing:
            name = type(self.model).__name__
            raise ConfigError("train.activation_checkpointing", True, f"transformers' {name} does not support it")
        if hasattr(self.model, "activation_checkpointing_enable"):  # the name since transformers 5.24
            self.model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        else:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    @property
    def layer_names(self) -> list[str]:
        """Classes of the layers of its stacks, which FSDP2 shards one by one."""
        return sorted({type(layer).__name__ for layer in _stacked(self.model)})

    @property
    def block_names(self) -> list[str]:
        """Classes that dispatch over devices keeps in one piece: the layers, and what else transformers says."""
        return sorted({*(self.model._no_split_modules or ()), *self.layer_names})

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TransformersModel:
        """Tables that are no weights stay as they were computed: rotary frequencies in bfloat16 would put tokens at
        other positions, and `to_empty` would lose them."""
        tables = [
            (module, name, buffer)
            for module in self.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and not buffer.is_meta
        ]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for module, name, buffer in tables:
            moved = module._buffers[name]
            assert moved is not None
            if not moved.is_meta:
                module._buffers[name] = buffer.to(moved.device)
        return self

    def inputs(
        self, tokens: Tensor, attention_mask: Tensor | None, token_types: Tensor | None = None
    ) -> dict[str, Any]:
        """What the wrapped model is called with."""
        given: dict[str, Any] = {"input_ids": tokens, "attention_mask": attention_mask}
        if token_types is not None and self.takes_types:
            given["token_type_ids"] = token_types
        if self.takes_cache:
            given["use_cache"] = False
        return given


def _stacked(module: nn.Module) -> Iterator[nn.Module]:
    """The layers of each list of layers that is in no other."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _stacked(child)


def _draw(module: nn.Module, owner: Any, trimmer: Trimmer) -> None:
    """Children first, each by the rules of the innermost model of transformers around it."""
    for child in module.children():
        _draw(child, child if isinstance(child, transformers.PreTrainedModel) else owner, trimmer)
    # Some rules reach into a module's children: T5's attention draws its projections.
    near = [module, *module.children()]
    own = {id(parameter): parameter for part in near for parameter in part.parameters(recurse=False)}
    with _gathered(list(own.values())):
        owner._init_weights(module)
        for parameter in own.values():
            trimmer.freed(parameter)


@contextlib.contextmanager
def _gathered(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Whole parameters while they are written; of those that zero.Init has sharded each rank keeps its part."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0):
        yield


class CausalLM(TransformersModel):
    def __init__(self, config: HuggingFaceConfig) -> None:
        super().__init__(config, "causal_lm")

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        document_ids: Tensor | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> Any:
        """As Decoder.forward; document_ids must be None. Padding at the end needs no mask."""
        assert document_ids is None
        logits = self.model(**self.inputs(tokens, None)).logits
        return logits if targets is None else _sums(logits, targets, label_smoothing, z_loss)


class MaskedLM(TransformersModel):
    def __init__(self, config: HuggingFaceConfig) -> None:
        super().__init__(config, "masked_lm")

    def forward(
        self,
        tokens: Tensor,
        attention_mask: Tensor | None = None,
        token_types: Tensor | None = None,
        targets: Tensor | None = None,
        predict: bool = False,
    ) -> tuple[Any, None]:
        """As MaskedLMModel.forward, without a head for pairs."""
        logits = self.model(**self.inputs(tokens, attention_mask, token_types)).logits
        if targets is None:
            return logits, None
        return logits[targets != IGNORED] if predict else _sums(logits, targets), None


class Classifier(TransformersModel):
    """Of texts, tokens or spans: task is classification, tagging or question_answering. pad_id: of the batches."""

    def __init__(self, config: HuggingFaceConfig, task: str, labels: int, pad_id: int) -> None:
        super().__init__(config, task, num_labels=labels, pad_token_id=pad_id)

    def forward(
        self,
        tokens: Tensor,
        attention_mask: Tensor | None = None,
        token_types: Tensor | None = None,
        change: Tensor | None = None,
    ) -> Tensor:
        """tokens (B, T) -> logits (B, labels) of texts, (B, T, labels) of tokens, (B, T, 2) of starts and ends.

        change (B, T, D): of the tokens' embeddings.
        """
        given = self.inputs(tokens, attention_mask, token_types)
        if change is None:
            output = self.model(**given)
        else:
            hook = self.model.get_input_embeddings().register_forward_hook(lambda _, __, found: found + change)
            try:
                output = self.model(**given)
            finally:
                hook.remove()
        if "start_logits" in output:
            return torch.stack((output.start_logits, output.end_logits), dim=-1)
        logits: Tensor = output.logits
        return logits


class Seq2Seq(TransformersModel):
    """The calls of models.Seq2Seq, so that training and generation go the same ways."""

    def __init__(self, config: HuggingFaceConfig) -> None:
        super().__init__(config, "translation")

    @property
    def n_decoder_layers(self) -> int:
        theirs = self.model.config
        names = ("num_decoder_layers", "decoder_layers", "num_hidden_layers")
        return int(next(count for name in names if (count := getattr(theirs, name, None)) is not None))

    def forward(
        self,
        tokens: Tensor | None,
        attention_mask: Tensor | None = None,
        targets_in: Tensor | None = None,
        targets: Tensor | None = None,
        label_smoothing: float = 0.0,
        memory: Tensor | None = None,
        cache: Any = None,
    ) -> Any:
        """As models.Seq2Seq.forward."""
        if targets_in is None:
            return self.model.get_encoder()(input_ids=tokens, attention_mask=attention_mask).last_hidden_state
        given: dict[str, Any] = {"attention_mask": attention_mask, "decoder_input_ids": targets_in}
        given |= {"input_ids": tokens} if memory is None else {"encoder_outputs": BaseModelOutput(memory)}
        given |= {"use_cache": cache is not None} | ({} if cache is None else {self.cache_name: cache})
        logits = self.model(**given).logits
        return logits if targets is None else _sums(logits, targets, label_smoothing)


def _sums(logits: Tensor, targets: Tensor, smoothing: float = 0.0, z_loss: float = 0.0) -> tuple[Tensor, Tensor]:
    """logits (..., V), targets (...) -> (loss_sum, nll_sum), float32 scalars: as linear_cross_entropy gives them."""
    scored = targets != IGNORED
    rows, wanted = logits[scored].float(), targets[scored]
    nll = F.cross_entropy(rows, wanted, reduction="sum")
    loss = F.cross_entropy(rows, wanted, reduction="sum", label_smoothing=smoothing) if smoothing else nll
    if z_loss:
        loss = loss + z_loss * rows.logsumexp(-1).square().sum()
    return loss, nll.detach()


# ---------------------------------------------------------------------------------------------------- export


def to_huggingface(
    config: HuggingFaceConfig,
    weights: Iterator[tuple[str, Tensor]],
    task: str,
    labels: list[str] | None,
    problem_type: str | None,
    tokens: dict[str, Any],
) -> tuple[dict[str, Any], Iterator[tuple[str, Tensor]]]:
    """(config.json, (name, tensor) one at a time) of a run's weights, as the class for `task` reads them.

    labels: of classification and tagging, in the order of the head's outputs. tokens: {pad_token_id: ...}, for what the
    model's own config leaves open.
    """
    theirs = _their_config(config.architecture)
    name = getattr(transformers, CLASSES[task])._model_mapping[type(theirs)].__name__
    settings = config.architecture | {"architectures": [name], "dtype": "float32"}
    settings.pop("torch_dtype", None)  # the older name
    if settings.get("pad_token_id") is None:
        settings["pad_token_id"] = tokens.get("pad_token_id", tokens.get("eos_token_id"))
    if problem_type is not None or labels is not None:
        labels = labels or ["LABEL_0"]
        settings["id2label"] = {str(index): label for index, label in enumerate(labels)}
        settings["label2id"] = {label: index for index, label in enumerate(labels)}
        settings.pop("num_labels", None)
    if problem_type is not None:
        settings["problem_type"] = problem_type
    return settings, ((name.removeprefix(PREFIX), tensor) for name, tensor in weights)
