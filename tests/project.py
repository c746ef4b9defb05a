"""A project folder for tests that run the stages as a user does: in processes of their own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
SMOKE = ROOT / "presets" / "smoke.yaml"
COPIED = ("lm", "stages", "dvc.yaml", ".dvc/config", ".dvc/plots", ".dvcignore", ".gitignore",
          "data/tokenizers", "data/.gitignore", "models/.gitignore",
          "metrics/.gitignore")  # fmt: skip


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
        self.params = yaml.safe_load(SMOKE.read_text())
        self.set("data.packages", [])
        self.set("data.path", "text")
        self.set("data.valid_fraction", 0.2)
        self.set("tokenizer.vocab_size", 300)

    def set(self, key: str, value: Any) -> None:
        """Change one setting in params.yaml."""
        section, name = key.split(".")
        self.params[section][name] = value
        (self.folder / "params.yaml").write_text(yaml.safe_dump(self.params))

    def start(self, *command: str, **environment: str) -> "subprocess.Popen[str]":
        """Start a program in the folder, one thread, with this environment's Python first."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        clean = {k: v for k, v in os.environ.items() if not k.startswith("DVC_")}
        process = subprocess.Popen(
            command,
            cwd=self.folder,
            env=clean | {"PATH": path, "OMP_NUM_THREADS": "1"} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
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

    def train_until(self, text: str, *overrides: str, **environment: str) -> Any:
        """Start stage train and wait until it has printed a line that begins so."""
        given = [word for override in overrides for word in ("-S", override)]
        process = self.start("python", "-m", "stages.train", *given, **environment)
        wait_for(process, text)
        return process

    def run(self, *command: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        """Run a program to its end."""
        process = self.start(*command, **environment)
        out, err = process.communicate(timeout=300)
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def stage(self, name: str, *overrides: str) -> "subprocess.CompletedProcess[str]":
        """Run `python -m stages.NAME`, each override given by -S."""
        given = [word for override in overrides for word in ("-S", override)]
        return self.run("python", "-m", f"stages.{name}", *given)

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
