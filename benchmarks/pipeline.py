"""Time what DVC adds to the stages: with nothing to do, and around an experiment.

    python -m benchmarks.pipeline

It runs HEAD in a temporary clone with presets/smoke.yaml, beside a DVC repository with the same
number of stages that copy one small file each. Commands alternate; medians in seconds.
"""

import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
ROUNDS = 7
STAGES = len(yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"])


def run(folder: Path, *command: str) -> str:
    """Return the output of a command that must succeed."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def seconds(folder: Path, *command: str) -> float:
    start = time.monotonic()
    run(folder, *command)
    return time.monotonic() - start


def commit(folder: Path) -> None:
    for command in ("add -A", "-c user.name=b -c user.email=b@example.org commit -qm all"):
        run(folder, "git", *command.split())


def ours(folder: Path) -> Path:
    run(ROOT, "git", "clone", "-q", "--no-local", str(ROOT), str(folder))
    run(folder, "python", "-m", "tools.preset", "smoke")
    run(folder, "dvc", "repro")
    commit(folder)
    return folder


def trivial(folder: Path) -> Path:
    """Make a repository of stages that copy a file: it shows what DVC takes by itself."""
    folder.mkdir()
    run(folder, "git", "init", "-q")
    run(folder, "dvc", "init", "-q")
    (folder / "params.yaml").write_text("number: 0\n")
    (folder / "file0").write_text("text\n")
    stages = {
        f"copy{i}": {
            "cmd": f"cp file{i} file{i + 1}",
            "deps": [f"file{i}"],
            "outs": [f"file{i + 1}"],
        }
        for i in range(STAGES)
    }
    stages[f"copy{STAGES - 1}"]["params"] = ["number"]
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    run(folder, "dvc", "repro")
    commit(folder)
    return folder


def queued(folder: Path, name: str, override: str) -> float:
    """Return the seconds from the call that queues an experiment to its result."""
    start = time.monotonic()
    run(folder, "dvc", "exp", "run", "--queue", "-n", name, "-S", override)
    with open(os.devnull, "w") as nowhere:  # the worker would keep a pipe open
        command = ["dvc", "queue", "start"]
        subprocess.run(command, cwd=folder, stdout=nowhere, stderr=nowhere, check=True)
    while f"/{name}\n" not in run(folder, "git", "for-each-ref", "refs/exps"):
        time.sleep(0.1)
    return time.monotonic() - start


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        project, plain = ours(Path(temporary, "ours")), trivial(Path(temporary, "trivial"))
        idle = {"dvc repro": ("dvc", "repro"), "dvc status": ("dvc", "status")}
        times: dict[str, list[float]] = {}
        for round_ in range(ROUNDS):
            for name, command in idle.items():
                for where, folder in (("ours", project), ("trivial", plain)):
                    times.setdefault(f"{name} {where}", []).append(seconds(folder, *command))
            alone = ("python", "-m", "stages.evaluate", "-S", f"evaluate.seed={round_ + 100}")
            times.setdefault("stage ours", []).append(seconds(project, *alone))
            run(project, "dvc", "checkout", "--force")
            for where, folder, setting in (
                ("ours", project, "evaluate.seed"),
                ("trivial", plain, "number"),
            ):
                taken = seconds(folder, "dvc", "exp", "run", "-S", f"{setting}={round_ + 200}")
                times.setdefault(f"workspace {where}", []).append(taken)
                run(folder, "git", "checkout", "-q", ".")
                run(folder, "dvc", "checkout")
                taken = queued(folder, f"queued-{round_}", f"{setting}={round_ + 300}")
                times.setdefault(f"queued {where}", []).append(taken)
        t = {name: statistics.median(values) for name, values in times.items()}
    print(
        f"| nothing to do, {STAGES} stages | ours | trivial stages | ratio |\n|---|---:|---:|---:|"
    )
    for name in idle:
        here, there = t[f"{name} ours"], t[f"{name} trivial"]
        print(f"| `{name}` | {here:.2f} | {there:.2f} | {here / there:.2f} |")
    print("\n| an experiment that runs the last stage | ours | over the stage | trivial stages |")
    print("|---|---:|---:|---:|")
    stage = t["stage ours"]
    print(f"| the stage alone, `python -m stages.evaluate` | {stage:.2f} | | 0.00 |")
    for name in ("workspace", "queued"):
        here, there = t[f"{name} ours"], t[f"{name} trivial"]
        print(f"| `dvc exp run`, {name} | {here:.2f} | {here - stage:.2f} | {there:.2f} |")


if __name__ == "__main__":
    main()
