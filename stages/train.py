"""Stage train: the tokens to models/ and metrics/; goes on by itself where it was stopped."""

import os
from pathlib import Path

from lm.config import RuntimeConfig
from lm.console import say
from lm.device import choose_device, describe, environment, prepare
from lm.evaluate import evaluate, loss_nats
from lm.files import sha256_file
from lm.huggingface import start_from
from lm.model import ModelConfig
from lm.plan import Forecast, Plan, begin, make_plan
from lm.run import Run, due
from lm.tokenizer import Tokenizer, load_tokenizer
from lm.tokens import Split, open_tokens
from lm.train import TrainConfig, TrainState, train
from stages.run import UNFINISHED, Inputs, run

TOKENIZER, TOKENS = Path("data/tokenizer"), Path("data/tokens")
MODELS, METRICS, PRETRAINED = Path("models"), Path("metrics"), Path("models/pretrained")


def train_stage(inputs: Inputs) -> None:
    """Write models/model, models/checkpoints and metrics/.

    Under DVC, which has deleted them by now, curves.csv and train.json can be watched meanwhile.
    """
    asked = inputs.section(TrainConfig, "train")
    runtime = inputs.section(RuntimeConfig, "runtime")
    device = choose_device(runtime.device)
    prepare(device, asked.num_threads)
    say(f"Device: {describe(device)}")
    inputs.watch(TOKENIZER, TOKENS)
    tokenizer = load_tokenizer(TOKENIZER)
    tokens = open_tokens(TOKENS, sha256_file(TOKENIZER / "tokenizer.json"))
    model_config = inputs.section(ModelConfig, "model", vocab_size=tokens.vocab_size)
    for split in (tokens.train, tokens.valid):
        split.require(model_config.context_length)
    say(f"Loaded dataset with {len(tokens.train.tokens):,} tokens")
    plan = make_plan(model_config, asked, device)
    config, state = plan.config, _begin(inputs, plan, asked, tokenizer)
    made_of = {
        "inputs": {file.as_posix(): sha256 for file, sha256 in inputs.files.items()},
        "code": inputs.code,
        "environment": environment(device, config.compile is True),
    }
    resume_from = inputs.arguments.resume_from
    live = METRICS if "DVC_ROOT" in os.environ else None
    with Run(state, config, runtime, made_of, UNFINISHED, resume_from, live) as this_run:
        steps, forecast = train(state, tokens.train, config), Forecast(plan, state.step)
        while not this_run.finished():
            record = next(steps)
            if due(state.step, config.eval_interval) or state.step == config.max_steps:
                record["valid_loss"] = validation_loss(state, tokens.valid, config)
            this_run.log(forecast.heard(record))
            if this_run.finished():  # before the last save, or a kill could leave it half written
                this_run.write_performance(device, METRICS, forecast)
            if this_run.save_due:
                inputs.check_files()
                this_run.save()
        inputs.check()
        this_run.publish(tokenizer, MODELS, METRICS)


def _begin(inputs: Inputs, plan: Plan, asked: TrainConfig, tokenizer: Tokenizer) -> TrainState:
    """The state before the first step, with the weights that train.init_from names."""
    state = begin(plan, asked)
    if asked.init_from is not None:
        folder = PRETRAINED / asked.init_from
        inputs.watch(folder)
        start_from(folder, state.model, tokenizer)
        say(f"Starting from the weights in {folder}")
    return state


def validation_loss(state: TrainState, valid: Split, config: TrainConfig) -> float:
    """Loss in nats on the batches that every validation of the run looks at."""
    at_once, dtype = state.windows_at_once, config.dtype
    batches = config.eval_batches * config.batch_size // at_once
    return loss_nats(evaluate(state.model, valid, at_once, max_batches=batches, dtype=dtype))


if __name__ == "__main__":
    continued = (
        "go on from this checkpoint (models/checkpoints/last.safetensors) to train.max_steps"
    )
    resume_from = ("--resume-from", {"type": Path, "metavar": "PATH", "help": continued})
    run(train_stage, ["model", "train", "runtime"], resume_from)
