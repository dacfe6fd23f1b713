"""The whole configuration as dataclasses: a YAML key is a field is an argument.

Nothing here imports torch, DeepSpeed or Hydra: the command line reads it before it knows whether anything
will run, and every rank reads the same file back without any of them.

A section that comes in several kinds (an engine, an optimizer, a schedule ...) is a union of dataclasses told
apart by their field `kind`. `from_dict` turns plain data into `Config`, refuses every key that no dataclass
has, and checks types; `checks.check` holds the rules that need more than one field. Both raise `ConfigError`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import re
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from bigtrain.compress_config import CompressConfig
from bigtrain.errors import ConfigError, unknown_key
from bigtrain.redact import differences, redact

T = TypeVar("T")

# ---------------------------------------------------------------------------------------------------- model


@dataclass
class LinearScalingConfig:
    """Position interpolation (arXiv 2306.15595): position p turns as p / factor did."""

    kind: Literal["linear"] = "linear"
    factor: float = 1.0


@dataclass
class Llama3ScalingConfig:
    """Llama 3.1's: dimensions that turn at least high_freq_factor times over the original context stay as they are,
    those that turn at most low_freq_factor times turn as p / factor did, the ones between them in between."""

    kind: Literal["llama3"] = "llama3"
    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192


RopeScalingConfig = LinearScalingConfig | Llama3ScalingConfig


@dataclass
class DecoderConfig:
    """A causal Transformer: GPT-2 style and Llama style are two settings of the same fields."""

    kind: Literal["decoder"] = "decoder"
    dim: int = 256
    n_layers: int = 4
    n_heads: int = 4
    n_kv_heads: int | None = None  # None: as many as n_heads (no grouped-query attention)
    head_dim: int | None = None  # None: dim / n_heads
    ffn_dim: int | None = None  # None: 4 * dim
    vocab_size: int | None = None  # None: the tokenizer's, rounded up to a multiple of 64
    max_seq_len: int = 256
    positions: Literal["learned", "rotary"] = "learned"
    rope_theta: float = 10_000.0
    rope_scaling: RopeScalingConfig | None = None  # for contexts longer than those of the first training
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_eps: float = 1e-5
    activation: Literal["gelu", "gelu_tanh", "swiglu"] = "gelu_tanh"
    bias: bool = True
    tie_embeddings: bool = True
    dropout: float = 0.0
    init_std: float = 0.02


@dataclass
class EncoderConfig:
    """A bidirectional Transformer: BERT (arXiv 1810.04805) and its modern variant are two settings of one class."""

    kind: Literal["encoder"] = "encoder"
    dim: int = 256
    n_layers: int = 4
    n_heads: int = 4
    head_dim: int | None = None  # None: dim / n_heads
    ffn_dim: int | None = None  # None: 4 * dim
    vocab_size: int | None = None  # None: the tokenizer's, rounded up to a multiple of 64
    max_seq_len: int = 128
    positions: Literal["learned", "rotary"] = "learned"
    rope_theta: float = 10_000.0
    token_types: int = 2  # segments that are told apart (BERT's sentences A and B); 0: none
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_eps: float = 1e-12
    norm_first: bool = False  # BERT normalises after adding (post-norm), modern encoders before (pre-norm)
    activation: Literal["gelu", "gelu_tanh", "geglu", "swiglu"] = "gelu"
    bias: bool = True
    pooling: Literal["first", "mean"] = "first"  # what stands for a text: its first token or the mean of all
    pooler: bool = True  # tanh(linear(of that)), which sentence-level heads read
    unpadded: bool = False  # take a batch's padding out before the blocks: they compute real tokens only
    dropout: float = 0.1
    init_std: float = 0.02


@dataclass
class Seq2SeqConfig:
    """An encoder-decoder Transformer: the original (arXiv 1706.03762), normalised before each sub-layer (pre-norm).

    One table embeds source and target and makes the logits; positions are the paper's sinusoids.
    """

    kind: Literal["seq2seq"] = "seq2seq"
    dim: int = 128
    n_layers: int = 3  # of the encoder
    n_decoder_layers: int = 3
    n_heads: int = 4
    ffn_dim: int | None = None  # None: 4 * dim
    vocab_size: int | None = None  # None: the tokenizer's, rounded up to a multiple of 64
    max_seq_len: int = 128  # of a source, and of a target
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_eps: float = 1e-5
    activation: Literal["relu", "gelu", "gelu_tanh", "geglu", "swiglu"] = "relu"
    bias: bool = True
    dropout: float = 0.1
    init_std: float = 0.02  # of the linear layers; small ones learn faster from dim ** -0.5


@dataclass
class HuggingFaceConfig:
    """Any architecture that transformers has a class for, in transformers' own code and from a directory or hub model
    with safetensors. What follows `pretrained` the command fills in, so that a run stands on its own."""

    kind: Literal["hf"] = "hf"
    path: str | None = None  # a directory, or the name of a hub model
    max_seq_len: int = 0  # 0: as long as the model takes
    pretrained: bool = True  # false: random weights of the same architecture
    architecture: dict[str, Any] = field(default_factory=dict)  # the model's config.json
    vocab_size: int | None = None
    dim: int = 0  # of its token embeddings


OurModelConfig = DecoderConfig | EncoderConfig | Seq2SeqConfig
ModelConfig = OurModelConfig | HuggingFaceConfig


@dataclass
class PretrainedConfig:
    """The architecture of a run or a Hugging Face directory. The command puts what it finds there in this section's
    place, and where they are not set, takes the weights (`init_from`) and the tokenizer from there too."""

    kind: Literal["pretrained"] = "pretrained"
    path: str | None = None
    max_seq_len: int | None = None  # shorter sequences than the model could take
    n_layers: int | None = None  # fewer: the first ones' weights, or with compress.distil.init_from_teacher others
    dropout: float | None = None
    unpadded: bool | None = None  # of an encoder
    rope_scaling: RopeScalingConfig | None = None  # of a decoder with rotary positions, with a longer max_seq_len
    # Of an encoder; mean: without its pooler, which was trained on first tokens.
    pooling: Literal["first", "mean"] | None = None


# ----------------------------------------------------------------------------------------------------- task


@dataclass
class CausalLMConfig:
    """Predict the next token. z_loss is PaLM's (arXiv 2204.02311, section 5): adds z_loss * log(Z)^2."""

    kind: Literal["causal_lm"] = "causal_lm"
    label_smoothing: float = 0.0
    z_loss: float = 0.0


