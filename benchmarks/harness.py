"""Evaluate the exported model in lm-evaluation-harness, beside our own figures:  make lm-eval

    data/tokens --documents--> benchmarks/tasks/validation.jsonl --lm_eval--> bits per byte

The harness and its many dependencies have an environment of their own. It uses no network.
"""

import argparse
import json
import math
import os
import subprocess
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

from lm.base.errors import EnvironmentFault, InputError, one_line_errors
from lm.base.files import atomic_write, read_json, sha256_file
from lm.base.paths import METRICS, MODEL, TOKENS
from lm.data.splits import open_tokens
from lm.evaluate.floor import document_texts
from lm.model.model_folder import load_model
from lm.model.transformer import TransformerLM

EXPORTED, TASKS = Path("models/huggingface"), Path("benchmarks/tasks")
PROGRAM = Path(".venv-lm-eval/bin/lm_eval")
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.harness", description=__doc__)
    parser.parse_args()
    with one_line_errors():
        if not PROGRAM.exists():
            raise EnvironmentFault(f"{PROGRAM}: no such file; `make lm-eval` installs it")
        if not (EXPORTED / "config.json").exists():
            raise InputError(f"{EXPORTED}: no model; run `dvc repro` to export it")
        model, tokenizer = load_model(MODEL, torch.device("cpu"))
        tokens = open_tokens(TOKENS, sha256_file(MODEL / "tokenizer.json"))
        texts = list(document_texts(tokens.valid, tokenizer))
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        atomic_write(TASKS / "validation.jsonl", lines.encode())
        theirs = run_harness()
        encoded = tokenizer.encode_batch(texts)
        nats = sum(document_nats(model, ids, tokenizer.end_id) for ids in encoded)
        n_bytes = sum(len(text.encode()) for text in texts)
        rows = {
            f"lm_eval, {EXPORTED}": theirs,
            f"the same windows, {MODEL}": nats / (math.log(2) * n_bytes),
            "stage evaluate": read_json(METRICS / "eval.json")["bits_per_byte"],
        }
    print(f"{len(texts)} documents, {n_bytes:,} bytes\n\n|   | bits per byte |\n|---|---:|")
    for name, value in rows.items():
        print(f"| {name} | {value:.6f} |")


def run_harness() -> float:
    """Return bits per byte by the harness, over all bytes of the documents."""
    with tempfile.TemporaryDirectory() as scratch:
        command: list[str | Path] = [
            PROGRAM, "run", "--model", "hf", "--device", "cpu", "--batch_size", "8",
            "--model_args", f"pretrained={EXPORTED},dtype=float32",
            "--include_path", TASKS, "--tasks", "validation", "--output_path", scratch,
        ]  # fmt: skip
        own_cache = {"HF_HOME": scratch}  # else the documents stay in the user's
        done = subprocess.run(
            command, env=os.environ | OFFLINE | own_cache, capture_output=True, text=True
        )
        if done.returncode != 0:
            raise EnvironmentFault(f"lm_eval failed: {done.stderr.strip().splitlines()[-1]}")
        (file,) = Path(scratch).glob("**/results_*.json")
        return float(read_json(file)["results"]["validation"]["bits_per_byte,none"])


@torch.inference_mode()
def document_nats(model: TransformerLM, ids: list[int], end_id: int) -> float:
    """Return the loss of a document, in the windows of the harness (get_rolling_token_windows).

    The end token comes before the first token and is no target. Windows do not overlap, but the
    last begins earlier to be full; only its new targets count.
    """
    row, length = torch.tensor([end_id, *ids]), model.config.context_length
    nats = 0.0
    for done in range(0, len(ids), length):
        stop = min(done + length, len(ids))
        start = max(0, stop - length)
        logits = model(row[None, start:stop])[0, done - start :]  # (new, V)
        nats += F.cross_entropy(logits.double(), row[done + 1 : stop + 1], reduction="sum").item()
    return nats


if __name__ == "__main__":
    main()
