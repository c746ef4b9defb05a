"""A project folder for tests that run the stages, each in its own process or in a warmed one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from lm.base.params import load_params
from lm.data.shards import SPLITS, ShardWriter, token_dtype, write_manifest
from lm.data.tokenizer import Tokenizer
from tests.warm import address, lifeline, run_warm

ROOT = Path(__file__).parent.parent
SMOKE = ROOT / "presets" / "smoke.yaml"
PIPE_BYTES = 4096  # the least there is: a training that logs each step is held after thirty
COPIED = ("lm", "stages", "tools", "dvc.yaml", ".dvc/config", ".dvc/plots", ".dvcignore",
          ".gitignore", "data/tokenizers", "data/.gitignore", "models/.gitignore",
          "models/pretrained", "metrics/.gitignore")  # fmt: skip


class Project:
    """A copy of the repository's code with presets/smoke.yaml, and a text of 60 short files."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.processes: list[subprocess.Popen[str]] = []
        for name in COPIED:
            source, target = ROOT / name, folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, target)
        (folder / "text").mkdir()
        for i in range(60):
            words = " ".join(f"word{i * j % 17} = {j} * {i}" for j in range(40))
            (folder / "text" / f"{i:02}.txt").write_text(f"def f{i}():\n    return {words}\n")
        self.params = load_params(SMOKE)
        self.set("corpus.packages", [])
        self.set("data.path", "text")
        self.set("data.valid_fraction", 0.2)
        self.set("tokenizer.vocab_size", 300)

    def set(self, key: str, value: Any) -> None:
        """Change one setting in params.yaml."""
        section, name = key.split(".")
        self.params[section][name] = value
        (self.folder / "params.yaml").write_text(yaml.safe_dump(self.params))

    def environment(self, warm: bool = False) -> dict[str, str]:
        """One thread, this Python first, and nothing of a dvc or a make that may run the tests.

        Without transformers, as a user has it, which take seconds to import: `stage` has them.
        With `warm`, `python -m` of our modules and `dvc` run in forks: see tests.warm.
        """
        outer = ("DVC_", "MAKE", "MFLAGS")
        clean = {k: v for k, v in os.environ.items() if not k.startswith(outer)}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        if warm:
            for program in ("dvc", "stages.train"):
                lifeline(address(program))
            path = f"{ROOT / 'tests' / 'start'}{os.pathsep}{path}"
        site = str(self.folder.with_name(self.folder.name + ".site"))  # else in /var/tmp
        fixed = {"PATH": path, "OMP_NUM_THREADS": "1", "DVC_SITE_CACHE_DIR": site,
                 "LM_WARM_PYTHON": sys.executable}  # fmt: skip
        return clean | fixed | {"PYTHONPATH": str(ROOT / "tests" / "without")}

    def start(self, *command: str, **environment: str) -> "subprocess.Popen[str]":
        """Start a program in the folder. It cannot run far ahead of who reads its output."""
        process = subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.environment() | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            pipesize=PIPE_BYTES,
        )
        self.processes.append(process)
        return process

    def close(self) -> None:
        """End what a test has left running."""
        for process in self.processes:
            process.kill()
            process.wait()
            process.stdout.close()
            process.stderr.close()

    def train_until(
        self, text: str, *overrides: str, warm: bool = False, **environment: str
    ) -> Any:
        """Start stage train and wait until it has printed a line that begins so.

        With `warm`, in a fork: it has another process id, and can only be killed or awaited.
        """
        overrides = ("runtime.log_interval=1", *overrides)  # it waits for us within some steps
        given = [word for override in overrides for word in ("-S", override)]
        environment = (self.environment(warm=True) if warm else {}) | environment
        process = self.start("python", "-m", "stages.train", *given, **environment)
        wait_for(process, text)
        return process

    def run(self, *command: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        """Run a program to its end."""
        process = self.start(*command, **environment)
        out, err = process.communicate(timeout=300)
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def warm(self, stage: str, *arguments: str, **more: Any) -> dict[str, Any]:
        """Run a stage in a fork of a process that has imported torch: see tests.warm.run_warm."""
        return run_warm(self.folder, stage, *arguments, **more)

    def stage(
        self, name: str, *overrides: str, resume_from: str | None = None, **environment: str
    ) -> "subprocess.CompletedProcess[str]":
        """Run a stage like that, each override given by -S."""
        given = [word for override in overrides for word in ("-S", override)]
        given += ["--resume-from", resume_from] if resume_from else []
        done = self.warm(name, *given, environment=environment)
        return subprocess.CompletedProcess(given, done["status"], done["out"], done["err"])

    def prepare(self, *stages: str) -> None:
        """Run stages that must succeed."""
        for stage in stages:
            result = self.stage(stage)
            assert result.returncode == 0, result.stderr

    def forget_runs(self) -> None:
        """Delete what stage train would resume."""
        shutil.rmtree(self.folder / ".dvc" / "tmp" / "lm-resume", ignore_errors=True)

    def forget_shards(self) -> None:
        """Delete what stage tokens would use again."""
        shutil.rmtree(self.folder / ".dvc" / "tmp" / "lm-shards", ignore_errors=True)

    def read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()


def change(value: Any, keys: list[str], new: Any) -> None:
    """Set, or with None delete, what stands under keys and numbers within a JSON value."""
    *outer, last = [int(key) if key.isdigit() else key for key in keys]
    for key in outer:
        value = value[key]
    if new is None:
        del value[last]
    else:
        value[last] = new


def wait_for(process: "subprocess.Popen[str]", text: str) -> None:
    """Read a program's output until a line contains `text`; fails if it ends before."""
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"ended without {text!r}: {process.stderr.read()}")


def one_line(result: "subprocess.CompletedProcess[str]") -> str:
    """What a failed program said on stderr, which must be one line and no traceback."""
    lines = result.stderr.strip().split("\n")
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    return lines[0]


def write_tokens(
    folder: Path, documents: list[tuple[str, str]], tokenizer: Tokenizer, sha256: str = ""
) -> None:
    """Token shards of (side, text), one shard a side, as stage tokens would leave them."""
    dtype, entries = token_dtype(tokenizer.vocab_size), {}
    for side in SPLITS:
        texts = [text for name, text in documents if name == side]
        with ShardWriter(folder / side / "text-00000.bin", dtype) as writer:
            for text in texts:
                ids = np.array([*tokenizer.encode(text), tokenizer.end_id])
                writer.append(ids, len(text.encode()), 1)
        entries[side] = writer.entry()
    write_manifest(
        folder,
        vocab_size=tokenizer.vocab_size,
        end_id=tokenizer.end_id,
        tokenizer_sha256=sha256,
        sources=[{"name": "text", "weight": None}],
        shards=[{"source": "text", **entries}],
    )