@dataclass
class MaskedLMConfig:
    """BERT's pretraining (arXiv 1810.04805, section 3.1): restore masked tokens, and judge a pair of segments."""

    kind: Literal["masked_lm"] = "masked_lm"
    mask_fraction: float = 0.15  # of the tokens are to be predicted: 80% of them become [MASK], 10% another, 10% stay
    whole_word: bool = False  # mask all the pieces of a word together
    # next: does segment B follow A, or is it from elsewhere? order (arXiv 1909.11942): are they swapped?
    sentence: Literal["none", "next", "order"] = "next"


@dataclass
class ClassificationConfig:
    """One label, or with `regression` one number, for a text or a pair of texts."""

    kind: Literal["classification"] = "classification"
    regression: bool = False
    label_smoothing: float = 0.0
    dropout: float = 0.1  # before the classifier
    max_length: int | None = None  # tokens of an example, longer ones are cut; None: model.max_seq_len
    # Augmentation: this fraction of a training text's tokens becomes the unknown token, changes places, or goes.
    token_dropout: float = 0.0
    token_swap: float = 0.0
    token_deletion: float = 0.0
    # Half of the loss is that of embeddings changed for the worse, in one step (fgm) or several (pgd): robuster, and
    # two to three times the work of a step (more with pgd).
    adversarial: Literal["none", "fgm", "pgd"] = "none"
    adversarial_epsilon: float = 1.0  # how far (L2) a text's embeddings together may move
    adversarial_steps: int = 3  # of pgd


@dataclass
class TaggingConfig:
    """A tag for each word of a sentence: named entities, parts of speech, roles."""

    kind: Literal["tagging"] = "tagging"
    dropout: float = 0.1
    max_length: int | None = None


