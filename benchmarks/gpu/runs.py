"""Train as stage train does, but on tokens in memory: the parts measure these trainings."""

import json
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lm.base.errors import Interrupted
from lm.base.params import load_params
from lm.base.sections import read_section
from lm.base.settings import RuntimeConfig, TrainConfig, TrainSection
from lm.data.splits import Split, Splits
from lm.machine.device import environment
from lm.machine.processes import ALONE, Processes
from lm.model.transformer import ModelConfig
from lm.plan.plan import Plan, make_plan
from lm.runs.run import Run
from lm.train.loop import fit
from lm.train.state import Record, new_state

PRESETS = Path(__file__).parents[2] / "presets"
Note = Callable[..., None]  # takes the name of a finding, and its figures
Settings = tuple[ModelConfig, TrainSection, RuntimeConfig]


def settings(overrides: dict[str, Any], vocab_size: int, preset: str = "default") -> Settings:
    """Return the sections of a preset that a training reads, with some settings changed."""
    changes = [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
    params = load_params(PRESETS / f"{preset}.yaml", changes)
    return (
        read_section(ModelConfig, params, "model", vocab_size=vocab_size),
        read_section(TrainSection, params, "train"),
        read_section(RuntimeConfig, params, "runtime"),
    )


def small(
    changes: dict[str, Any], tiny: bool, steps: int
) -> tuple[ModelConfig, TrainConfig, RuntimeConfig]:
    """Return the settings of a model that trains in seconds: on a GPU, or if tiny anywhere."""
    sizes = {"d_model": 256, "d_ff": 688, "context_length": 256}
    if tiny:
        sizes = {"d_model": 32, "d_ff": 64, "context_length": 16, "num_layers": 2}
    train: dict[str, Any] = {"batch_size": 16, "max_steps": steps, "warmup_steps": 2}
    train |= {"num_threads": 1, "compile": False, "dtype": "bfloat16", "eval_interval": steps}
    given = {f"model.{key}": value for key, value in sizes.items()}
    given |= {f"train.{key}": value for key, value in train.items()}
    given |= {"runtime.checkpoint_interval": steps}
    model, asked, runtime = settings(given | changes, 64 if tiny else 2048)
    return model, TrainConfig(**vars(asked)), runtime


def split_of(model: ModelConfig, count: int = 400_000) -> Split:
    """Return ids, four in five of which are the one before plus 7, so that losses fall."""
    rng = np.random.default_rng(0)
    ids = np.arange(count, dtype=np.uint32) * 7 % model.vocab_size
    noise = rng.random(count) < 0.2
    ids[noise] = rng.integers(model.vocab_size, size=int(noise.sum()))
    return Split("train", ids, 0, end_id=0)


class WatchedRun(Run):
    """A run that keeps its records, and sends itself SIGTERM after step `stop_after`."""

    def __init__(self, *arguments: Any, stop_after: int | None):
        self.stop_after, self.records = stop_after, list[Record]()
        super().__init__(*arguments)

    def log(self, record: Record) -> None:
        """See Run."""
        self.records.append(record)
        if record["step"] == self.stop_after:
            signal.raise_signal(signal.SIGTERM)
        super().log(record)


def train_as_the_stage_does(
    run_settings: Settings,
    device: torch.device,
    folder: Path,
    *,
    stop_after: int | None = None,
    processes: Processes = ALONE,
    split: Split | None = None,
) -> tuple[WatchedRun, Plan]:
    """Train by plan from the state in `folder`, if there is one; stop after step `stop_after`."""
    model, asked, runtime = run_settings
    plan = make_plan(model, asked, device, processes.size)
    state = new_state(plan.model, plan.config, device, processes)
    state.micro_batch_size = plan.micro_batch_size
    found = environment(device, plan.config.compile)
    made_of: dict[str, Any] = {"inputs": {}, "code": {}, "environment": found}
    run = WatchedRun(state, plan.config, runtime, made_of, folder, stop_after=stop_after)
    split = split or split_of(model)
    with suppress(Interrupted), run:
        fit(state, Splits(split, split, model.vocab_size), plan.config, run)
    return run, plan
