"""The contestants: training loops as generators, which take a step and yield its loss.

    CONTESTANTS[name](shape, file of token ids, device) -> Contest

Each function imports what it compares, so that a process holds only its own contestant.
"""

import importlib.util
import io
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent


class Shape(NamedTuple):
    """Sizes of a model and its batch."""

    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    d_ff: int
    context_length: int
    batch_size: int

    @property
    def tokens(self) -> int:
        """Return the tokens of one step."""
        return self.context_length * self.batch_size


SHAPES = {
    "XS": Shape(64, 32, 2, 2, 64, 16, 2),  # to try whether everything runs
    "S": Shape(256, 128, 2, 4, 256, 256, 4),
    "S10k": Shape(10_000, 128, 2, 4, 256, 256, 4),
    "M": Shape(65, 128, 4, 4, 344, 64, 12),
    "L": Shape(10_000, 512, 4, 16, 1344, 256, 8),
    "G": Shape(50_304, 768, 12, 12, 2048, 1024, 16),
    "long": Shape(256, 256, 8, 8, 688, 1024, 8),  # here activations are what fills the memory
}


@dataclass(frozen=True)
class Contest:
    """One contestant, ready for its first step."""

    parameters: int
    flops_per_token: float  # 6 for each weight that multiplies, 12 L C T for attention
    steps: Iterator[float]  # the loss of each


class Missing(Exception):
    """A contestant is not on this machine."""


# --- nanoGPT ------------------------------------------------------------------------------


@dataclass(frozen=True)
class NanoGPTSettings:
    """Settings of its train.py, under its names."""

    learning_rate: float = 1e-3
    min_lr: float = 1e-4
    warmup_iters: int = 100
    lr_decay_iters: int = 2000
    log_interval: int = 10  # as in config/train_gpt2.py
    beta2: float = 0.99
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    compile: bool = False
    dtype: str = "float32"
    seed: int = 1337


def nanogpt_file() -> Path:
    """Return its model.py, in the folder that the variable NANOGPT names. Raises Missing."""
    file = Path(os.environ.get("NANOGPT", "nanoGPT"), "model.py")
    if not file.is_file():
        raise Missing(f"{file} is missing; set NANOGPT to a clone of nanoGPT")
    return file


def nanogpt_module() -> ModuleType:
    """Import that file."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", nanogpt_file())
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["nanogpt_model"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def nanogpt_model(shape: Shape, device: torch.device, settings: NanoGPTSettings) -> Any:
    """Return its GPT without bias and dropout, made as its train.py does."""
    torch.manual_seed(settings.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    module = nanogpt_module()
    with redirect_stdout(io.StringIO()):
        return module.GPT(
            module.GPTConfig(
                block_size=shape.context_length,
                vocab_size=shape.vocab_size,
                n_layer=shape.num_layers,
                n_head=shape.num_heads,
                n_embd=shape.d_model,
                dropout=0.0,
                bias=False,
            )
        ).to(device)


def nanogpt_steps(
    model: Any, shape: Shape, file: Path, device: torch.device, settings: NanoGPTSettings
) -> Iterator[float]:
    """Run the loop of its train.py, on one device and without gradient accumulation."""
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    with redirect_stdout(io.StringIO()):
        optimizer = model.configure_optimizers(
            settings.weight_decay, settings.learning_rate, (0.9, settings.beta2), device.type
        )
    fast = torch.compile(model) if settings.compile else model
    half = torch.amp.autocast(device.type, dtype=torch.bfloat16)
    context = nullcontext() if settings.dtype == "float32" else half
    X, Y = nanogpt_batch(file, shape, device)
    step, logged = 0, math.nan
    while True:
        for group in optimizer.param_groups:
            group["lr"] = nanogpt_lr(step, settings)
        with context:
            _, loss = fast(X, Y)
        X, Y = nanogpt_batch(file, shape, device)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if step % settings.log_interval == 0:
            logged = loss.item()  # waits for a GPU
        yield logged
        step += 1


def nanogpt_batch(file: Path, shape: Shape, device: torch.device) -> tuple[Tensor, Tensor]:
    """Do as its get_batch: open the memmap anew each time."""
    data = np.memmap(file, dtype=np.uint16, mode="r")
    length = shape.context_length
    ix = torch.randint(len(data) - length, (shape.batch_size,))
    x, y = (
        torch.stack([torch.from_numpy(data[i + k : i + k + length].astype(np.int64)) for i in ix])
        for k in (0, 1)
    )
    if device.type == "cuda":
        x, y = (ids.pin_memory().to(device, non_blocking=True) for ids in (x, y))
    return x, y


def nanogpt_lr(step: int, settings: NanoGPTSettings) -> float:
    """Do as its get_lr: linear warm-up, cosine decay."""
    if step < settings.warmup_iters:
        return settings.learning_rate * (step + 1) / (settings.warmup_iters + 1)
    if step > settings.lr_decay_iters:
        return settings.min_lr
    ratio = (step - settings.warmup_iters) / (settings.lr_decay_iters - settings.warmup_iters)
    share = 0.5 * (1 + math.cos(math.pi * ratio))
    return settings.min_lr + share * (settings.learning_rate - settings.min_lr)


def nanogpt(shape: Shape, file: Path, device: torch.device, **settings: Any) -> Contest:
    chosen = NanoGPTSettings(lr_decay_iters=10**9, **settings)
    model = nanogpt_model(shape, device, chosen)
    steps = nanogpt_steps(model, shape, file, device, chosen)
    return Contest(model.get_num_params(False), _flops(model.get_num_params(), shape), steps)


# --- others -------------------------------------------------------------------------------


def llama(shape: Shape, file: Path, device: torch.device) -> Contest:
    """Train LlamaForCausalLM of transformers in a plain loop."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.d_model,
        intermediate_size=shape.d_ff,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        max_position_embeddings=shape.context_length,
        tie_word_embeddings=False,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    model: Any = LlamaForCausalLM(config)
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)

    def steps() -> Iterator[float]:
        while True:
            x, _ = nanogpt_batch(file, shape, device)
            loss = model(input_ids=x, labels=x).loss  # it moves the labels itself
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            yield loss.item()

    looked_up = model.model.embed_tokens.weight.numel()
    parameters = model.num_parameters()
    return Contest(parameters, _flops(parameters - looked_up, shape), steps())