@dataclass
class TranslationConfig:
    """A text from a text: another language, a summary, a paraphrase."""

    kind: Literal["translation"] = "translation"
    label_smoothing: float = 0.1
    max_length: int | None = None  # tokens of a source, and of a target
    max_new_tokens: int = 64  # of a text that an evaluation writes
    num_beams: int = 1  # in evaluation; 1: greedy


@dataclass
class QuestionAnsweringConfig:
    """The span of a context that answers a question, or none (SQuAD, arXiv 1606.05250 and 1806.03822)."""

    kind: Literal["question_answering"] = "question_answering"
    dropout: float = 0.1
    max_length: int | None = None  # tokens of question and context; a longer context becomes several windows
    stride: int = 64  # tokens that two windows of a context share
    max_answer_length: int = 30  # tokens; longer spans are no candidates when the model is asked
    no_answer_threshold: float = 0.0  # no answer where [CLS] scores more than this above the best span


@dataclass
class InstructionConfig:
    """Answer prompts (or go on with conversations) as the examples do; only the responses are learned."""

    kind: Literal["instruction"] = "instruction"
    label_smoothing: float = 0.0
    max_length: int | None = None
    # How a conversation is written: as lines, marked up with roles, or by the chat template that the tokenizer brings.
    template: Literal["plain", "chatml", "tokenizer"] = "plain"


TaskConfig = (
    CausalLMConfig
    | MaskedLMConfig
    | ClassificationConfig
    | TaggingConfig
    | QuestionAnsweringConfig
    | TranslationConfig
    | InstructionConfig
)
LABELLED_TASKS = (
    InstructionConfig,
    ClassificationConfig,
    TaggingConfig,
    QuestionAnsweringConfig,
    TranslationConfig,
)  # learn from labelled examples, not from plain text

# ----------------------------------------------------------------------------------------------------- data


@dataclass
class TokenizerConfig:
    """`path` loads one (a tokenizer.json, a run, a Hugging Face directory or hub name); else a BPE is trained."""

    path: str | None = None
    vocab_size: int = 4096
    train_mib: int = 64  # text sampled from the training documents to train the BPE on


@dataclass
class StdlibDataConfig:
    """The running interpreter's own standard library source: real text that is on every machine."""

    kind: Literal["stdlib"] = "stdlib"
    # What a translation learns: a line of Python -> the same in words, or a function -> its docstring's first line.
    pairs: Literal["spoken", "docstring"] = "spoken"
    held_out: float = 0.05  # fraction of the files
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    isolate_documents: bool = False  # attention stops at document boundaries
    prepared_dir: str | None = None  # where the token shards are; the command fills it in
    cache_dir: str = "~/.cache/bigtrain"
    workers: int | None = None  # None: one per core


@dataclass
class TextDataConfig:
    """Text of the user's: a file, directory, glob, a list of them, or the name of a Hugging Face dataset."""

    kind: Literal["text"] = "text"
    path: str | list[str] | None = None
    held_out_path: str | list[str] | None = None  # None: `held_out` of the documents
    text_field: str = "text"  # the column of jsonl, parquet, csv and datasets
    name: str | None = None  # the configuration of a Hugging Face dataset
    held_out: float = 0.05
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    isolate_documents: bool = False
    prepared_dir: str | None = None
    cache_dir: str = "~/.cache/bigtrain"
    workers: int | None = None


@dataclass
class LabelledDataConfig:
    """Labelled examples: tsv, csv, jsonl, parquet or CoNLL files, or a Hugging Face dataset; of StdlibDataConfig the
    labelled tasks take examples that are derived from the standard library's source."""

    kind: Literal["labelled"] = "labelled"
    path: str | list[str] | None = None
    held_out_path: str | list[str] | None = None  # None: `held_out` of the examples
    columns: dict[str, str | int] = field(default_factory=dict)  # what a task wants -> the column that holds it
    header: bool | None = None  # whether a tsv or csv file begins with column names; None: found out
    name: str | None = None  # the configuration of a Hugging Face dataset
    held_out: float = 0.1
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    prepared_dir: str | None = None
    cache_dir: str = "~/.cache/bigtrain"
    workers: int | None = None


DataConfig = StdlibDataConfig | TextDataConfig | LabelledDataConfig

# --------------------------------------------------------------------------------------------------- engine


