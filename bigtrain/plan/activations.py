"""What a forward pass leaves for the backward pass, tensor by tensor, in bytes.

Counted is what is held: a view keeps the whole of its storage, and what two operators save is counted once. The
kernels decide: a GPU's flash attention and fused norms save less than what a CPU has, and the CPU's own kernels
(models/cpu_kernels.py) save something else again. Held to `torch.autograd.graph.saved_tensors_hooks` by a test.

Symbols in the formulas: T tokens of the micro-batch, L their sequences' length, h = dim, k = width of the keys,
a = heads, i = ffn_dim, V = vocabulary, e = bytes of an element (2 or 4), all as in arXiv 2205.05198, section 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bigtrain.config import (
    Config,
    DecoderConfig,
    EncoderConfig,
    InstructionConfig,
    MaskedLMConfig,
    OurModelConfig,
    Seq2SeqConfig,
    head_dim,
    starts_normed,
)

SHORT = 256  # keys up to which an encoder's attention on a CPU keeps its scores (models/cpu_kernels.py)
CHUNK_BYTES = 512 * 2**20  # of logits at a time (models/cross_entropy.py)
CACHE_BYTES = 4 * 2**20  # of logits in fp32 at a time, on a CPU
MASKED_LM_ALIGNMENT = 8  # columns that a bias adds to the weight (models/heads.py)


@dataclass(frozen=True)
class Setting:
    """What decides which kernels run, and on how much."""

    device: Literal["cpu", "cuda"]
    element_bytes: int  # of weights and activations
    sequences: int  # of a micro-batch
    length: int  # tokens of each
    documents: bool = False  # attention stops at document boundaries: a mask for each text
    padded: bool = False  # there is padding, which a mask keeps out
    cpu_kernels: bool = True  # a C compiler is there, or they were built before

    @property
    def tokens(self) -> int:
        return self.sequences * self.length

    @property
    def own_kernels(self) -> bool:
        return self.device == "cpu" and self.element_bytes == 2 and self.cpu_kernels


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch."""

    blocks: tuple[int, ...]  # saved by each block, in the order they run
    block_input: int  # what checkpointing keeps of a block instead
    rest: int  # embeddings, masks, last norm
    head_kept: int  # gradients that the loss has computed already and keeps for the backward pass
    head_peak: int  # the most that the loss holds while it runs, what it keeps included
    working: int  # the largest gradients in flight while a block's backward pass runs
    feed_forward: int = 0  # of the last block's, what its feed-forward layer saves: the first to be let go

    @property
    def per_layer(self) -> float:
        return sum(self.blocks) / max(len(self.blocks), 1)

    def large_tensors(self, least: int) -> int:
        """How many of the saved tensors are so large that an allocator gives each blocks of its own: about ten for a
        block, if one of a block's inputs is."""
        return 10 * len(self.blocks) if self.block_input >= least else 0

    def saved(self, checkpointing: bool) -> int:
        """At the end of the forward pass, the loss's own not counted."""
        return self.rest + (len(self.blocks) * self.block_input if checkpointing else sum(self.blocks))


def of(config: Config, setting: Setting) -> Activations:
    """Of the model and the task's head, with the vocabulary set."""
    model = config.model
    assert isinstance(model, (DecoderConfig, EncoderConfig, Seq2SeqConfig))
    own = setting.tokens * model.dim * setting.element_bytes
    if isinstance(model, Seq2SeqConfig):
        encoder = _block(model, setting, causal=False)
        blocks = [encoder] * model.n_layers
        blocks += [_block(model, setting, causal=True) + _cross_attention(model, setting)] * model.n_decoder_layers
    else:
        blocks = [_block(model, setting, causal=isinstance(model, DecoderConfig))] * model.n_layers
        if isinstance(model, EncoderConfig) and starts_normed(model):
            blocks[0] -= _norm(model, setting)  # the embeddings are normalised already
    kept, peak = _head(config, model, setting)
    working, feed_forward = _working(model, setting), _ffn(model, setting)
    return Activations(tuple(blocks), own, _rest(model, setting), kept, peak, working, feed_forward)


# ---------------------------------------------------------------------------------------------- in a block


def _norm(model: OurModelConfig, setting: Setting) -> int:
    """What a norm saves; its result is saved by whoever reads it."""
    tokens, dim, element = setting.tokens, model.dim, setting.element_bytes
    if setting.device == "cuda":
        return tokens * dim * element + 4 * tokens * (2 if model.norm == "layernorm" else 1)
    if model.norm == "layernorm":
        return tokens * dim * element + 2 * tokens * element  # input, mean, 1 / deviation
    return 2 * 4 * tokens * dim + 4 * tokens  # no fused kernel: the input and its normalised form in fp32


