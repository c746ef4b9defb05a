"""The settings: a dataclass for each section of params.yaml, and checks of several keys together.

They stand apart from the code that they configure, so that checking them imports neither torch nor
another stage's wing. The sections `data`, `tokenizer` and `export` stand beside their code, which
imports neither: lm/prepare/sources.py, lm/data/tokenizer.py, lm/export/card.py.
"""

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from lm.base.errors import InputError
from lm.base.sections import (
    ABOVE_ZERO_UP_TO_ONE,
    BELOW_ONE,
    NOT_EMPTY,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    UP_TO_1024,
    UP_TO_ONE,
    Bound,
    Count,
    key_of,
)

Dtype = Literal["float32", "bfloat16", "float16"]
WindowOrder = Literal["random", "epochs", "documents"]


@dataclass(frozen=True, kw_only=True)
class DtypeKind:
    """All that depends on the choice of a dtype, except data sheets (lm/machine/gauges.py)."""

    size_bytes: int
    autocast: bool  # only matrix products are computed in it, all else in float32
    scaled: bool  # the loss is scaled up, or small gradients would become zero
    cpu_gains: bool  # faster on a CPU that has instructions for 16-bit products
    cuda_gains: float  # the lowest compute capability of a GPU that multiplies it natively


DTYPES: dict[Dtype, DtypeKind] = {
    "float32": DtypeKind(
        size_bytes=4, autocast=False, scaled=False, cpu_gains=False, cuda_gains=math.inf
    ),
    "bfloat16": DtypeKind(
        size_bytes=2, autocast=True, scaled=False, cpu_gains=True, cuda_gains=8.0
    ),
    "float16": DtypeKind(size_bytes=2, autocast=True, scaled=True, cpu_gains=False, cuda_gains=7.0),
}
MAX_SAMPLES = 1 << 16  # more than anyone reads
DEVICE = Bound(
    lambda x: re.fullmatch(r"auto|cpu|cuda(:\d+)?|mps", x) is not None,
    "must be one of auto, cpu, cuda, cuda:0, cuda:1, ..., mps",
)
SAMPLE_TOKENS = Bound(lambda x: 1 <= x <= 1 << 16, f"must be in [1, {1 << 16}]")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The section `model`, and the vocabulary size, which the tokenizer decides."""

    vocab_size: Count
    context_length: Annotated[Count, "tokens in a window: the model sees no more at once"]
    d_model: Annotated[Count, "width of the residual stream"]
    num_layers: Annotated[Count, "Transformer blocks"]
    num_heads: Annotated[Count, "attention heads; must divide d_model"]
    num_kv_heads: Annotated[
        Count | None,
        "heads for keys and values (grouped-query attention); must divide num_heads; "
        "null: num_heads",
    ]
    d_ff: Annotated[Count, "width of the feed-forward layer"]
    rope_theta: Annotated[float, POSITIVE, "base of the rotary positions"]
    norm_eps: Annotated[float, POSITIVE, "epsilon of RMSNorm"]
    dropout: Annotated[float, BELOW_ONE, "rate, on embeddings, attention and residual branches"]
    qk_norm: Annotated[bool, "RMSNorm on queries and keys"]
    tie_embeddings: Annotated[bool, "one matrix for embedding and head"]
    norm: Annotated[Literal["rmsnorm", "none"], "none: without norms, for ablations"]
    norm_position: Annotated[
        Literal["pre", "post"],
        "pre: norm before each layer; post: after the layer and its residual, for ablations",
    ]
    position_embedding: Annotated[Literal["rope", "none"], "none: no positions, for ablations"]
    ffn: Annotated[
        str,
        key_of("lm/model/activations.py", "ACTIVATIONS"),
        "activation of the feed-forward layer; silu: without a gate, for ablations",
    ]
    intra_document_masking: Annotated[
        bool, "attend only within a document, not across its end token"
    ]
    zero_init: Annotated[bool, "residual branches start at zero: each block begins as the identity"]

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
    """Return all divisors of a number, the smallest first."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def _in_words(found: list[int]) -> str:
    return ", ".join(map(str, found[:24])) + ", ..." * (len(found) > 24)