@dataclass
class DeepSpeedConfig:
    """DeepSpeed ZeRO (arXiv 1910.02054): stage 0 replicates, 1 shards optimizer states, 2 gradients, 3 parameters."""

    kind: Literal["deepspeed"] = "deepspeed"
    stage: int = 2
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    offload_parameters: Literal["none", "cpu", "nvme"] = "none"  # stage 3 only
    nvme_path: str | None = None
    bucket_mib: int = 50  # reduce and all-gather bucket
    overlap_comm: bool = True
    zero_init: bool = True  # stage 3: parameters are born sharded
    quantized_communication: bool = False  # stage 3 on GPUs: ZeRO++ (arXiv 2306.10209), int8 weights, int4 gradients
    deepspeed: dict[str, Any] = field(default_factory=dict)  # passed through into ds_config, checked key by key


@dataclass
class AccelerateConfig:
    """Hugging Face Accelerate, the reference that DeepSpeed's loss curve is held to."""

    kind: Literal["accelerate"] = "accelerate"
    parallel: Literal["ddp", "fsdp2"] = "ddp"  # at one rank both are a plain single process


EngineConfig = DeepSpeedConfig | AccelerateConfig

# ---------------------------------------------------------------------------------- optimizer and schedule


@dataclass
class AdamWConfig:
    kind: Literal["adamw"] = "adamw"
    lr: float = 3e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1


@dataclass
class AdamW8bitConfig:
    """AdamW with 8-bit block-quantised moments (arXiv 2110.02861), from torchao."""

    kind: Literal["adamw8bit"] = "adamw8bit"
    lr: float = 3e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1


@dataclass
class AdafactorConfig:
    """Adafactor (arXiv 1804.04235) as torch.optim has it."""

    kind: Literal["adafactor"] = "adafactor"
    lr: float = 1e-2
    beta2_decay: float = -0.8
    weight_decay: float = 0.0


@dataclass
class LionConfig:
    """Lion (arXiv 2302.06675): the sign of an interpolated momentum; wants a 3-10x smaller lr than AdamW."""

    kind: Literal["lion"] = "lion"
    lr: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.99
    weight_decay: float = 1.0


@dataclass
class MuonConfig:
    """Muon (orthogonalised momentum) for the layers' matrices, AdamW for the rest, as DeepSpeed has it."""

    kind: Literal["muon"] = "muon"
    lr: float = 2e-2  # of the matrices
    momentum: float = 0.95
    adam_lr: float = 3e-4  # of embeddings, positions, heads, norms and biases
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1


OptimizerConfig = AdamWConfig | AdamW8bitConfig | AdafactorConfig | LionConfig | MuonConfig


@dataclass
class ScheduleConfig:
    """lr(step), a pure function. Warm-up is linear; `final_ratio` of the peak lr is left at the last step."""

    kind: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    warmup_steps: int = 0
    final_ratio: float = 0.1
    decay_fraction: float = 0.2  # wsd only: the last part of the run, in which lr falls


# ---------------------------------------------------------------------------------------------------- train


@dataclass
class LoRAConfig:
    """LoRA (arXiv 2106.09685): the linear layers learn changes of low rank, and nothing else is trained."""

    rank: int = 0  # of the changes; 0: no LoRA
    alpha: float = 16.0  # a change counts alpha / rank times
    dropout: float = 0.0
    targets: list[str] = field(default_factory=lambda: ["*.[0-9]*.*"])  # patterns of layers, by default all of blocks
    train: list[str] = field(
        default_factory=lambda: ["head.*", "pair_head.*"]
    )  # of parameters trained in full all the same, as are those that init_from does not hold


@dataclass
class EncryptionConfig:
    """Checkpoints that only the holder of a 256-bit key can read (AES-256-GCM); off while no key is named."""

    key_file: str | None = None  # 64 hexadecimal digits, in a file that only its owner can read
    key_env: str | None = None  # or the environment variable that holds them


