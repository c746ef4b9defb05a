"""The sections `model`, `train` and `evaluate` of params.yaml: what they hold, what goes together.

Apart from the code that they configure, which needs torch: the stages that prepare data check them
without waiting for it.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from lm.base.config import (
    ABOVE_ZERO_UP_TO_ONE,
    BELOW_ONE,
    NOT_EMPTY,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    UP_TO_ONE,
    Bound,
    Count,
    key_of,
)
from lm.base.errors import InputError

Dtype = Literal["float32", "bfloat16", "float16"]
Sampling = Literal["random", "epochs", "documents"]
MAX_SAMPLES = 1 << 16  # to be read
SAMPLE_TOKENS = Bound(lambda x: 1 <= x <= 1 << 16, f"must be in [1, {1 << 16}]")  # to be read
THREADS = Bound(lambda x: 1 <= x <= 1024, "must be in [1, 1024]")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The section `model`, and the vocabulary size, which the tokenizer decides."""

    vocab_size: Count
    context_length: Count
    d_model: Count
    num_layers: Count
    num_heads: Count
    num_kv_heads: Count | None  # null: as many as num_heads
    d_ff: Count
    rope_theta: Annotated[float, POSITIVE]
    norm_eps: Annotated[float, POSITIVE]
    dropout: Annotated[float, BELOW_ONE]
    qk_norm: bool
    tie_embeddings: bool
    norm: Literal["rmsnorm", "none"]
    norm_position: Literal["pre", "post"]
    position_embedding: Literal["rope", "none"]
    ffn: Annotated[str, key_of("lm/model/activations.py", "ACTIVATIONS")]
    intra_document_masking: bool
    zero_init: bool  # of what each residual branch ends with

    def __post_init__(self) -> None:
        if self.d_model % self.num_heads:
            raise InputError(
                f"model.d_model = {self.d_model} is not divisible by "
                f"model.num_heads = {self.num_heads}; use {_in_words(divisors(self.d_model))}"
            )
        if self.num_heads % self.kv_heads:
            raise InputError(
                f"model.num_heads = {self.num_heads} is not a multiple of "
                f"model.num_kv_heads = {self.kv_heads}; use {_in_words(divisors(self.num_heads))}"
            )
        if self.position_embedding == "rope" and self.head_dim % 2:
            raise InputError(
                f"model.d_model / model.num_heads = {self.head_dim}: rotary positions need an even "
                "head dimension; change model.num_heads or set model.position_embedding: none"
            )

    @property
    def head_dim(self) -> int:
        """Features per attention head, D."""
        return self.d_model // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values, G."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads


def divisors(number: int) -> list[int]:
    """All divisors of a number, the smallest first."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def _in_words(found: list[int]) -> str:
    return ", ".join(map(str, found[:24])) + ", ..." * (len(found) > 24)


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The schedule's part of the section `train`."""

    schedule: Literal["cosine", "wsd", "constant"]
    max_steps: Count
    warmup_steps: Annotated[int, NOT_NEGATIVE]
    decay_steps: Annotated[int, NOT_NEGATIVE]  # of "wsd": the linear decay at the end
    min_lr_ratio: Annotated[float, UP_TO_ONE]  # of the peak rate

    def __post_init__(self) -> None:
        if self.warmup_steps > self.max_steps:
            raise InputError(
                f"train.warmup_steps = {self.warmup_steps} exceeds "
                f"train.max_steps = {self.max_steps}"
            )
        if self.schedule == "wsd" and self.decay_steps == 0:
            raise InputError("train.decay_steps = 0: train.schedule = wsd needs >= 1")
        if self.schedule == "wsd" and self.warmup_steps + self.decay_steps > self.max_steps:
            raise InputError(
                f"train.warmup_steps + train.decay_steps = {self.warmup_steps + self.decay_steps} "
                f"exceeds train.max_steps = {self.max_steps}"
            )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer's part of the section `train`."""

    optimizer: Literal["adamw", "muon"]
    lr: Annotated[float, POSITIVE]  # at its peak; the schedule scales it
    beta1: Annotated[float, BELOW_ONE]
    beta2: Annotated[float, BELOW_ONE]
    eps: Annotated[float, POSITIVE]
    weight_decay: Annotated[float, NOT_NEGATIVE]
    decay_embeddings: bool
    muon_lr: Annotated[float, POSITIVE]  # of the matrices when optimizer is "muon"
    muon_momentum: Annotated[float, BELOW_ONE]