def _dropout(model: OurModelConfig, setting: Setting, elements: int, own_kernel: bool = True) -> int:
    if not model.dropout:
        return 0
    if setting.device == "cuda":
        return elements  # a mask of bytes
    return 0 if own_kernel and setting.own_kernels else elements * setting.element_bytes  # or a seed alone


def _block(model: OurModelConfig, setting: Setting, causal: bool) -> int:
    own = setting.tokens * model.dim * setting.element_bytes
    projections = 2 * own  # the inputs of qkv and of the feed-forward layer
    dropouts = 2 * _dropout(model, setting, setting.tokens * model.dim)
    return (
        2 * _norm(model, setting) + projections + _attention(model, setting, causal) + dropouts + _ffn(model, setting)
    )


def _attention(model: OurModelConfig, setting: Setting, causal: bool) -> int:
    """From the projection of queries, keys and values to the input of the output projection."""
    tokens, element, head_size = setting.tokens, setting.element_bytes, head_dim(model)
    dim = model.n_heads * head_size  # of all queries
    kv_heads = (isinstance(model, DecoderConfig) and model.n_kv_heads) or model.n_heads
    kv_dim, grouped = kv_heads * head_size, kv_heads != model.n_heads
    rotary = getattr(model, "positions", "") == "rotary"
    scores = tokens * setting.length * model.n_heads
    output = tokens * dim * element
    masked = setting.documents or (setting.padded and not causal)
    if setting.own_kernels and not causal and (model.dropout or setting.length <= SHORT):
        return output + 3 * tokens * dim * element + scores * element  # copies of q, k, v, and the probabilities
    if setting.device == "cpu" and model.dropout:
        return output + 4 * (3 * tokens * dim + 3 * scores)  # the plain formula, in fp32: p, noise, p with dropout
    qkv = tokens * (dim + 2 * kv_dim) * element  # as one tensor, of which q, k, v are views
    if rotary:
        qkv += tokens * (dim + kv_dim) * element  # q and k turned
    if setting.own_kernels and causal and not masked and grouped and head_size in (16, 64, 256):
        repeated = 2 * tokens * dim * element  # keys and values for every head
        qkv = repeated + (tokens * dim * element if rotary else qkv)  # without views the projection can go
    mask = 0
    if masked:  # the boolean mask as numbers, made in each layer
        mask = setting.tokens * element * (setting.length if setting.documents else 1)
    return output + qkv + 4 * tokens * model.n_heads + mask  # the sums of exponentials are fp32


def _cross_attention(model: Seq2SeqConfig, setting: Setting) -> int:
    tokens, element, dim = setting.tokens, setting.element_bytes, model.dim
    scores = tokens * setting.length * model.n_heads
    if setting.device == "cpu" and model.dropout:
        inner = 4 * (3 * tokens * dim + 3 * scores)
    else:
        inner = 3 * tokens * dim * element + 4 * tokens * model.n_heads
    dropout = _dropout(model, setting, tokens * dim)
    return _norm(model, setting) + 2 * tokens * dim * element + inner + dropout


def _ffn(model: OurModelConfig, setting: Setting) -> int:
    width = setting.tokens * (model.ffn_dim or 4 * model.dim) * setting.element_bytes
    if model.activation in ("swiglu", "geglu"):
        return 4 * width  # gate and value, act(gate), their product
    return width if model.activation == "relu" else 2 * width  # relu's gradient needs its result only


# ----------------------------------------------------------------------------------------- around the blocks


def _rest(model: OurModelConfig, setting: Setting) -> int:
    tokens = setting.tokens
    numbers = 8 * tokens  # the tokens themselves, int64
    if isinstance(model, Seq2SeqConfig):
        own = tokens * model.dim * setting.element_bytes
        embedded = 2 * (8 * tokens + _dropout(model, setting, tokens * model.dim, own_kernel=False))
        return embedded + 2 * _norm(model, setting) + own  # the source as all decoder blocks read it
    rest = numbers + _dropout(model, setting, tokens * model.dim) + _norm(model, setting)
    if isinstance(model, EncoderConfig):
        rest += _norm(model, setting) if model.norm_first else 0
        rest += 8 * tokens if model.token_types else 0
    if model.positions == "rotary":
        rest += 2 * setting.length * head_dim(model) * setting.element_bytes  # cos and sin
    else:
        rest += 8 * setting.length
    return rest


