"""Stage train: the tokens to models/ and metrics/; goes on by itself where it was stopped."""

import argparse
import os
from pathlib import Path

from lm.config import RuntimeConfig, read_section
from lm.console import say
from lm.device import choose_device, describe, environment, make_deterministic
from lm.evaluate import evaluate, loss_nats
from lm.files import sha256_file
from lm.model import ModelConfig, TransformerLM
from lm.run import Run, due
from lm.tokenizer import load_tokenizer
from lm.tokens import Split, open_tokens
from lm.train import TrainConfig, new_state, train
from stages.run import Params, imported_code, run

TOKENIZER, TOKENS = Path("data/tokenizer"), Path("data/tokens")
MODELS, METRICS = Path("models"), Path("metrics")
# outside of every output, since DVC deletes those; DVC names the main project to its workspaces
UNFINISHED = Path(os.environ.get("DVC_ROOT", "."), ".dvc", "tmp", "lm-resume")


def train_stage(params: Params, arguments: argparse.Namespace) -> None:
    """Write models/model, models/checkpoints, metrics/{train.json,curves.csv,performance.json}."""
    config = read_section(TrainConfig, params, "train")
    runtime = read_section(RuntimeConfig, params, "runtime")
    device = choose_device(runtime.device)
    make_deterministic(device)
    say(f"Device: {describe(device)}")
    tokenizer = load_tokenizer(TOKENIZER)
    tokenizer_sha256 = sha256_file(TOKENIZER / "tokenizer.json")
    tokens = open_tokens(TOKENS, tokenizer_sha256)
    model_config = read_section(ModelConfig, params, "model", vocab_size=tokens.vocab_size)
    for split in (tokens.train, tokens.valid):
        split.require(model_config.context_length)
    say(f"Loaded dataset with {len(tokens.train.tokens):,} tokens")
    state = new_state(model_config, config, device)
    say(f"Model has {state.model.num_parameters():,} parameters")
    inputs = {
        "tokenizer": tokenizer_sha256,
        "tokens": tokens.sha256,
        "code": imported_code(),
        "environment": environment(device),
    }
    with Run(state, config, runtime, inputs, UNFINISHED, arguments.resume_from) as this_run:
        steps = train(state, tokens.train, config)
        while not this_run.finished:
            record = next(steps)
            if due(state.step, config.eval_interval) or state.step == config.max_steps:
                record["valid_loss"] = validation_loss(state.model, tokens.valid, config)
            this_run.log(record)
            this_run.save_if_due()
        this_run.write_performance(device, METRICS)
        this_run.publish(tokenizer, MODELS, METRICS)


def validation_loss(model: TransformerLM, valid: Split, config: TrainConfig) -> float:
    """Loss in nats on the batches that every validation of the run looks at."""
    batches = config.eval_batches * config.batch_size // config.windows_at_once
    at_once, dtype = config.windows_at_once, config.dtype
    return loss_nats(evaluate(model, valid, at_once, max_batches=batches, dtype=dtype))


if __name__ == "__main__":
    continued = (
        "go on from this checkpoint (models/checkpoints/last.safetensors) to train.max_steps"
    )
    resume_from = ("--resume-from", {"type": Path, "metavar": "PATH", "help": continued})
    run(train_stage, ["model", "train", "runtime"], resume_from)