# of SCHEDULES in lm/train/schedule.py: settings import no code that they configure, see above
NEED_DECAY_STEPS = ("wsd",)


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The schedule's part of the section `train`."""

    schedule: Annotated[
        str,
        key_of("lm/train/schedule.py", "SCHEDULES"),
        "curve of the learning rates after a linear warm-up",
    ]
    max_steps: Annotated[Count, "steps, each one update of the weights"]
    warmup_steps: Annotated[int, NOT_NEGATIVE, "steps in which the rates rise to their peak"]
    decay_steps: Annotated[
        int, NOT_NEGATIVE, "wsd: steps of the linear decay at the end; others ignore it"
    ]
    min_lr_ratio: Annotated[
        float, UP_TO_ONE, "the last learning rate as a share of the peak; constant ignores it"
    ]

    def __post_init__(self) -> None:
        if self.warmup_steps > self.max_steps:
            raise InputError(
                f"train.warmup_steps = {self.warmup_steps} exceeds "
                f"train.max_steps = {self.max_steps}"
            )
        if self.schedule not in NEED_DECAY_STEPS:
            return
        if self.decay_steps == 0:
            raise InputError(f"train.decay_steps = 0: train.schedule = {self.schedule} needs >= 1")
        if self.warmup_steps + self.decay_steps > self.max_steps:
            raise InputError(
                f"train.warmup_steps + train.decay_steps = {self.warmup_steps + self.decay_steps} "
                f"exceeds train.max_steps = {self.max_steps}"
            )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer's part of the section `train`."""

    optimizer: Annotated[
        str,
        key_of("lm/train/optim.py", "OPTIMIZERS"),
        "muon: Muon for the matrices of the blocks, AdamW for the rest",
    ]
    lr: Annotated[float, POSITIVE, "peak learning rate of AdamW"]
    beta1: Annotated[float, BELOW_ONE, "decay rate of AdamW's first moment"]
    beta2: Annotated[float, BELOW_ONE, "decay rate of AdamW's second moment"]
    eps: Annotated[float, POSITIVE, "epsilon of AdamW"]
    weight_decay: Annotated[
        float,
        NOT_NEGATIVE,
        "decoupled weight decay of the blocks' matrices and the head, scaled by their learning "
        "rate (of Muon's matrices: muon_lr); never of norms",
    ]
    decay_embeddings: Annotated[bool, "decay the embedding too, and a head that is tied to it"]
    muon_lr: Annotated[float, POSITIVE, "peak learning rate of Muon"]
    muon_momentum: Annotated[float, BELOW_ONE, "momentum of Muon"]


@dataclass(frozen=True, kw_only=True)
class ParallelMode:
    """All that depends on train.parallel, except how gradients are added up (lm/train)."""

    several: bool  # several processes may train; blocks are compiled one by one
    sharded: bool  # each process keeps some rows of every parameter, and their optimizer state


PARALLEL = {
    "none": ParallelMode(several=False, sharded=False),
    "ddp": ParallelMode(several=True, sharded=False),
    "fsdp": ParallelMode(several=True, sharded=True),
}
BY_TREE = {"sum": False, "tree": True}  # train.reduction: are gradients added in a fixed order?


