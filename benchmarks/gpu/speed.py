"""Measure speed and memory: products, training beside nanoGPT, a preset, decoding."""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.contestants import SHAPES, Missing, Shape, nanogpt_file
from benchmarks.gpu.runs import Note, settings, split_of, train_as_the_stage_does
from benchmarks.worker import Failed, Worker, token_file
from lm.base.settings import Dtype
from lm.generate.stream import generate
from lm.machine.device import describe, environment, prepare
from lm.machine.gauges import (
    data_sheet_flops_per_second,
    free_memory_bytes,
    matmul_flops_per_second,
    peak_memory_bytes,
)
from lm.model.transformer import TransformerLM
from lm.model.validation import evaluate

STORIES = SHAPES["L"]._replace(batch_size=64)  # presets/tinystories-17m.yaml
STORY_TOKENS = 327_680_000
COMPILED = "ours, bfloat16, compiled"
NANOGPT = "nanoGPT, bfloat16, compiled"
DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16")
Contestants = dict[str, tuple[str, dict[str, Any]]]  # by label: a contestant, our settings
BESIDE_NANOGPT: Contestants = {
    "nanoGPT": (NANOGPT, {}),
    "ours": (COMPILED, {}),
    "ours, not deterministic": (COMPILED, {"deterministic": False}),
}
WAYS: Contestants = {
    "ours, not compiled": ("ours, bfloat16", {}),
    "ours, Muon": (COMPILED, {"optimizer": "muon"}),
    "ours, ddp": (COMPILED, {"parallel": "ddp"}),
    "ours, fsdp": (COMPILED, {"parallel": "fsdp"}),
}


def seconds_of(device: torch.device, action: Callable[[], Any], repeat: int = 10) -> float:
    """Return the median seconds of an action on the device, after two that do not count."""
    synchronise = torch.get_device_module(device).synchronize
    taken = []
    for _ in range(2 + repeat):
        synchronise()
        start = time.perf_counter()
        action()
        synchronise()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[2:])


# --- machine ------------------------------------------------------------------------------


def machine(device: torch.device, tiny: bool, note: Note) -> None:
    """Note the versions, and the rates of products and of copying."""
    note(describe(device), **environment(device, True), torch_cuda=torch.version.cuda or "none")
    n, repeat = (256, 1) if tiny else (8192, 10)
    for dtype, precision in product((torch.bfloat16, torch.float32), ("highest", "high")):
        torch.set_float32_matmul_precision(precision)  # high: TF32 on a GPU
        a = torch.randn(n, n, device=device, dtype=dtype)
        s = seconds_of(device, partial(torch.matmul, a, a), repeat)
        note(f"{n}^3 {dtype}, precision {precision}", tflops=2 * n**3 / s / 1e12)
    torch.set_float32_matmul_precision("highest")
    rows, width = (64, 32) if tiny else (2048, 768)
    for columns in (50_304, 50_257):  # padded to whole tiles, and as GPT-2 has them
        sizes = (rows, width), (columns, width), (rows, columns)
        x, w, e = (torch.randn(size, device=device, dtype=torch.bfloat16) for size in sizes)
        for what, left, right in (("x w^T", x, w.t()), ("e w", e, w), ("e^T x", e.t(), x)):
            s = seconds_of(device, partial(torch.matmul, left, right), repeat)
            tflops = 2 * rows * columns * width / s / 1e12
            note(f"head of {columns}, {what}", tflops=tflops, ms=s * 1e3)
    big = torch.empty((1 << 20) if tiny else (1 << 30), dtype=torch.uint8, device=device)
    other = torch.empty_like(big)
    note("copy", gb_per_s=2 * big.nbytes / seconds_of(device, lambda: other.copy_(big)) / 1e9)


# --- training beside nanoGPT --------------------------------------------------------------


def beside_nanogpt(device: torch.device, tiny: bool, note: Note) -> None:
    """Train the shape of GPT-2."""
    race(SHAPES["G"], BESIDE_NANOGPT, device, tiny, note)


def stories(device: torch.device, tiny: bool, note: Note) -> None:
    """Train 17M parameters; note how long all tokens of TinyStories would take."""
    few = {label: BESIDE_NANOGPT[label] for label in ("nanoGPT", "ours")}
    race(STORIES, few, device, tiny, note, in_all=STORY_TOKENS)


