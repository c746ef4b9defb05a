"""Stage train: the tokens to models/ and metrics/; goes on by itself where it was stopped."""

import argparse
from pathlib import Path

from lm.config import RuntimeConfig, read_section
from lm.console import say
from lm.device import choose_device, describe, environment, make_deterministic, performance
from lm.evaluate import evaluate, loss_nats
from lm.files import sha256_file, write_json
from lm.model import ModelConfig
from lm.run import Run, due
from lm.tokenizer import load_tokenizer
from lm.tokens import open_tokens
from lm.train import TrainConfig, new_state, train
from stages.run import Params, imported_code, run

TOKENIZER, TOKENS = Path("data/tokenizer"), Path("data/tokens")
MODELS, METRICS = Path("models"), Path("metrics")


def train_stage(params: Params, arguments: argparse.Namespace) -> None:
    """Write models/model/, models/checkpoints/, metrics/train.json, curves.csv, performance.json."""
    config = read_section(TrainConfig, params, "train")
    runtime = read_section(RuntimeConfig, params, "runtime")
    device = choose_device(runtime.device)
    make_deterministic(device)
    say(f"Device: {describe(device)}")
    tokenizer = load_tokenizer(TOKENIZER)
    tokens = open_tokens(TOKENS, sha256_file(TOKENIZER / "tokenizer.json"))
    params["model"]["vocab_size"] = tokens.vocab_size
    model_config = read_section(ModelConfig, params, "model")
    for split in (tokens.train, tokens.valid):
        split.require(model_config.context_length)
    say(f"Loaded dataset with {len(tokens.train.tokens):,} tokens")
    state = new_state(model_config, config, device)
    say(f"Model has {state.model.num_parameters():,} parameters")
    identity = {"tokens": tokens.sha256, "code": imported_code(), "environment": environment(device)}
    with Run(state, config, runtime, identity, arguments.resume_from) as run_:
        steps = train(state, tokens.train, config)
        while not run_.finished:
            record = next(steps)
            if due(state.step, config.eval_interval) or state.step == config.max_steps:
                sums = evaluate(state.model, tokens.valid, config.batch_size, tokenizer.byte_lengths,
                                max_batches=config.eval_batches, dtype=config.dtype)  # fmt: skip
                record["valid_loss"] = loss_nats(sums)
            run_.log(record)
            run_.save_if_due()
        run_.publish(tokenizer, MODELS, METRICS)
    if run_.step_seconds:
        speed = performance(device, config.dtype, run_.step_seconds,
                            config.batch_size * model_config.context_length,
                            state.model.flops_per_token())  # fmt: skip
        write_json(METRICS / "performance.json", speed)


if __name__ == "__main__":
    resume_from = {"type": Path, "metavar": "CHECKPOINT", "help": "continue models/checkpoints/last.safetensors, say, with a larger train.max_steps"}
    run(train_stage, ("--resume-from", resume_from))