def textbook(shape: Shape, file: Path, device: torch.device) -> Contest:
    """Train benchmarks/textbook.py in a loop of its kind."""
    from benchmarks.textbook import AdamW, Transformer, clip_gradients, cross_entropy

    torch.manual_seed(0)
    model = Transformer(*shape[:-1]).to(device)
    parameters = list(model.parameters())
    optimizer = AdamW(parameters, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)

    def steps() -> Iterator[float]:
        while True:
            x, y = nanogpt_batch(file, shape, device)
            optimizer.zero_grad()
            loss = cross_entropy(model(x), y)
            loss.backward()
            clip_gradients(parameters, 1.0)
            optimizer.step()
            yield loss.item()

    count = sum(p.numel() for p in parameters)
    looked_up = model.token_embeddings.weight.numel()
    return Contest(count, _flops(count - looked_up, shape), steps())


def products(shape: Shape) -> list[tuple[int, int, int, int]]:
    """Return the forward matrix products of a step: their number, (N, K) x (K, M) each.

    The backward pass has two for each: by the input and by the weight. Attention counts in full,
    as in flops_per_token; a loop that leaves out what the mask hides computes less.
    """
    _, C, _, H, F, T, B = shape
    one_block = [(1, B * T, C, 3 * C), (1, B * T, C, C), (1, B * T, C, 2 * F), (1, B * T, F, C)]
    attention = [(B * H, T, C // H, T), (B * H, T, T, C // H)]
    return [*(one_block + attention) * shape.num_layers, (1, B * T, C, shape.vocab_size)]


def floor(shape: Shape, file: Path, device: torch.device, dtype: torch.dtype) -> Contest:
    """Compute only the matrix products of a step, into memory that exists already."""

    def numbers(*size: int) -> Tensor:
        return torch.randn(size, dtype=dtype, device=device)

    operands = [(numbers(b, n, k), numbers(b, m, k)) for b, n, k, m in products(shape)]
    results: dict[tuple[int, ...], Tensor] = {}

    def multiply(left: Tensor, right: Tensor) -> None:
        size = left.shape[0], left.shape[1], right.shape[2]
        out = results.setdefault(size, torch.empty(0))
        if not len(out):
            out = results[size] = numbers(*size)
        if size[0] == 1:
            torch.mm(left[0], right[0], out=out[0])
        else:
            torch.bmm(left, right, out=out)

    gradients = {(b, n, m): numbers(b, n, m) for b, n, k, m in products(shape)}

    def steps() -> Iterator[float]:
        while True:
            for x, weight in operands:
                gradient = gradients[x.shape[0], x.shape[1], weight.shape[1]]
                multiply(x, weight.mT)
                multiply(gradient, weight)
                multiply(gradient.mT, x)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            yield math.nan

    flops = sum(3 * 2 * b * n * k * m for b, n, k, m in products(shape)) / shape.tokens
    return Contest(0, flops, steps())


def _flops(weights: int, shape: Shape) -> float:
    return 6.0 * weights + 12 * shape.num_layers * shape.d_model * shape.context_length


# --- ours ---------------------------------------------------------------------------------


def ours(shape: Shape, file: Path, device: torch.device, **train_settings: Any) -> Contest:
    """Yield the losses of `training`."""
    state, records = training(shape, file, device, **train_settings)
    steps = (record["train_loss"] for record in records)
    return Contest(state.model.num_parameters(), state.model.flops_per_token(), steps)


def training(
    shape: Shape,
    file: Path,
    device: torch.device,
    deterministic: bool = True,
    **train_settings: Any,
) -> tuple[Any, Iterator[dict[str, Any]]]:
    """Return the TrainState and lm.train.loop.train as stage train has them, if deterministic.

    `train_settings` replace those of params.yaml. With parallel = ddp or fsdp, join the processes
    that RANK and the other variables of a launcher name.
    """
    from lm.base.files import sha256_file
    from lm.base.params import load_params
    from lm.base.sections import read_section
    from lm.base.settings import TrainConfig
    from lm.data.splits import Split
    from lm.data.token_stream import TokenStream
    from lm.machine.device import prepare
    from lm.machine.processes import joined
    from lm.model.transformer import ModelConfig
    from lm.train.loop import train
    from lm.train.state import new_state

    model = dict(zip(Shape._fields[1:-1], shape[1:-1], strict=True))
    settings = train_settings | {"batch_size": shape.batch_size, "max_steps": 10**9}
    overrides = [f"model.{key}={value}" for key, value in model.items()]
    overrides += [f"train.{key}={str(value).lower()}" for key, value in settings.items()]
    params = load_params(ROOT / "params.yaml", overrides)
    config = read_section(TrainConfig, params, "train")
    prepare(device, config.num_threads)
    if not deterministic:
        torch.use_deterministic_algorithms(False)
        torch.backends.cuda.enable_cudnn_sdp(True)
    size = file.stat().st_size // 2
    entry = {"file": file.name, "tokens": size, "sha256": sha256_file(file)}
    tokens = TokenStream([file], [entry], np.dtype("<u2"), shape.vocab_size)
    split = Split("train", tokens, 0)
    model_config = read_section(ModelConfig, params, "model", vocab_size=shape.vocab_size)
    membership = ExitStack()
    processes = membership.enter_context(joined(config.parallel, device, timeout_s=600))
    state = new_state(model_config, config, device, processes)

    def records() -> Iterator[dict[str, Any]]:
        with membership:
            yield from train(state, split, config, pause=lambda step: False)

    return state, records()


OURS: dict[str, Callable[..., Contest]] = {
    "ours, float32": partial(ours, optimizer="adamw", dtype="float32", compile=False),
    "ours, float32, compiled": partial(ours, optimizer="adamw", dtype="float32", compile=True),
    "ours, bfloat16": partial(ours, optimizer="adamw", dtype="bfloat16", compile=False),
    "ours, bfloat16, compiled": partial(ours, optimizer="adamw", dtype="bfloat16", compile=True),
    "ours, bfloat16, compiled, Muon": partial(
        ours, optimizer="muon", dtype="bfloat16", compile=True
    ),
}
CHECKPOINTING = ", checkpointing"  # comes after a name of ours
PARALLEL = "ddp", "fsdp"  # as well; one process, unless a launcher sets more
CONTESTANTS: dict[str, Callable[..., Contest]] = {
    "nanoGPT": nanogpt,
    "nanoGPT, bfloat16": partial(nanogpt, dtype="bfloat16"),
    "nanoGPT, compiled": partial(nanogpt, compile=True),
    "nanoGPT, bfloat16, compiled": partial(nanogpt, dtype="bfloat16", compile=True),
    "Hugging Face Llama": llama,
    "by the book": textbook,
    **OURS,
    **{name + CHECKPOINTING: partial(it, gradient_checkpointing=True) for name, it in OURS.items()},
    **{
        f"{name}, {way}": partial(it, parallel=way) for name, it in OURS.items() for way in PARALLEL
    },
    "floor, float32": partial(floor, dtype=torch.float32),
    "floor, bfloat16": partial(floor, dtype=torch.bfloat16),
}