def ways(device: torch.device, tiny: bool, note: Note) -> None:
    """Train the shape of GPT-2 in other ways; ddp and fsdp of one process."""
    race(SHAPES["G"], WAYS, device, tiny, note)


def race(
    shape: Shape,
    contestants: Contestants,
    device: torch.device,
    tiny: bool,
    note: Note,
    in_all: int | None = None,
) -> None:
    """Compile all at once, measure in turns, profile; note the minutes for `in_all` tokens."""
    shape, rounds, slice_s = (SHAPES["XS"], 1, 0.1) if tiny else (shape, 3, 2.5)
    threads = {"TORCHINDUCTOR_COMPILE_THREADS": "4"}
    if tiny:
        threads["OMP_NUM_THREADS"] = "1"
    taken: dict[str, list[float]] = {}
    said: dict[str, dict[str, Any]] = {}
    with token_file(shape.vocab_size) as file, ExitStack() as stack:
        workers: dict[str, Worker] = {}
        start = time.perf_counter()
        for label, (name, changes) in contestants.items():
            if name == NANOGPT:
                try:
                    nanogpt_file()
                except Missing as missing:
                    note(label, left_out=str(missing))
                    continue
            name = name.replace(", compiled", "") if tiny else name
            worker = Worker(name, shape, file, device.type, environment=threads, **changes)
            workers[label] = stack.enter_context(worker)
            worker.spawn()

        def answer(worker: Worker) -> dict[str, Any]:
            return worker.answer() | {"first_s": time.perf_counter() - start}

        with ThreadPoolExecutor() as pool:  # a slow compilation delays no other's clock
            answers = {label: pool.submit(answer, worker) for label, worker in workers.items()}
        for label, answered in answers.items():
            try:
                said[label] = answered.result()
            except Failed as failure:
                print(workers[label].log, file=sys.stderr)
                note(label, failed=str(failure)[-300:])
        for _ in range(rounds):
            for label in said:
                steps, seconds = workers[label].slice(slice_s)
                taken.setdefault(label, []).append(seconds / steps)
        for label in said:
            said[label] |= workers[label].memory() | workers[label].ask(profile=3)
    peak = data_sheet_flops_per_second(device, "bfloat16")
    peak = peak or matmul_flops_per_second(device, "bfloat16")
    for label, its in said.items():
        step_s = statistics.median(taken[label])
        speed = shape.tokens / step_s
        all_s = its["first_s"] + (in_all or 0) / speed
        note(
            label,
            ms=step_s * 1e3,
            slowest_round_ms=max(taken[label]) * 1e3,
            tokens_per_s=speed,
            first_s=its["first_s"],
            **({"minutes": all_s / 60} if in_all else {}),
            mfu=speed * its["flops_per_token"] / peak,
            peak_gb=its["peak_bytes"] / 1e9,
            batch=shape.batch_size,
            parameters=its["parameters"],
            **(its["a_step"] | {"idle_ms": step_s * 1e3 - its["a_step"]["busy_ms"]}),
            longest=its["longest"],
        )


def profiled(steps: Iterator[float], device: torch.device, count: int) -> dict[str, Any]:
    """Profile some steps; return what a step launches and waits for, and its longest kernels.

    On a CPU the kernels are torch's operators, and nothing is launched or waited for.
    """
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.type == "cuda"
    watched = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=watched) as prof:
        for _ in range(count):
            next(steps)
        torch.get_device_module(device).synchronize()
    events: list[Any] = list(prof.key_averages())
    calls = [event for event in events if event.key.startswith("cu")]
    calls = [event for event in calls if event.key != "cudaDeviceSynchronize"]  # the one above
    kernels = [e for e in events if str(e.device_type).endswith("CUDA") == on_gpu]
    kernels = [e for e in kernels if not e.is_user_annotation]  # which spans kernels of its own
    by = "self_device_time_total" if on_gpu else "self_cpu_time_total"  # in microseconds
    kernels.sort(key=lambda event: -getattr(event, by))

    def a_step(events: list[Any], what: str, word: str = "") -> float:
        return sum(getattr(event, what) for event in events if word in event.key) / count

    return {
        "a_step": {
            "busy_ms": a_step(kernels, by) / 1e3,
            "kernels": a_step(kernels, "count"),
            "launches": a_step(calls, "count", "Launch"),
            "waits": a_step(calls, "count", "Synchronize"),
            "waiting_ms": a_step(calls, "self_cpu_time_total", "Synchronize") / 1e3,
        },
        "longest": {event.key[:90]: getattr(event, by) / count / 1e3 for event in kernels[:10]},
    }