def _head(config: Config, model: OurModelConfig, setting: Setting) -> tuple[int, int]:
    """(what is kept for the backward pass, the most while the loss runs)."""
    element, dim, vocabulary = setting.element_bytes, model.dim, model.vocab_size or 0
    if not isinstance(model, EncoderConfig):
        return _loss(setting, setting.tokens, dim, vocabulary)
    hidden = setting.tokens * dim * element
    if not isinstance(config.task, MaskedLMConfig):
        return hidden, hidden
    scored = round(setting.tokens * config.task.mask_fraction)
    kept, peak = _loss(setting, scored, dim + MASKED_LM_ALIGNMENT, vocabulary)
    width = vocabulary * (dim + MASKED_LM_ALIGNMENT) * element  # the weight with its bias as one more column
    transform = 4 * scored * dim * element + hidden
    return kept + transform, peak + transform + width


def _loss(setting: Setting, rows: int, dim: int, vocabulary: int) -> tuple[int, int]:
    """Of `rows` tokens (models/cross_entropy.py): logits exist a chunk at a time, gradients are computed at once."""
    element = setting.element_bytes
    chunk = max(1, min(rows, CHUNK_BYTES // (vocabulary * element)))
    whole = chunk == rows
    hidden, weight = rows * dim * element, vocabulary * dim * element
    kept = hidden + weight
    logits = chunk * vocabulary * element
    # On a GPU the softmax works on a copy in fp32, in fp32 itself on two; on a CPU on some rows at a time, or in place.
    softmax = chunk * vocabulary * (4 if element == 2 else 8)
    if setting.device == "cpu":
        softmax = 0 if setting.own_kernels else min(4 * chunk * vocabulary, CACHE_BYTES)
    sums = 0 if whole else 4 * vocabulary * dim  # of the chunks, in fp32
    at_products = logits + weight + sums
    # normalised hidden states, their gradient, then whichever is more
    return kept, 2 * hidden + max(logits + softmax + sums, at_products, sums + (0 if whole else weight))


def evaluating(config: Config, setting: Setting) -> dict[str, int]:
    """What a batch of an evaluation holds at its widest, where nothing is kept for gradients: one block's tensors, and
    what the task makes of the result (`evaluate` in bigtrain/tasks)."""
    model, task = config.model, config.task
    assert isinstance(model, (DecoderConfig, EncoderConfig, Seq2SeqConfig))
    element, vocabulary, dim = setting.element_bytes, model.vocab_size or 0, model.dim
    hidden = setting.tokens * dim * element
    width = setting.tokens * (model.ffn_dim or 4 * dim) * element
    feed_forward = 2 * hidden + (4 if model.activation in ("swiglu", "geglu") else 2) * width
    attention = 8 * hidden  # the block's input and that of the projection; q, k, v, copies of them; the result
    if setting.device == "cpu" and not isinstance(model, DecoderConfig) and setting.length <= SHORT:
        attention += setting.tokens * setting.length * model.n_heads * element
    block = max(feed_forward, attention)
    rest = 8 * setting.tokens
    if isinstance(task, InstructionConfig):  # logits in fp32, those that a loss of each token reads, and its own
        scores = 3 * 4 * setting.tokens * vocabulary
    elif isinstance(task, MaskedLMConfig):  # logits, in fp32, and their logarithms
        scored = round(setting.tokens * task.mask_fraction)
        scores = scored * vocabulary * (element + 8) + 4 * scored * dim * element
    elif isinstance(model, EncoderConfig):
        scores = 0
    else:
        logits = min(setting.tokens * vocabulary * element, CHUNK_BYTES)
        copies = CACHE_BYTES if setting.device == "cpu" else 2 * logits
        scores = logits + min(copies, 2 * logits)
    if isinstance(model, Seq2SeqConfig):
        rest += hidden  # the source as it was read
        scores = max(scores, _generating(config, model, setting))
    return {"activations": rest + max(block, hidden), "logits": scores}


def _generating(config: Config, model: Seq2SeqConfig, setting: Setting) -> int:
    """While a text is written for each source of the batch: keys and values of what was written and of the source,
    once more where they grow, and the last token's logits in fp32, as they are and as beams are chosen by them."""
    beams = getattr(config.task, "num_beams", 1)
    written = min(getattr(config.task, "max_new_tokens", 0), model.max_seq_len)
    texts = setting.sequences * beams
    layer = 2 * texts * model.dim * setting.element_bytes  # for a token
    cache = model.n_decoder_layers * layer * (written + setting.length) + 2 * layer * written
    return cache + texts * setting.length * model.dim * setting.element_bytes + 3 * 4 * texts * (model.vocab_size or 0)


def _working(model: OurModelConfig, setting: Setting) -> int:
    """What a block's backward pass adds to what is saved at its widest place, the feed-forward layer's output side:
    the gradient of its input and of its weight there, or where a gate is, of both factors."""
    ffn_dim = model.ffn_dim or 4 * model.dim
    width = setting.tokens * ffn_dim * setting.element_bytes
    at_linear = width + ffn_dim * model.dim * setting.element_bytes
    return max(at_linear, 2 * width) if model.activation in ("swiglu", "geglu") else at_linear