@dataclass(frozen=True, kw_only=True)
class TrainSection(ScheduleConfig, OptimizerConfig):
    """The section `train` as it is written: dtype and compile may be left to the plan."""

    init_from: Annotated[
        str | None,
        "start from the Llama or Qwen3 in `models/pretrained/NAME/` (docs/HUGGINGFACE.md); "
        "null: random weights",
    ]
    seed: Annotated[int, SEED, "seed of weights, batches and dropout"]
    num_threads: Annotated[
        Annotated[int, UP_TO_1024] | None,
        "CPU threads; with a number, machines with different numbers of cores agree; null: torch's "
        "choice, but one per process with ddp and fsdp (or `OMP_NUM_THREADS`)",
    ]
    batch_size: Annotated[Count, "windows per step"]
    micro_batch_size: Annotated[
        Count | None,
        "windows per forward and backward pass; must divide batch_size. Fewer windows need less "
        "memory; the result is the same up to rounding (dropout draws other masks). null: as many "
        "as fit into memory, at most 65,536 tokens; halved if memory runs out, except with ddp and "
        "fsdp, where the run stops and says what to set",
    ]
    parallel: Annotated[
        Literal["none", "ddp", "fsdp"],
        "how several processes train together (docs/SCALE.md): each holds the whole model (ddp) or "
        "a share of it (fsdp, not with float16); none: one process",
    ]
    reduction: Annotated[
        Literal["sum", "tree"],
        "how gradients are added up: tree gives the same bytes with 1, 2, 4, 8, ... processes; it "
        "needs `train.micro_batch_size`, and a `batch_size` that is 1, 2, 4, 8, ... times as large",
    ]
    max_grad_norm: Annotated[Annotated[float, POSITIVE] | None, "global L2 clipping; null: none"]
    on_nonfinite: Annotated[
        Literal["stop", "skip"],
        "what to do with a step whose loss or gradient norm is nan or infinite",
    ]
    max_skipped_steps: Annotated[
        Count,
        "with `skip`: stop after this number of skipped steps in a row; metrics/train.json counts "
        "all skipped steps",
    ]
    sampling: Annotated[
        WindowOrder,
        "random: windows from anywhere; epochs: windows side by side, each exactly once per epoch; "
        "documents: as epochs, but every document is cut from its start",
    ]
    dtype: Annotated[
        Literal["auto", Dtype],
        "dtype of matrix products; auto: bfloat16 if the device multiplies it natively (a GPU of "
        "compute capability 8 or more; a CPU with AMX or avx512_bf16 if model.d_model >= 128), "
        "else float32; float32 never uses a GPU's TF32; float16 scales the loss",
    ]
    compile: Annotated[
        Literal["auto", True, False],
        "`torch.compile`, which on a CPU needs a C++ compiler; auto: where the length of the run "
        "repays it",
    ]
    gradient_checkpointing: Annotated[bool, "compute activations again: less memory, more time"]
    eval_interval: Annotated[Count, "steps from one validation to the next"]
    eval_batches: Annotated[Count, "batches per validation, spread over the validation split"]
    early_stopping: Annotated[
        Count | None,
        "stop after this number of validations without a new best, and publish the best model; "
        "null: never",
    ]

    def __post_init__(self) -> None:
        super().__post_init__()
        name = self.init_from
        if name is not None and (name in ("", "..") or Path(name).name != name):
            raise InputError(
                f"train.init_from = {self.init_from}: must be a folder's name in "
                "models/pretrained/, which DVC watches; copy the folder there"
            )
        if self.batch_size % (self.micro_batch_size or self.batch_size):
            raise InputError(
                f"train.batch_size = {self.batch_size} is not a multiple of "
                f"train.micro_batch_size = {self.micro_batch_size}"
            )

    def tokens_per_step(self, model: ModelConfig) -> int:
        """Return the tokens of a batch, B T."""
        return self.batch_size * model.context_length

    @property
    def threads(self) -> int | None:
        """The number of a CPU's threads; None: torch's choice.

        With ddp and fsdp each process takes one thread unless a number is set. If it took a share
        of the cores, a run could not be resumed with another number of processes.
        """
        chosen = self.num_threads is not None or "OMP_NUM_THREADS" in os.environ
        return self.num_threads if chosen or not PARALLEL[self.parallel].several else 1


@dataclass(frozen=True, kw_only=True)
class TrainConfig(TrainSection):
    """The section `train` with dtype and compile decided: see `make_plan` in lm/plan/plan.py."""

    dtype: Annotated[Dtype, "of matrix products"]
    compile: Annotated[bool, "`torch.compile`"]