# --- a preset and decoding ----------------------------------------------------------------


def preset(device: torch.device, tiny: bool, note: Note) -> None:
    """Train presets/gpt2-124m.yaml as a user does: plan, steps, a validation, two saves."""
    steps, vocab_size, count = 6, 50_257, 4_000_000
    changes: dict[str, Any] = {"train.eval_interval": 4, "runtime.checkpoint_interval": 4}
    if tiny:
        vocab_size, count = 300, 50_000
        sizes = {"d_model": 48, "num_layers": 2, "d_ff": 64, "context_length": 32}
        changes |= {f"model.{key}": value for key, value in sizes.items()}
        changes |= {"train.batch_size": 8, "train.num_threads": 1, "train.compile": False}
    chosen = settings(changes, vocab_size, "gpt2-124m")
    prepare(device, chosen[1].num_threads)
    free = free_memory_bytes(device) or 0
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        run, plan = train_as_the_stage_does(
            chosen, device, Path(folder), stop_after=steps, split=split_of(chosen[0], count)
        )
    elapsed_s = time.perf_counter() - start
    measured = run.pace.measured(run.state, plan.config)
    planned, peak = sum(plan.memory.values()), measured["peak_memory_bytes"]
    note(
        "gpt2-124m",
        free_gb=free / 1e9,
        planned_gb=planned / 1e9,
        peak_gb=peak / 1e9,
        peak_of_plan=peak / planned,
        first_step_s=run.records[0]["step_s"],
        whole_s=elapsed_s,
        steps=len(run.records),
        micro_batch_planned=plan.micro_batch_size,
        micro_batch=measured["micro_batch_size"],
        tokens_per_s=measured["tokens_per_second"],
        mfu=measured["mfu"],
        compiled=measured["compiled"],
    )


def exhaust(begin: Callable[[], Iterator[Any]]) -> None:
    """Take all that an iterator gives."""
    for _ in begin():
        pass


def decode(device: torch.device, tiny: bool, note: Note) -> None:
    """Generate with, and evaluate, a model of the shape of GPT-2."""
    shape = SHAPES["XS"] if tiny else SHAPES["G"]
    names = Shape._fields[1:-1]
    changes = {f"model.{name}": value for name, value in zip(names, shape[1:-1], strict=True)}
    config, _, _ = settings(changes | {"train.dtype": "float32"}, shape.vocab_size)
    torch.manual_seed(0)
    model = TransformerLM(config).to(device).eval()
    count, some, many = (8, 2, 4) if tiny else (96, 16, 64)
    asked = (1, 0.0), (1, 0.8), (some, 0.0), (many, 0.0)  # rows, temperature
    for dtype, (rows, temperature) in product(DTYPES, asked):
        prompts = [[1 + row % 50] * 8 for row in range(rows)]
        begin = partial(generate, model, prompts, count, temperature=temperature, dtype=dtype)
        s = seconds_of(device, partial(exhaust, begin), 1 if tiny else 3)
        name = f"{dtype}, batch {rows}, temperature {temperature:g}"
        note(name, tokens_per_s=rows * count / s, ms_a_token=s / count * 1e3)
    split, windows = split_of(config, 2_000 if tiny else 200_000), 2 if tiny else 16
    for dtype in DTYPES:
        read = partial(evaluate, model, split, windows, max_batches=8, dtype=dtype)
        speed = float(read().counts.sum()) / seconds_of(device, read, 1)
        peak_gb = peak_memory_bytes(device) / 1e9
        note(f"evaluate, {dtype}", tokens_per_s=speed, peak_gb_so_far=peak_gb)
