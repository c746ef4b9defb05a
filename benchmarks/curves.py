"""Time what logging costs a step of the default run: curves, metrics, times.

    python -m benchmarks.curves

The curves have their greatest length, MAX_ROWS - 1 rows, so each refresh writes the most.
"""

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from lm.base.params import load_params
from lm.base.sections import read_section
from lm.base.settings import RuntimeConfig, TrainConfig
from lm.data.splits import Split
from lm.machine.device import describe, make_deterministic
from lm.model.transformer import ModelConfig
from lm.runs.history import COLUMNS, MAX_ROWS
from lm.runs.run import REFRESH_S, Run
from lm.train.loop import train
from lm.train.state import new_state

STEPS = 100
MADE_OF: dict[str, dict[str, str]] = {"inputs": {}, "code": {}, "environment": {}}


def main() -> None:
    params = load_params(Path("params.yaml"), ["train.dtype=float32", "train.compile=false"])
    config = read_section(TrainConfig, params, "train")
    runtime = read_section(RuntimeConfig, params, "runtime")
    vocab_size = params["tokenizer"]["vocab_size"]
    model_config = read_section(ModelConfig, params, "model", vocab_size=vocab_size)
    device = torch.device("cpu")
    make_deterministic(device, config.num_threads)
    state = new_state(model_config, config, device)
    ids = np.random.default_rng(0).integers(vocab_size, size=1_000_000).astype(np.uint16)
    steps: list[float] = []
    logs: list[float] = []  # without a refresh
    refreshes: list[float] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with Run(state, config, runtime, MADE_OF, folder / "runs", live=folder / "live") as run:
            run.logbook.history.rows = [
                dict.fromkeys(COLUMNS, 1.0) | {"step": -n} for n in range(1, MAX_ROWS - STEPS)
            ]
            for record in train(state, Split("train", ids, 0), config):
                refreshed_s, start = run.refreshed_s, time.perf_counter()
                run.log(record)
                took_s = time.perf_counter() - start
                steps.append(record["step_s"])
                (logs if run.refreshed_s == refreshed_s else refreshes).append(took_s)
                if state.step == STEPS:
                    break
    step_s, log_s, refresh_s = map(statistics.median, (steps[5:], logs, refreshes))
    share = log_s / step_s + refresh_s / REFRESH_S
    total = (sum(logs) + sum(refreshes)) / sum(steps)
    print(f"{state.model.num_parameters():,} parameters, {describe(device)}, {STEPS} steps\n")
    print("| | median |\n|---|---:|")
    print(f"| a training step | {step_s * 1e3:,.1f} ms |")
    print(f"| logging it | {log_s * 1e6:,.0f} µs |")
    print(f"| a refresh of all files, every {REFRESH_S:.0f} s | {refresh_s * 1e3:,.1f} ms |")
    print(f"| share of logging in the time of training | {share:.2%} (of all steps {total:.2%}) |")


if __name__ == "__main__":
    main()