def share_of_batch(config: TrainSection, num_processes: int) -> int:
    """Return the windows of a step that each process computes: batch_size / num_processes.

    Raises InputError if the settings do not allow this number of processes.
    """
    batch_size, micro, mode = config.batch_size, config.micro_batch_size, PARALLEL[config.parallel]
    if num_processes > 1 and not mode.several:
        raise InputError(
            f"train.parallel = {config.parallel}, but there are {num_processes} processes; use ddp "
            "or fsdp, or runtime.num_processes: 1"
        )
    if mode.sharded and config.dtype != "auto" and DTYPES[config.dtype].scaled:
        raise InputError(
            f"train.parallel = {config.parallel} has no loss scaling, as needed by "
            f"train.dtype = {config.dtype}; use bfloat16"
        )
    if BY_TREE[config.reduction]:
        if micro is None:
            raise InputError(
                "train.reduction = tree needs train.micro_batch_size, since micro-batches are the "
                "leaves of the tree; set it to a number of windows that fits into memory"
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

    source: Annotated[
        Literal["packages", "grammar"],
        "the default text: source code of installed packages, or stories of known entropy "
        "(`make preset NAME=grammar`)",
    ]
    packages: Annotated[list[str], "packages: their names and versions, as name==version"]
    grammar_bytes: Annotated[Count, "grammar: bytes of stories; the last story may exceed it"]


@dataclass(frozen=True)
class EvaluateConfig:
    """The section `evaluate`."""

    batch_size: Annotated[Count, "windows computed at once; affects only memory and speed"]
    stride: Annotated[
        Count | None,
        "tokens by which the window slides, each scored once; null: context_length, so windows do "
        "not overlap",
    ]
    prompts: Annotated[list[str], NOT_EMPTY, "prompts of the samples"]
    max_new_tokens: Annotated[int, SAMPLE_TOKENS, "tokens to generate per sample"]
    temperatures: Annotated[
        list[Annotated[float, NOT_NEGATIVE]],
        NOT_EMPTY,
        "temperatures of the samples, each prompt at each; 0: always the most probable token; "
        "`metrics/summary.md` shows the first",
    ]
    top_k: Annotated[Count | None, "draw samples from this number of top tokens; null: from all"]
    top_p: Annotated[
        Annotated[float, ABOVE_ZERO_UP_TO_ONE] | None,
        "draw samples from the top tokens that together have this probability; null: from all",
    ]
    seed: Annotated[int, SEED, "seed of the samples"]

    def __post_init__(self) -> None:
        if (samples := len(self.prompts) * len(self.temperatures)) > MAX_SAMPLES:
            raise InputError(
                f"evaluate.prompts times evaluate.temperatures are {samples:,} samples: must be "
                f"<= {MAX_SAMPLES:,}"
            )


@dataclass(frozen=True)
class RuntimeConfig:
    """The section `runtime`: where to run and what to print and keep. No stage depends on it."""

    device: Annotated[
        str, DEVICE, "auto: CUDA, else MPS, else CPU; a GPU's number is for a single process"
    ]
    log_interval: Annotated[Count, "steps from one line on the console to the next"]
    checkpoint_interval: Annotated[Count, "steps from one checkpoint to the next"]
    keep_checkpoints: Annotated[
        int, Bound(lambda x: x >= 2, "must be >= 2"), "number kept of an unfinished run"
    ]
    num_workers: Annotated[
        Annotated[int, UP_TO_1024] | None, "processes that prepare data; null: one per core"
    ]
    num_processes: Annotated[
        Annotated[int, UP_TO_1024] | Literal["auto"],
        "processes that train, on this machine; auto: with ddp and fsdp one per GPU, else one; "
        "under `torchrun` its number counts",
    ]
    process_timeout_s: Annotated[
        Count,
        "seconds that processes wait for another before it counts as hung; with `num_processes` "
        "also the seconds to save after a signal",
    ]

    def __post_init__(self) -> None:
        if ":" in self.device and self.num_processes not in ("auto", 1):
            raise InputError(
                f"runtime.device = {self.device} is for one process, but runtime.num_processes = "
                f"{self.num_processes}; use cuda, each process takes a GPU of its own"
            )