@dataclass(frozen=True, kw_only=True)
class TrainConfig(ScheduleConfig, OptimizerConfig):
    """The section `train`."""

    init_from: str | None  # a name in models/pretrained/; null: random weights
    seed: Annotated[int, SEED]
    num_threads: (
        Annotated[int, THREADS] | None
    )  # of a CPU; null: as many as torch takes, often one a core
    batch_size: Count  # windows per update
    micro_batch_size: Count | None  # windows per backward pass; null: as many as fit
    parallel: Literal["none", "ddp", "fsdp"]  # how several processes share the work
    reduction: Literal["sum", "tree"]  # of gradients: in any order, or always in the same one
    max_grad_norm: Annotated[float, POSITIVE] | None
    on_nonfinite: Literal["stop", "skip"]  # a step whose loss or gradient norm is nan or infinite
    max_skipped_steps: Count  # in a row, before "skip" stops too
    sampling: Sampling
    dtype: Dtype
    compile: Literal["auto", True, False]  # auto: lm.plan.plan decides, before training
    gradient_checkpointing: bool
    eval_interval: Count  # steps between two validations
    eval_batches: Count  # batches of a validation, spread over the split
    early_stopping: Count | None  # validations without a new best before stopping

    def __post_init__(self) -> None:
        super().__post_init__()
        name = self.init_from
        if name is not None and (name in ("", "..") or Path(name).name != name):
            raise InputError(
                f"train.init_from = {self.init_from}: must be a folder's name in "
                "models/pretrained/, which DVC watches; copy the folder there"
            )
        if self.batch_size % self.windows_at_once:
            raise InputError(
                f"train.batch_size = {self.batch_size} is not a multiple of "
                f"train.micro_batch_size = {self.micro_batch_size}"
            )

    @property
    def threads(self) -> int | None:
        """Of a CPU; None: torch's choice.

        Of several processes each takes one unless told otherwise: were it a share of the cores, a
        run could not go on with another number of processes in the same environment.
        """
        chosen = self.num_threads is not None or "OMP_NUM_THREADS" in os.environ
        return self.num_threads if chosen or self.parallel == "none" else 1

    @property
    def windows_at_once(self) -> int:
        """Windows per backward pass, where memory does not decide: see TrainState."""
        return self.batch_size if self.micro_batch_size is None else self.micro_batch_size


def share_of_batch(config: TrainConfig, num_processes: int) -> int:
    """Windows of an update that each process computes: batch_size / num_processes.

    Raises InputError where these settings and so many processes do not go together.
    """
    batch_size, micro = config.batch_size, config.micro_batch_size
    if config.parallel == "none" and num_processes > 1:
        raise InputError(
            f"train.parallel = none, but there are {num_processes} processes; use ddp or fsdp, or "
            "runtime.num_processes: 1"
        )
    if config.parallel == "fsdp" and config.dtype == "float16":
        raise InputError(
            "train.parallel = fsdp does not scale the loss of train.dtype = float16; use bfloat16"
        )
    if config.reduction == "tree":
        if micro is None:
            raise InputError(
                "train.reduction = tree needs train.micro_batch_size, the leaves of the tree; "
                "set it to a number of windows that fits"
            )
        leaves, rest = divmod(batch_size, micro)
        if rest or leaves & (leaves - 1):
            raise InputError(
                f"train.reduction = tree: train.batch_size = {batch_size} is not 1, 2, 4, 8, ... "
                f"times train.micro_batch_size = {micro}; use powers of two"
            )
    if batch_size % (num_processes * (micro or 1)):
        each = "" if micro is None else f"train.micro_batch_size = {micro} times "
        raise InputError(
            f"train.batch_size = {batch_size} is not a multiple of {each}{num_processes} processes"
        )
    return batch_size // num_processes


@dataclass(frozen=True)
class CorpusConfig:
    """The section `corpus`: the default text, which stage corpus writes into data/raw."""

    source: Literal["packages", "grammar"]
    packages: list[str]  # as name==version
    grammar_bytes: Count  # of stories


@dataclass(frozen=True)
class EvaluateConfig:
    """The section `evaluate`."""

    batch_size: Count  # windows at a time; changes memory and speed alone
    stride: Count | None  # tokens a window advances; null: context_length, no overlap
    prompts: Annotated[list[str], NOT_EMPTY]  # of the samples
    max_new_tokens: Annotated[int, SAMPLE_TOKENS]  # of a sample
    temperatures: Annotated[list[Annotated[float, NOT_NEGATIVE]], NOT_EMPTY]  # the first: summary
    top_k: Count | None
    top_p: Annotated[float, ABOVE_ZERO_UP_TO_ONE] | None
    seed: Annotated[int, SEED]

    def __post_init__(self) -> None:
        if (samples := len(self.prompts) * len(self.temperatures)) > MAX_SAMPLES:
            raise InputError(
                f"evaluate.prompts times evaluate.temperatures are {samples:,} samples: must be "
                f"<= {MAX_SAMPLES:,}"
            )
