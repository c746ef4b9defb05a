"""Find environments that give the same bits: hash the weights after 20 steps of the default.

    python -m benchmarks.environments

Each row is a process of its own. Rows with the same letter ended in the same bytes.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from string import ascii_uppercase

import numpy as np

from lm.base import rng
from lm.base.params import load_params
from lm.base.sections import read_section
from lm.base.settings import TrainConfig
from lm.data.splits import Split
from lm.machine.device import choose_device, describe, make_deterministic
from lm.model.transformer import ModelConfig
from lm.runs.checkpoint import weights_sha256
from lm.train.loop import train
from lm.train.state import new_state

STEPS, VOCABULARY = 20, 2048
ONE_CORE = ("taskset", "-c", "0")
ROWS: list[tuple[str, dict[str, str], list[str], tuple[str, ...]]] = [
    ("2 threads", {"OMP_NUM_THREADS": "2"}, [], ()),
    ("the same again", {"OMP_NUM_THREADS": "2"}, [], ()),
    ("1 thread", {"OMP_NUM_THREADS": "1"}, [], ()),
    ("train.num_threads 3", {}, ["train.num_threads=3"], ()),
    ("1 thread, train.num_threads 2", {"OMP_NUM_THREADS": "1"}, ["train.num_threads=2"], ()),
    ("train.num_threads 2 on one core", {}, ["train.num_threads=2"], ONE_CORE),
    ("train.num_threads 3 on one core", {}, ["train.num_threads=3"], ONE_CORE),
    ("2 threads, another hash seed", {"OMP_NUM_THREADS": "2", "PYTHONHASHSEED": "5"}, [], ()),
    ("2 threads, AVX2 in torch", {"OMP_NUM_THREADS": "2", "ATEN_CPU_CAPABILITY": "avx2"}, [], ()),
    ("2 threads, AVX2 in oneDNN", {"OMP_NUM_THREADS": "2", "ONEDNN_MAX_CPU_ISA": "AVX2"}, [], ()),
    ("2 threads, MKL_CBWR=COMPATIBLE", {"OMP_NUM_THREADS": "2", "MKL_CBWR": "COMPATIBLE"}, [], ()),
    ("2 threads, micro-batches of 4", {"OMP_NUM_THREADS": "2"}, ["train.micro_batch_size=4"], ()),
    ("2 threads, bfloat16", {"OMP_NUM_THREADS": "2"}, ["train.dtype=bfloat16"], ()),
    ("2 threads, compiled", {"OMP_NUM_THREADS": "2"}, ["train.compile=true"], ()),
    ("2 threads, compiled again", {"OMP_NUM_THREADS": "2"}, ["train.compile=true"], ()),
    ("1 thread, compiled", {"OMP_NUM_THREADS": "1"}, ["train.compile=true"], ()),
]


def child(overrides: list[str]) -> None:
    """Train and print the hash of the weights and the last loss."""
    decided = ["train.dtype=float32", "train.compile=false"]
    params = load_params(Path("params.yaml"), [*decided, *overrides])
    changes = {"max_steps": STEPS, "warmup_steps": 2}
    config = read_section(TrainConfig, {"train": params["train"] | changes}, "train")
    model = read_section(ModelConfig, params, "model", vocab_size=VOCABULARY)
    device = choose_device("cpu")
    make_deterministic(device, config.num_threads)
    tokens = rng.random_integers(7, 1 << 16, VOCABULARY).astype(np.uint16)
    state = new_state(model, config, device)
    loss = [record["train_loss"] for record in train(state, Split("train", tokens, 0), config)][-1]
    print(json.dumps([weights_sha256(state.model), loss, describe(device)]))


def main() -> None:
    letters: dict[str, str] = {}
    print("| environment | weights | loss at step 20 |\n|---|---|---:|")
    for name, environment, overrides, prefix in ROWS:
        command = [*prefix, sys.executable, "-m", "benchmarks.environments", "child", *overrides]
        done = subprocess.run(command, env=os.environ | environment, stdout=subprocess.PIPE)
        sha256, loss, device = json.loads(done.stdout)
        letter = letters.setdefault(sha256, ascii_uppercase[len(letters)])
        print(f"| {name}: {device} | {letter} {sha256[:8]} | {loss:.7f} |", flush=True)


if __name__ == "__main__":
    child(sys.argv[2:]) if sys.argv[1:2] == ["child"] else main()
