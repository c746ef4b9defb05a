"""Print what a training will hold, compute and cost; or check its settings.

python -m lm.plan [--params presets/NAME.yaml] [-S section.key=value ...] [--price EUR_PER_HOUR]
python -m lm.plan --check [--params ...] [-S ...]      is every setting right?
python -m lm.plan -S train.parallel=fsdp -S runtime.num_processes=64 [--bandwidth GB_PER_S]
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm.base.console import say
from lm.base.errors import EnvironmentFault, InputError, one_line_errors
from lm.base.params import add_overrides, load_params
from lm.base.paths import PARAMS, TOKENS
from lm.base.sections import read_section
from lm.base.settings import ModelConfig, RuntimeConfig, TrainSection
from lm.check import check
from lm.data.shards import MANIFEST, read_manifest
from lm.data.tokenizer import byte_tokenizer
from lm.machine.device import choose_device, describe, prepare
from lm.machine.processes import number_of_processes
from lm.plan.page import table
from lm.plan.plan import make_plan, require_room
from lm.plan.timing import announce, calibrate


def _vocab_size(params: dict[str, dict[str, Any]]) -> int:
    """Return the size of the tokenizer that the settings describe, or of the tokens in data/.

    The tokens may be of other settings: read them only for a kind whose size no setting gives.
    """
    tokenizer = params.get("tokenizer", {})
    if tokenizer.get("kind") == "bytes":
        return byte_tokenizer().vocab_size
    if tokenizer.get("kind") == "bpe":
        return int(tokenizer["vocab_size"])
    manifest = TOKENS / MANIFEST
    if not manifest.is_file():
        raise InputError(f"{manifest}: no such file, needed for vocab_size; run `dvc repro tokens`")
    return int(read_manifest(TOKENS)["vocab_size"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m lm.plan", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add(
        "--params",
        type=Path,
        default=PARAMS,
        metavar="FILE",
        help="settings to plan, such as a preset",
    )
    add_overrides(parser)
    add("--price", type=float, metavar="EUR_PER_HOUR", help="price of all machines together")
    add("--bandwidth", type=float, metavar="GB_PER_S", help="what each process can send")
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
            check(params, where)
            say(f"{where}: ok")
            return
        asked = read_section(TrainSection, params, "train", where)
        runtime = read_section(RuntimeConfig, params, "runtime", where)
        vocab_size = _vocab_size(params)
        model = read_section(ModelConfig, params, "model", where, vocab_size=vocab_size)
        device = choose_device(runtime.device)
        prepare(device, asked.threads)
        say(f"Device: {describe(device)}")
        num_processes = number_of_processes(runtime, asked.parallel, device)
        plan = make_plan(model, asked, device, num_processes)
        announce(plan, asked)
        try:
            require_room(plan)
        except EnvironmentFault as fault:
            say(f"Plan: not on this machine: {fault}")
        bandwidth = options.bandwidth and options.bandwidth * 1e9
        say(f"\n{table(plan, calibrate(plan), options.price, bandwidth)}")


if __name__ == "__main__":
    main()