@dataclass
class GuardConfig:
    """What happens when training goes wrong. A loss or gradient that is not finite is always found before the update,
    and ends the run where `spike` does not say how to go on (skip, rollback)."""

    # A loss far above the last ones: warn; skip: leave this update out; rollback: go back to the last checkpoint and
    # leave out the data around the spike (arXiv 2204.02311, section 5.1).
    spike: Literal["off", "warn", "skip", "rollback"] = "off"
    spike_window: int = 64  # steps: the last losses, of which the median is taken
    spike_deviations: float = 10.0  # how far above that median a spike is, in robust standard deviations
    skip_steps: int = 8  # rollback: steps of data that are left out on each side of the spike
    max_spikes: int = 8  # without progress in between; then the run ends
    replay_every: int = 0  # steps between two checks that a micro-batch gives the same bits twice; 0: never


@dataclass
class PrivacyConfig:
    """DP-SGD (arXiv 1607.00133): what the weights tell of any one training example is bounded by (epsilon, delta),
    which the result says. On while the noise is set, or the epsilon that it is to be reckoned from. The bound is of
    the weights: metrics of training and evaluation are as they are."""

    noise_multiplier: float | None = None  # deviation of the noise, in units of max_grad_norm
    target_epsilon: float | None = None  # after train.steps
    delta: float = 1e-5  # below 1 / training examples
    max_grad_norm: float = 1.0  # that each example's gradient is clipped to
    accountant: Literal["rdp", "prv"] = "rdp"  # prv (arXiv 2106.02848) bounds more tightly, and takes seconds
    seed: int | None = None  # None: draws and noise come from a secret of the run; a number is for tests: no privacy

    @property
    def enabled(self) -> bool:
        return self.noise_multiplier is not None or self.target_epsilon is not None


@dataclass
class ProfileConfig:
    """A window of steps that is looked into (RUN_DIR/profile); 0 steps: none."""

    start_step: int = 10  # steps done before it begins
    steps: int = 0  # that are traced
    flops: bool = False  # and DeepSpeed's flops profiler in the step after them
    memory: bool = False  # allocations in the trace too
    stacks: bool = False  # the lines of Python too: large traces
    all_ranks: bool = False  # else rank 0


@dataclass
class TrainConfig:
    steps: int = 1000
    stop_at: int | None = None  # stop (and save) at this step; the schedule still counts to `steps`
    seed: int = 0
    global_batch: int = 32  # sequences per optimizer step, over all ranks
    micro_batch: int | None = None  # sequences per forward on one rank, the rest being accumulation; None: all at once
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"  # master weights and optimizer states are fp32 always
    grad_clip: float = 1.0  # global gradient norm; 0: no clipping
    activation_checkpointing: bool = False
    compile: bool = False  # torch.compile; for GPUs: on a CPU our own kernels (models/cpu_kernels.py) are faster
    deterministic: bool = False
    freeze: list[str] = field(default_factory=list)  # patterns of parameters that keep their weights: ["backbone.*"]
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    layer_lr_decay: float = 1.0  # each layer's lr by this factor smaller than that of the layer above
    eval_every: int = 0  # steps; 0: only at the end
    eval_batches: int | None = None  # micro-batches a rank in an evaluation during the run: eval_sample/; None: all
    save_every: int = 0  # steps; 0: only at the end
    async_save: bool = True  # write a copy in the background, where host memory has room for one
    keep_checkpoints: int = 2  # the newest; the one being written comes on top
    keep_every: int = 0  # steps: checkpoints at a multiple of it stay for good; 0: none
    keep_best: bool = False  # and the one with the lowest train.objective, which is then evaluated before each save
    encryption: EncryptionConfig = field(default_factory=EncryptionConfig)  # of the checkpoints
    # The number of result.json that a sweep minimises (-eval/accuracy: maximises), or several of them:
    # [eval/loss,time/train_seconds]
    objective: str | list[str] = "eval/loss"
    tokens_per_parameter: float | None = None  # what a recipe may reckon train.steps from (experiment=ladder)
    profile: ProfileConfig = field(default_factory=ProfileConfig)


# ------------------------------------------------------------------------------------------ launch, logger


@dataclass
class SlurmConfig:
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time: str | None = None  # a limit as sbatch takes it: minutes, or days-hours:minutes:seconds
    options: list[str] = field(default_factory=list)  # any other of sbatch's: [--exclusive, --mem=64G]
    poll_seconds: float = 2.0  # between two looks at the job


