"""Stage train: train a model on the tokens; resume where the run was stopped."""

import os
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from lm.base.console import say
from lm.base.files import sha256_file
from lm.base.paths import METRICS, MODELS, PRETRAINED, TOKENIZER, TOKENS
from lm.base.settings import PARALLEL, RuntimeConfig, TrainSection, share_of_batch
from lm.data.splits import Splits, open_tokens
from lm.data.tokenizer import Tokenizer, load_tokenizer
from lm.machine.device import choose_device, describe, environment, prepare
from lm.machine.processes import Processes, joined, number_of_processes
from lm.model.huggingface import start_from
from lm.model.transformer import ModelConfig, TransformerLM
from lm.plan.plan import (
    Plan,
    explain_out_of_memory,
    make_plan,
    require_room,
    require_room_for_processes,
)
from lm.plan.timing import Timing, announce
from lm.runs.run import Run
from lm.train.loop import fit
from lm.train.state import Record, TrainState, new_state
from stages.launch import launch, launched
from stages.run import RUNS_ROOT, Inputs, run_stage


def train_stage(inputs: Inputs) -> None:
    """Write models/model, models/checkpoints and metrics/, in as many processes as set."""
    asked = inputs.section(TrainSection, "train")
    runtime = inputs.section(RuntimeConfig, "runtime")
    device = choose_device(runtime.device)
    num_processes = number_of_processes(runtime, asked.parallel, device)
    _say_who_trains(runtime, asked, device, num_processes)
    if num_processes > 1 and not launched():
        share_of_batch(asked, num_processes)
        require_room_for_processes(num_processes)
        launch("stages.train", num_processes, runtime.process_timeout_s)
        return
    with joined(asked.parallel, device, runtime.process_timeout_s) as processes:
        prepare(device, asked.threads)
        say(f"Device: {describe(device)}{f', {processes.size} processes' * (processes.size > 1)}")
        read = partial(_read, inputs, asked, device, processes)
        plan, tokens, tokenizer = processes.together(read)
        made_of = {
            "inputs": {file.as_posix(): sha256 for file, sha256 in inputs.files.items()},
            "code": inputs.code,
            "environment": environment(device, plan.config.compile),
        }
        agreed = {
            "model": asdict(plan.model),
            "train": asdict(plan.config),
            "runtime": asdict(runtime),
            "command line": {"--resume-from": inputs.arguments.resume_from},
        }
        processes.require_same(agreed | made_of)
        with explain_out_of_memory(plan):
            state = _begin(plan, asked, tokenizer, processes)
        resume_from = inputs.arguments.resume_from
        live = METRICS if "DVC_ROOT" in os.environ else None  # DVC has deleted the old metrics
        run_ = Run(state, plan.config, runtime, made_of, RUNS_ROOT, resume_from, live)
        with explain_out_of_memory(plan), run_ as this_run:
            watched = _Watched(this_run, inputs, Timing(plan, state.step))
            fit(state, tokens, plan.config, watched)
            processes.together(inputs.check)
            this_run.publish(tokenizer, MODELS, METRICS)


def _say_who_trains(
    runtime: RuntimeConfig, asked: TrainSection, device: torch.device, num_processes: int
) -> None:
    if launched():
        return
    if runtime.num_processes == "auto" and PARALLEL[asked.parallel].several:
        say(f"Processes: {num_processes} (runtime.num_processes is auto: one for each GPU)")
    elif str(device) == "cuda" and num_processes == 1 < torch.cuda.device_count():
        say(f"Using one of {torch.cuda.device_count()} GPUs; train.parallel: ddp uses all of them")


def _read(
    inputs: Inputs, asked: TrainSection, device: torch.device, processes: Processes
) -> tuple[Plan, Splits, Tokenizer]:
    """Open and verify the stage's inputs; return the plan, the tokens and their tokenizer."""
    inputs.watch(TOKENIZER, TOKENS)
    if asked.init_from is not None:
        inputs.watch(PRETRAINED / asked.init_from)
    tokenizer = load_tokenizer(TOKENIZER)
    tokens = open_tokens(TOKENS, sha256_file(TOKENIZER / "tokenizer.json"), tokenizer)
    model_config = inputs.section(ModelConfig, "model", vocab_size=tokens.vocab_size)
    for split in (tokens.train, tokens.valid):
        split.require(model_config.context_length)
    say(f"Loaded dataset with {len(tokens.train.tokens):,} tokens")
    plan = make_plan(model_config, asked, device, processes.size)
    require_room(plan)
    return plan, tokens, tokenizer


def _begin(
    plan: Plan, asked: TrainSection, tokenizer: Tokenizer, processes: Processes
) -> TrainState:
    """Return the state before the first step, with the weights that train.init_from names.

    All processes use the smallest of their micro-batch sizes.
    """

    def initialise(model: TransformerLM) -> None:
        if asked.init_from is not None:
            folder = PRETRAINED / asked.init_from
            processes.together(lambda: start_from(folder, model, tokenizer))
            say(f"Starting from the weights in {folder}")

    state = new_state(plan.model, plan.config, plan.device, processes, initialise)
    state.micro_batch_size = min(processes.gather(plan.micro_batch_size))
    say(f"Model has {state.model.num_parameters():,} parameters")
    announce(plan, asked)
    return state


@dataclass
class _Watched:
    """A run for fit() that also times the training and checks that its inputs are unchanged."""

    run: Run
    inputs: Inputs
    timing: Timing

    @property
    def finished(self) -> bool:
        """See Run."""
        return self.run.finished

    @property
    def save_due(self) -> bool:
        """See Run."""
        return self.run.save_due

    def pause_due(self, step: int) -> bool:
        """See Run."""
        return self.run.pause_due(step)

    def log(self, record: Record) -> None:
        """Record a finished step; after the first few print the time to the end."""
        self.run.log(self.timing.observe(record))

    def save(self) -> None:
        """Write a checkpoint if the inputs are unchanged."""
        if self.run.finished:  # before the last save: a run resumed after that writes it no more
            self.run.write_performance(METRICS, self.timing)
        self.run.processes.together(self.inputs.check_files)
        self.inputs.warn_of_edits()
        self.run.save()


if __name__ == "__main__":
    continued = (
        "continue this checkpoint (models/checkpoints/last.safetensors) up to train.max_steps"
    )
    resume_from = ("--resume-from", {"type": Path, "metavar": "PATH", "help": continued})
    run_stage(train_stage, ["model", "train", "runtime"], resume_from)
