"""Measure the fitted constants of lm.plan.footprint again; compare planned and measured peaks.

    python -m benchmarks.plan [--cases NAME ...]

Each row is a training of three steps on a CPU, one thread per process. The plan is linear in each
constant, so the peak gives the value of a constant that would make this row exact.
"""

import argparse
import os
import subprocess
import sys
from typing import Any, NamedTuple

import numpy as np
import torch

from lm.base.errors import one_line_errors
from lm.base.params import load_params
from lm.base.sections import read_section
from lm.base.settings import ModelConfig, TrainConfig
from lm.data.splits import Split
from lm.machine.device import describe, prepare
from lm.machine.gauges import peak_memory_bytes
from lm.machine.processes import joined
from lm.plan import footprint
from lm.plan.plan import Plan, make_plan
from lm.train.loop import train
from lm.train.state import new_state
from stages import ROOT

CPU = torch.device("cpu")
TINY = {"context_length": 64, "d_model": 32, "num_layers": 2, "num_heads": 2, "d_ff": 64}


class Case(NamedTuple):
    """A training, and the constant that its peak determines."""

    constant: str
    vocab_size: int
    model: dict[str, Any]
    train: dict[str, Any]
    processes: int = 1


CASES = {
    "tiny": Case("KERNEL_BYTES", 512, TINY, {}),
    "tiny, checkpointing": Case(
        "IMPORTED_COMPILER_BYTES", 512, TINY, {"gradient_checkpointing": True}
    ),
    "tiny, compiled": Case("COMPILER_BYTES", 512, TINY, {"compile": True}),
    "default": Case("HEAP", 2048, {}, {}),
    "large vocabulary": Case("HEAP", 10_000, {"d_model": 256}, {"optimizer": "adamw"}),
    "bfloat16": Case("HEAP", 2048, {"d_model": 256}, {"dtype": "bfloat16"}),
    "checkpointing": Case("HOLES", 512, {"num_layers": 12}, {"gradient_checkpointing": True}),
    "wide, checkpointing": Case(
        "HOLES", 512, {"num_layers": 8, "d_model": 256}, {"gradient_checkpointing": True}
    ),
    "fsdp": Case("GATHERED_HOLES", 2048, {"d_model": 512, "d_ff": 1376}, {"parallel": "fsdp"}, 2),
    "fsdp, long": Case(
        "GATHERED_HOLES", 512, {"d_model": 256, "context_length": 512}, {"parallel": "fsdp"}, 2
    ),
}


def measure(case: Case) -> tuple[Plan, int]:
    """Train in this process; return its plan and its peak in bytes."""
    params = load_params(ROOT / "presets" / "default.yaml")
    short: dict[str, Any] = {"max_steps": 3, "warmup_steps": 0, "compile": False, "num_threads": 1}
    short["dtype"] = "float32"
    params["model"] |= case.model
    params["train"] |= short | case.train
    config = read_section(TrainConfig, params, "train")
    model = read_section(ModelConfig, params, "model", vocab_size=case.vocab_size)
    ids = np.random.default_rng(0).integers(case.vocab_size, size=9999, dtype=np.uint32)
    with joined(config.parallel, CPU, timeout_s=600) as processes:
        prepare(CPU, config.threads)
        plan = make_plan(model, config, CPU, processes.size)
        state = new_state(model, plan.config, CPU, processes)
        for _ in train(state, Split("train", ids, 0), plan.config):
            pass
        return plan, peak_memory_bytes(CPU)


def fitted(constant: str, plan: Plan, peak_bytes: int) -> float:
    """Return the value of a constant with which the plan would equal the peak."""
    known = getattr(footprint, constant)
    setattr(footprint, constant, known + 1)
    slope = sum(plan.memory.values())
    setattr(footprint, constant, known)
    planned = sum(plan.memory.values())
    return known + (peak_bytes - planned) / (slope - planned)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", default=[*CASES], choices=CASES, metavar="NAME")
    parser.add_argument("--here", action="store_true", help="in this process: the only case")
    options = parser.parse_args()
    with one_line_errors():
        if options.here:
            row(options.cases[0])
            return
        print(f"{describe(CPU)}, torch {torch.__version__}\n")
        print("| case | constant | now | by this row | planned MB | measured MB |")
        print("|---|---|--:|--:|--:|--:|", flush=True)
        for name in options.cases:
            launcher = ["torch.distributed.run", f"--nproc-per-node={CASES[name].processes}", "-m"]
            several = launcher if CASES[name].processes > 1 else []
            command = [sys.executable, "-m", *several, "benchmarks.plan", "--here", "--cases", name]
            subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def row(name: str) -> None:
    """Print the row of a case, by the first of its processes."""
    case = CASES[name]
    plan, peak = measure(case)
    now, then = getattr(footprint, case.constant), fitted(case.constant, plan, peak)
    shown = [f"{v / 1e6:.0f} MB" if now > 1e3 else f"{v:.2f}" for v in (now, then)]
    planned = sum(plan.memory.values())
    if os.environ.get("RANK", "0") == "0":
        print(
            f"| {name} | {case.constant} | {' | '.join(shown)} "
            f"| {planned / 1e6:,.0f} | {peak / 1e6:,.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
