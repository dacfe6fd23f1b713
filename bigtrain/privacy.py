"""What a differentially private run promises, and what that rests on.

DP-SGD (arXiv 1607.00133): at each step every training example is drawn by itself with probability
q = global_batch / examples, its gradient is clipped to norm C, and the sum of the clipped gradients gets Gaussian noise
of deviation noise_multiplier * C. The engine's part of that is in engine/private.py; here are the promise (`Guarantee`:
epsilon as a function of the steps done), the draws, and the noise.

Draws and noise come from a secret of the run: who could compute them again could take the noise out. Both are pure
functions (AES-256 in counter mode, keyed by the secret, the step and, of the noise, what it is added to), so a run that
resumes draws and adds the same as one that was never interrupted, and one that resumes with anything changed adds
other noise. The noise is rounded to float32 as PyTorch rounds: attacks on that rounding (arXiv 2112.05307) are not
defended against.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import json
import math
import os
import secrets
import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigtrain.config import (
    AccelerateConfig,
    ClassificationConfig,
    Config,
    InstructionConfig,
    StdlibDataConfig,
    TaggingConfig,
)
from bigtrain.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

SECRET = "privacy.key"  # in the run directory while the run is not finished
PACKAGES = ("opacus", "cryptography")
PRV_POINTS = 20  # in a run: the prv accountant takes a second or more for each
UNIFORM = 2.0**-53  # a float64 has so many bits


# ------------------------------------------------------------------------------------- what goes together


def check(config: Config) -> None:
    """Whether what the config asks for keeps the promise. Nothing where it asks for none. Raises ConfigError."""
    privacy, train, task = config.train.privacy, config.train, config.task
    at = "train.privacy"
    if privacy.noise_multiplier is not None and privacy.target_epsilon is not None:
        raise ConfigError(
            f"{at}.target_epsilon", privacy.target_epsilon, "the noise follows from it, or it from the noise",
            f"drop it or {at}.noise_multiplier",
        )  # fmt: skip
    if not privacy.enabled:
        return
    for name in ("noise_multiplier", "target_epsilon", "max_grad_norm"):
        value = getattr(privacy, name)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{at}.{name}", value, "must be above 0")
    if not 0 < privacy.delta < 1:
        raise ConfigError(f"{at}.delta", privacy.delta, "must be above 0 and below 1")
    for package in PACKAGES:
        if find_spec(package) is None:
            raise ConfigError(at, "on", f"needs the package {package}", "pip install 'bigtrain[private]'")
    if not isinstance(config.engine, AccelerateConfig):
        raise ConfigError("engine.kind", config.engine.kind, _WITH + "one engine's work", "take engine=accelerate")
    if config.launch.ranks != 1 or (config.launch.nodes or 1) != 1:
        name = "launch.ranks" if config.launch.ranks != 1 else "launch.nodes"
        value = getattr(config.launch, name.split(".")[1])
        raise ConfigError(name, value, _WITH + "one process's work", f"set {name}=1")
    if not isinstance(task, (ClassificationConfig, TaggingConfig, InstructionConfig)):
        raise ConfigError("task.kind", task.kind, _APART[task.kind], "take classification, tagging or instruction")
    compressing = next((name for name, value in vars(config.compress).items() if value is not None), None)
    for broken, name, value, problem, way_out in (
        (train.precision != "fp32", "train.precision", train.precision,
         "rounds the norms that gradients are clipped to", "take fp32"),
        (train.guard.spike in ("skip", "rollback"), "train.guard.spike", train.guard.spike,
         "would leave out updates for what the examples are, which no noise covers", "take off or warn"),
        (train.guard.replay_every > 0, "train.guard.replay_every", train.guard.replay_every,
         "a private step may have drawn no example to repeat", "set it to 0"),
        (train.activation_checkpointing, "train.activation_checkpointing", True,
         "runs a layer twice, and Opacus would count its gradient twice", "set it to false; lower train.micro_batch"),
        (train.compile, "train.compile", True, "compiles the layers that Opacus listens to", "set it to false"),
        (train.lora.dropout > 0, "train.lora.dropout", train.lora.dropout,
         "hides which inputs a gradient is of", "set it to 0"),
        (compressing is not None, f"compress.{compressing}", "on",
         "learns from the examples beside the noise", "set compress=[] and compress the finished model"),
        (getattr(task, "adversarial", "none") != "none", "task.adversarial", getattr(task, "adversarial", ""),
         "an example's gradient would be of two passes", "take none"),
        (getattr(config.model, "unpadded", False), "model.unpadded", True,
         "packs the texts of a batch into one", "set it to false"),
        (config.data.tokenizer.path is None and not isinstance(config.data, StdlibDataConfig),
         "data.tokenizer.path", None, "a tokenizer that is trained on the examples tells of them",
         "name one that is not: a Hugging Face directory or a run on public data"),
    ):  # fmt: skip
        if broken:
            raise ConfigError(name, value, f"{problem} ({at} is on)", way_out)


_WITH = "differential privacy (train.privacy) is "
_APART = {
    "causal_lm": "packs many documents into a sequence: no example stands for one person's data",
    "masked_lm": "packs many documents into a sequence: no example stands for one person's data",
    "question_answering": "makes several windows of one context: clipping each would not bound the whole",
    "translation": "shares one table among source, target and logits, of which Opacus has no gradient per example",
}


# ------------------------------------------------------------------------------------------------ the promise


@dataclass(frozen=True)
class Guarantee:
    """(epsilon, delta)-differential privacy of the weights, with respect to adding or removing one training example."""

    noise_multiplier: float  # deviation of the noise, in clipping norms
    max_grad_norm: float
    sampling_rate: float  # with which each example is drawn at each step
    delta: float
    accountant: str  # rdp (arXiv 1908.10530) or prv (arXiv 2106.02848)
    examples: int
    secret: bool  # whether nobody can know the noise

    def epsilon(self, steps: int) -> float:
        """What `steps` steps spend, all of them alike."""
        if steps == 0:
            return 0.0
        return _epsilon(self.accountant, self.noise_multiplier, self.sampling_rate, steps, self.delta)

    def facts(self, steps: int) -> dict[str, Any]:
        """What result.json says of it."""
        return {
            "privacy/epsilon": self.epsilon(steps),
            "privacy/delta": self.delta,
            "privacy/noise_multiplier": self.noise_multiplier,
            "privacy/max_grad_norm": self.max_grad_norm,
            "privacy/sampling_rate": self.sampling_rate,
            "privacy/sampling": "poisson",
            "privacy/steps": steps,
            "privacy/accountant": self.accountant,
            "privacy/unit": "one training example, added or removed",
            "privacy/noise": "secret" if self.secret else "known: follows from train.privacy.seed",
        }

    def line(self, steps: int) -> str:
        return (
            f"privacy: epsilon {self.epsilon(steps):.3g} at delta {self.delta:g} after {steps} steps (noise multiplier"
            f" {self.noise_multiplier:.4g}, clipping norm {self.max_grad_norm:g}, each of {self.examples:,} examples"
            f" drawn with probability {self.sampling_rate:.3g} a step; {self.accountant} accountant)"
            + ("" if self.secret else "; the noise follows from train.privacy.seed: who knows that can take it out")
        )


def guarantee(config: Config) -> Guarantee:
    """Of a config whose data are prepared; the noise for train.privacy.target_epsilon is found here.

    Raises ConfigError where these data and this batch cannot have one.
    """
    from bigtrain.data.examples import Examples, load_examples

    privacy, train = config.train.privacy, config.train
    data = load_examples(config.data.prepared_dir or "")
    examples = data.examples["train"]
    parts = examples - len(set(Examples(data, "train").records().tolist()))
    if parts:
        raise ConfigError(
            "model.max_seq_len", config.model.max_seq_len,
            f"{parts} texts are too long and were cut into several examples: clipping each would not bound the whole",
            "raise it, or shorten the texts",
        )  # fmt: skip
    if train.global_batch > examples:
        raise ConfigError(
            "train.global_batch", train.global_batch, f"more than the {examples} training examples: it is how many"
            " a step draws on average", f"take at most {examples}",
        )  # fmt: skip
    if privacy.delta * examples >= 1:
        raise ConfigError(
            "train.privacy.delta", privacy.delta, f"not below 1 / {examples} (of the training examples): it would"
            " allow giving one of them away whole", f"take {0.1 / examples:.0e}",
        )  # fmt: skip
    rate = train.global_batch / examples
    noise = privacy.noise_multiplier
    if noise is None:
        assert privacy.target_epsilon is not None
        noise = _noise_for(privacy.accountant, privacy.target_epsilon, rate, train.steps, privacy.delta)
    return Guarantee(
        noise, privacy.max_grad_norm, rate, privacy.delta, privacy.accountant, examples, privacy.seed is None
    )


@functools.cache
def _epsilon(accountant: str, noise: float, rate: float, steps: int, delta: float) -> float:
    from opacus.accountants import create_accountant

    ledger = create_accountant(accountant)
    ledger.history = [(noise, rate, steps)]
    with warnings.catch_warnings():  # where the best order is the largest that it tries: a bound all the same
        warnings.simplefilter("ignore")
        return float(ledger.get_epsilon(delta))


@functools.cache
def _noise_for(accountant: str, epsilon: float, rate: float, steps: int, delta: float) -> float:
    from opacus.accountants.utils import get_noise_multiplier

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return float(
                get_noise_multiplier(
                    target_epsilon=epsilon, target_delta=delta, sample_rate=rate, steps=steps, accountant=accountant,
                    epsilon_tolerance=min(0.01, epsilon / 100),
                )
            )  # fmt: skip
    except (ValueError, RuntimeError, FloatingPointError) as error:
        raise ConfigError(
            "train.privacy.target_epsilon", epsilon,
            f"no noise gives that after {steps} steps ({str(error).splitlines()[0]})", "raise it",
        ) from None  # fmt: skip


# ------------------------------------------------------------------------------------------ draws and noise


class Privacy:
    """What the parts of one private run share: the promise, the secret, and which step it is."""

    def __init__(self, guarantee: Guarantee, secret: bytes, steps: int) -> None:
        """steps: of the whole run."""
        self.guarantee, self.secret, self.steps = guarantee, secret, steps
        self.step = 0  # optimizer steps done; the trainer says so before each

    def draw(self, step: int) -> NDArray[np.int64]:
        """The numbers of the examples that optimizer step `step` (from 0) trains on: each is among them with
        probability `sampling_rate`, whatever the others are (Poisson sampling)."""
        import numpy as np

        stream = KeyStream(self._key(b"draw", step))
        bits = np.frombuffer(stream.take(8 * self.guarantee.examples), dtype="<u8")
        return np.flatnonzero((bits >> np.uint64(11)) * UNIFORM < self.guarantee.sampling_rate).astype(np.int64)

    def noise(self, sums: list[torch.Tensor]) -> list[torch.Tensor]:
        """Noise for this step's sums of clipped gradients, like them: deviation noise_multiplier * max_grad_norm."""
        digest = hashlib.sha256()
        for tensor in sums:
            digest.update(tensor.detach().cpu().contiguous().numpy().data)
        stream = KeyStream(self._key(b"noise", self.step, digest.digest()))
        deviation = self.guarantee.noise_multiplier * self.guarantee.max_grad_norm
        return [stream.normal(tensor).mul_(deviation).to(tensor.dtype) for tensor in sums]

    def metrics(self, step: int) -> dict[str, float]:
        """For metrics.jsonl; what is slow to compute not at every step."""
        every = max(1, self.steps // PRV_POINTS) if self.guarantee.accountant == "prv" else 1
        if step % every and step != self.steps:
            return {}
        return {"privacy/epsilon": self.guarantee.epsilon(step)}

    def _key(self, purpose: bytes, step: int, more: bytes = b"") -> bytes:
        return hmac.new(self.secret, purpose + step.to_bytes(8, "little") + more, hashlib.sha256).digest()


class KeyStream:
    """Bits that nobody without the key can tell from random ones: AES-256 in counter mode (NIST SP 800-38A)."""

    def __init__(self, key: bytes) -> None:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

        self._cipher = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()

    def take(self, count: int) -> bytes:
        return self._cipher.update(bytes(count))

    def normal(self, like: torch.Tensor) -> torch.Tensor:
        """float64, of the shape and on the device of `like`: standard normal numbers, two of each two uniform ones
        (Box & Muller 1958)."""
        import torch

        pairs = (like.numel() + 1) // 2
        bits = torch.frombuffer(bytearray(self.take(16 * pairs)), dtype=torch.int64).to(like.device)
        uniform = ((bits >> 11) & (2**53 - 1)).double().add_(0.5).mul_(UNIFORM)  # above 0, below 1
        radius, angle = uniform[:pairs].log_().mul_(-2).sqrt_(), uniform[pairs:].mul_(2 * math.pi)
        both = torch.cat((radius * angle.cos(), radius * angle.sin()))
        return both[: like.numel()].view(like.shape)


def begin(config: Config, run_dir: Path) -> Privacy | None:
    """What a run's process needs of it; None where train.privacy is off. Makes the run's secret if it has none."""
    if not config.train.privacy.enabled:
        return None
    return Privacy(guarantee(config), _secret(config, run_dir), config.train.steps)


def _secret(config: Config, run_dir: Path) -> bytes:
    if config.train.privacy.seed is not None:
        return hashlib.sha256(json.dumps(["train.privacy.seed", config.train.privacy.seed]).encode()).digest()
    path = run_dir / SECRET
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        found = path.read_bytes()
        if len(found) == 32:
            return found
        path.unlink()  # half-written by a process that was killed before its first step
        return _secret(config, run_dir)
    made = secrets.token_bytes(32)
    with os.fdopen(descriptor, "wb") as file:
        file.write(made)
        file.flush()
        os.fsync(descriptor)
    return made


def forget(run_dir: Path) -> None:
    """The run is finished: nobody needs to compute its noise again, and so nobody can."""
    (run_dir / SECRET).unlink(missing_ok=True)