@dataclass
class KubernetesConfig:
    image: str = "bigtrain:latest"  # with bigtrain installed
    namespace: str = "default"
    name: str | None = None  # None: after the run directory
    volume_claim: str | None = None  # a PersistentVolumeClaim (ReadWriteMany) that holds run_dir and the data
    mount_path: str = "/work"  # where it is mounted
    variables_from: str | None = None  # a Secret whose keys become variables: WANDB_API_KEY, HF_TOKEN
    cpu: str | None = None  # requests and limits of each pod, as Kubernetes writes them: "8", "64Gi"
    memory: str | None = None
    shared_memory: str = "1Gi"  # /dev/shm


@dataclass
class LaunchConfig:
    kind: Literal["local", "hostfile", "slurm", "torchrun", "manual", "kubernetes", "dryrun"] = "local"
    dry_run: bool = False  # only show what would be started
    ranks: int | None = None  # per node; None: one per GPU, without a GPU one per core up to 2; a hostfile's slots
    hostfile: str | None = None  # lines of `host slots=N`
    nodes: int | None = None  # the first so many of the hostfile, all if None; of Slurm and the others: how many
    min_nodes: int | None = None  # a restart may go on with so many of them; None: with all only
    runner: Literal["pdsh", "openmpi", "mpich"] = "pdsh"  # what the deepspeed launcher starts the nodes with
    ssh_config: str | None = None  # a file for ssh -F
    ssh_port: int | None = None
    ssh_seconds: int = 10  # for a host to answer
    clock_seconds: float = 5.0  # that the nodes' clocks may be apart
    master_address: str | None = None  # None: one of the first node's that every node reaches
    shared_run_dir: bool = True  # false: nodes do not share run_dir; the run then leaves no checkpoints
    forward: list[str] = field(default_factory=list)  # variables that go to other nodes, beside WANDB_*, NCCL_* ...
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    kubernetes: KubernetesConfig = field(default_factory=KubernetesConfig)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads_per_rank: int | None = None  # None: the node's cores shared out
    bind_cores: bool = True  # on the CPU each rank on cores of its own, where the ranks fill the node's
    master_port: int | None = None  # None: a free one
    timeout_seconds: int = 1800  # of a collective
    stop_seconds: int = 300  # between asking the ranks to stop and killing them
    hang_seconds: int = 600  # without a sign of life of a rank in a step (slow phases: a multiple); 0: wait for ever
    restarts: int = 3  # from the last checkpoint after a failure, until one more brings no new checkpoint; 0: none
    env: dict[str, str] = field(default_factory=dict)  # set in every rank
    preflight: bool = True  # refuse a run that cannot fit into this machine's memory
    private: bool = False  # the run directory and all that is written: for its owner alone (0700, umask 077)


@dataclass
class WandbConfig:
    enabled: bool = False
    project: str = "bigtrain"
    entity: str | None = None
    name: str | None = None
    group: str | None = None  # None: of a sweep's trials the sweep
    job_type: str = "train"
    tags: list[str] = field(default_factory=list)
    mode: Literal["auto", "online", "offline"] = "auto"  # auto: online if there is a key, else offline
    x_axis: Literal["step", "tokens"] = "step"  # of the charts
    artifacts: bool = True  # code, config, and for each checkpoint a reference to where it lies
    alerts: bool = True  # about warnings (spikes, stragglers, checkpoints that failed), failures, restarts and stalls
    stall_seconds: int = 900  # without a logged step, an evaluation or a checkpoint; 0: no alert


@dataclass
class LoggerConfig:
    log_every: int = 1  # steps between lines of metrics.jsonl; reading the loss is the loop's only host sync
    progress: bool = True
    wandb: WandbConfig = field(default_factory=WandbConfig)
    trackers: list[str] = field(default_factory=list)  # besides metrics.jsonl: tensorboard, csv, mlflow
    mlflow_experiment: str = "bigtrain"


# --------------------------------------------------------------------------------------------------- config


