"""The plan of a training as a page of tables, and the command line that prints it.

python -m lm.plan [--params presets/NAME.yaml] [-S section.key=value ...] [--price EUR_PER_HOUR]
python -m lm.plan --check [--params ...] [-S ...]      is every setting right?
python -m lm.plan -S train.parallel=fsdp -S runtime.num_processes=64 [--bandwidth GB_PER_S]
"""

import argparse
import dataclasses
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm.base.console import count, duration, say
from lm.base.errors import EnvironmentFault, InputError, one_line_errors
from lm.base.params import add_overrides, load_params
from lm.base.sections import read_section
from lm.base.settings import ModelConfig, RuntimeConfig, TrainConfig
from lm.data.shards import read_manifest
from lm.data.tokenizer import byte_tokenizer
from lm.machine.device import choose_device, describe, prepare
from lm.plan.footprint import flops_per_token, parameters
from lm.plan.forecast import announce, calibrate, seconds_for
from lm.plan.plan import Plan, make_plan, require_room


def table(
    plan: Plan, step_s: float | None, price: float | None, bandwidth: float | None = None
) -> str:
    """Return the plan as a page of Markdown tables; without the seconds of a step without times.

    `price` is that of all processes for an hour; each sends `bandwidth` bytes per second.
    """
    config, alone = plan.config, plan.num_processes == 1
    sizes, by_part = parameters(plan.model), flops_per_token(plan.model, config, plan.device)
    forward, backward = (sum(flops) for flops in zip(*by_part.values(), strict=True))
    each = "" if alone else f" of each of {plan.num_processes} processes, {config.parallel}"
    title = f"memory{each}, {config.dtype}, micro-batch size {plan.micro_batch_size}"
    checkpointing = not config.gradient_checkpointing
    other = dataclasses.replace(config, gradient_checkpointing=checkpointing)
    instead = sum(dataclasses.replace(plan, config=other).memory.values())
    lines = [
        "| part | parameters |",
        "|------|-----------:|",
        *(f"| {part} | {size:,} |" for part, size in sizes.items()),
        f"| all | {sum(sizes.values()):,} |",
        "",
        "| per token | FLOP forward | FLOP backward |",
        "|-----------|-------------:|--------------:|",
        *(f"| {part} | {f:,.0f} | {b:,.0f} |" for part, (f, b) in by_part.items()),
        f"| all | {forward:,.0f} | {backward:,.0f} |",
        "",
        *_megabytes(title, plan.memory),
        *([] if alone else _megabytes("a process sends for an update", plan.communication)),
        f"With train.gradient_checkpointing: {str(checkpointing).lower()} {instead / 1e6:,.1f} MB",
    ]
    steps, sending_s = f"{count(config.max_steps, 'step')}, {plan.flops:.3e} FLOP", 0.0
    if bandwidth is not None:
        sending_s = sum(plan.communication.values()) / bandwidth
        lines += [f"Sending takes {sending_s:.3f} s an update at {bandwidth / 1e9:g} GB/s"]
    if step_s is None:
        return "\n".join([*lines, f"{steps}; not timed: a step is too large for this machine"])
    # computing and sending overlap, but for the first and the last part of a model
    seconds = seconds_for(plan, config.max_steps, max(step_s, sending_s))
    note = "" if alone else ", timed on one process alone with its share of the windows"
    lines += [f"{steps}, {step_s:.3f} s a step: {duration(seconds)}{note}"]
    if price is not None:
        lines += [f"{seconds / 3600 * price:,.2f} EUR at {price:g} EUR an hour"]
    return "\n".join(lines)


def _megabytes(title: str, parts: dict[str, float]) -> list[str]:
    lines = [f"| {title} | MB |", "|---|---:|"]
    lines += [f"| {part} | {size / 1e6:,.1f} |" for part, size in parts.items()]
    return [*lines, f"| all | {sum(parts.values()) / 1e6:,.1f} |", ""]


def _vocab_size(params: dict[str, dict[str, Any]]) -> int:
    """Return the size of the tokenizer that the settings describe, or of the tokens in data/.

    Tokens are asked only about a kind whose size no setting gives: they may be of other settings.
    """
    tokenizer = params.get("tokenizer", {})
    if tokenizer.get("kind") == "bytes":
        return byte_tokenizer().vocab_size
    if tokenizer.get("kind") == "bpe":
        return int(tokenizer["vocab_size"])
    manifest = Path("data/tokens/tokens.json")
    if not manifest.is_file():
        raise InputError(f"{manifest}: no such file; the vocabulary is known from the stage tokens")
    return int(read_manifest(manifest.parent)["vocab_size"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m lm.plan", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--params", type=Path, default=Path("params.yaml"), metavar="FILE", help="a preset")
    add_overrides(parser)
    add("--price", type=float, metavar="EUR_PER_HOUR", help="of all machines")
    add("--bandwidth", type=float, metavar="GB_PER_S", help="that each of several processes sends")
    add("--check", action="store_true", help="check every setting, and run nothing")
    options = parser.parse_args(arguments)
    with one_line_errors():
        if options.price is not None and not 0 <= options.price < float("inf"):
            raise InputError(f"--price {options.price}: must be >= 0")
        if options.bandwidth is not None and not 0 < options.bandwidth < float("inf"):
            raise InputError(f"--bandwidth {options.bandwidth}: must be > 0")
        where = str(options.params)
        params = load_params(options.params, options.overrides)
        if options.check:
            importlib.import_module("stages.check").check(params, where)  # no part of a training
            say(f"{where}: ok")
            return
        config = read_section(TrainConfig, params, "train", where)
        runtime = read_section(RuntimeConfig, params, "runtime", where)
        vocab_size = _vocab_size(params)
        model = read_section(ModelConfig, params, "model", where, vocab_size=vocab_size)
        device = choose_device(runtime.device)
        prepare(device, config.threads)
        say(f"Device: {describe(device)}")
        plan = make_plan(model, config, device, runtime.num_processes)
        announce(plan, config)
        try:
            require_room(plan)
        except EnvironmentFault as fault:
            say(f"Plan: not on this machine: {fault}")
        bandwidth = options.bandwidth and options.bandwidth * 1e9
        say(f"\n{table(plan, calibrate(plan), options.price, bandwidth)}")