@dataclass
class Config:
    run_dir: str = "runs/latest"
    resume: str = "auto"  # auto | required | never | a run or checkpoint directory
    resume_allow: list[str] = field(default_factory=list)  # what may have changed: [optimizer.lr, train.global_batch]
    init_from: str | None = None  # a run, checkpoint or Hugging Face directory whose weights this one starts from
    model: ModelConfig = field(default_factory=DecoderConfig)
    task: TaskConfig = field(default_factory=CausalLMConfig)
    data: DataConfig = field(default_factory=StdlibDataConfig)
    engine: EngineConfig = field(default_factory=DeepSpeedConfig)
    optimizer: OptimizerConfig = field(default_factory=AdamWConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    compress: CompressConfig = field(default_factory=CompressConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)


GROUPS = ("experiment", "model", "task", "data", "engine", "optimizer", "schedule", "compress", "launch", "logger")

# ------------------------------------------------------------------------------- plain data <-> dataclasses


def from_dict(data: dict[str, Any]) -> Config:
    """Build a Config from plain data (as YAML gives it).

    Raises ConfigError for an unknown key (with the nearest valid one) or a value of the wrong type.
    """
    config = _build(Config, data, "")
    assert isinstance(config, Config)
    return config


def section(cls: type[T], data: dict[str, Any], path: str) -> T:
    """One section of a config by itself. Raises ConfigError as `from_dict` does."""
    built = _build(cls, data, path)
    assert isinstance(built, cls)
    return built


def to_dict(config: Any) -> dict[str, Any]:
    return dataclasses.asdict(config)


def flatten(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def union_members(hint: Any) -> list[type]:
    """The dataclasses of a section's type: one, or the members of a union."""
    return [member for member in options(hint) if isinstance(member, type) and dataclasses.is_dataclass(member)]


def kinds(cls: type) -> tuple[str, ...]:
    """The values that a dataclass's field `kind` can take; empty if it has none."""
    hint = get_type_hints(cls).get("kind")
    return get_args(hint) if hint is not None else ()


def hints_at(path: str) -> list[Any]:
    """The types that a key may have, over all kinds of its section; empty if there is no such key."""
    found: list[Any] = [Config]
    for name in path.split("."):
        inside: list[Any] = []
        for hint in itertools.chain.from_iterable(map(options, found)):
            if dataclasses.is_dataclass(hint):
                inside += [value for key, value in get_type_hints(hint).items() if key == name]
            elif get_origin(hint) is dict:
                inside.append(get_args(hint)[1])
        found = inside
    return found


def options(hint: Any) -> list[Any]:
    """The members of a union; of another type itself."""
    return list(get_args(hint)) if get_origin(hint) in (Union, types.UnionType) else [hint]


def _build(hint: Any, data: Any, path: str) -> Any:
    """Build the dataclass that `hint` names, or the member of a union that data's `kind` picks."""
    if not isinstance(data, dict):
        raise ConfigError(path, data, "a section is wanted here, with keys of its own")
    members = union_members(hint)
    if len(members) > 1:
        by_kind = {kind: member for member in members for kind in kinds(member)}
        kind = data.get("kind", next(iter(by_kind)))
        if kind not in by_kind:
            raise ConfigError(f"{path}.kind", kind, "unknown", f"one of {', '.join(by_kind)}")
        cls = by_kind[kind]
    else:
        cls = members[0]
    hints = get_type_hints(cls)
    values = {}
    for key, value in data.items():
        name = f"{path}.{key}" if path else str(key)
        if key not in hints:
            raise unknown_key(name, hints)
        values[key] = _value(hints[key], value, name)
    return cls(**values)


def _value(hint: Any, value: Any, path: str) -> Any:
    """Check (and where nothing is lost, convert) one value: 1e-3 read as text and 3 for a float are meant well."""
    if union_members(hint):
        return None if value is None and type(None) in get_args(hint) else _build(hint, value, path)
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        for member in args:
            try:
                return _value(member, value, path)
            except ConfigError:
                continue
    elif origin is Literal:
        if value in args and not isinstance(value, bool):
            return value
        raise ConfigError(path, value, "not a valid choice", f"one of {', '.join(map(str, args))}")
    elif origin is list and isinstance(value, list):
        return [_value(args[0], item, f"{path}[{i}]") for i, item in enumerate(value)]
    elif origin is dict and isinstance(value, dict):
        return {str(key): _value(args[1], item, f"{path}.{key}") for key, item in value.items()}
    elif hint is type(None) and value is None:
        return None
    elif hint is float and not isinstance(value, bool):
        try:
            if isinstance(value, (int, float, str)):  # YAML 1.1 reads 1e-3 as text
                return float(value)
        except ValueError:
            pass
    elif hint in (bool, int, str) and type(value) is hint:
        return value
    elif hint is str and type(value) is int:
        return str(value)
    elif hint is int and isinstance(value, str) and re.fullmatch(r"[-+]?[0-9]+", value.strip()):
        return int(value)  # ${oc.env:NAME} gives text
    elif hint is bool and isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    way_out = (
        "a word that YAML reads otherwise is text in quotes" if hint is str and not isinstance(value, list) else ""
    )
    raise ConfigError(path, value, f"wrong type, {_type_name(hint)} is wanted", way_out)


def _type_name(hint: Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
    if hint in names:
        return names[hint]
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_type_name(member) for member in get_args(hint))
    origin: Any = get_origin(hint)
    return "a list" if origin is list else "a section" if origin is dict else str(hint)


# ----------------------------------------------------------------------------------------------------- file


def dump(config: Config) -> str:
    """The config as YAML text: every field, in the order of the dataclasses, the same text for the same config.

    Secrets read `***` in it; `held_back` has them.
    """
    return yaml.safe_dump(public(config), sort_keys=False, width=120, allow_unicode=True)


def public(config: Config) -> dict[str, Any]:
    """The config as plain data without its secrets: what may be written anywhere."""
    return _public(to_dict(config))


def _public(data: dict[str, Any]) -> dict[str, Any]:
    clean = redact(data, also=data["launch"]["env"])
    if "columns" in data["data"]:
        clean["data"]["columns"] = data["data"]["columns"]  # {token: word} names columns of a table, nothing secret
    assert isinstance(clean, dict)
    return clean


def held_back(config: Config) -> list[Any]:
    """The secrets that `dump` leaves out, [[path of keys, value] ...]: they go to the ranks another way."""
    data = to_dict(config)
    return differences(data, _public(data))


def with_secrets(config: Config, secrets: list[Any]) -> Config:
    """`config` as it was before `dump`, given what `held_back` gave then."""
    data = to_dict(config)
    for path, value in secrets:
        place = data
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
    return from_dict(data)


def load(path: str | Path) -> Config:
    """Read a config.yaml that `dump` wrote. Raises ConfigError if it is missing, empty or no such file."""
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError("config", str(path), "no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError("config", str(path), f"cannot be read ({str(error).splitlines()[0]})") from None
    if not isinstance(data, dict):
        raise ConfigError("config", str(path), "holds no config")
    return from_dict(data)


def fingerprint(config: Config) -> str:
    """SHA-256 of the dumped text: what every rank checks that it read the same."""
    return hashlib.sha256(dump(config).encode()).hexdigest()


# ---------------------------------------------------------------------------------------- derived numbers

VOCABULARY_MULTIPLE = 64  # matrix kernels like it; the extra rows are never a target


def objective_names(objective: str | list[str]) -> list[str]:
    """The names in train.objective, a list or a text with commas; the first is what a checkpoint is judged by."""
    names = objective.split(",") if isinstance(objective, str) else objective
    return [name.strip() for name in names if name.strip()]


def head_dim(model: OurModelConfig) -> int:
    """Columns of a query, key or value of one attention head."""
    return getattr(model, "head_dim", None) or model.dim // model.n_heads


def starts_normed(model: EncoderConfig) -> bool:
    """Whether block 0 has no norm before its attention, for the embeddings are normalised: in ModernBERT (arXiv
    2412.13663), which has rotary positions. RoBERTa-PreLayerNorm, with learned ones, has it all the same."""
    return model.norm_first and model.positions == "rotary"


def micro_batch(config: Config, world_size: int) -> int:
    """Sequences that one rank runs through the model at once."""
    return config.train.micro_batch or config.train.global_batch // world_size


def accumulation_steps(config: Config, world_size: int) -> int:
    """Micro-batches that each rank runs for one optimizer step."""
    return config.train.global_batch // (world_size * micro_batch(config, world_size))
