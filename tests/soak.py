"""Kill `dvc repro` at random moments, go on, and compare: `python -m tests.soak --seconds 600`.

A round starts from a fresh project, every other one of two processes, and kills until the pipeline
is done: a random signal to the stage, to a rank, to dvc or to the whole group, after a random time;
half of the kills wait until DVC writes one of its files in place. It must end in the bytes of an
undisturbed run.
`--break heal` or `--break resume` leaves out what this rests on and must therefore end red.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

from tests.kill import (
    SIGNALS,
    TARGETS,
    Victim,
    commit,
    copied,
    heal,
    last_step,
    litter,
    outputs,
    resumed_at,
    run,
    running_stage,
    share_out,
    stage_name,
    survivors,
    versioned,
)
from tests.project import Project

STEPS, INTERVAL = 600, 3
KILLS_A_ROUND = 12  # then the round may finish
LONGEST_S = 12
NUM_PROCESSES = (1, 2)  # of trainings, in turn


class Soak:
    """Rounds of kills, and what was counted."""

    def __init__(self, folder: Path, seed: int, broken: str):
        self.folder, self.random, self.broken = folder, random.Random(seed), broken
        self.kills: Counter[str] = Counter()
        self.hit: Counter[str] = Counter()
        self.heals: Counter[str] = Counter()
        self.resumes = self.repeated = self.rounds = 0
        self.faults: list[str] = []
        self.fresh = [versioned(folder / f"fresh{n}", STEPS, INTERVAL) for n in NUM_PROCESSES]
        self.expected = []
        for num_processes, fresh in zip(NUM_PROCESSES, self.fresh, strict=True):
            if num_processes > 1:
                share_out(fresh, num_processes)
                commit(fresh)
            whole = copied(fresh, folder / f"undisturbed{num_processes}")
            done = run(whole, "dvc", "repro", timeout=600)
            assert done.returncode == 0, done.stdout
            self.expected.append(outputs(whole))

    def round(self, end: float) -> None:
        """Kill one pipeline again and again until it is done, and compare."""
        kind = self.rounds % len(NUM_PROCESSES)
        self.rounds += 1
        project = copied(self.fresh[kind], self.folder / f"round{self.rounds}")
        reached, kills, failures = 0, 0, 0
        while True:
            self.heal(project)
            if self.broken == "resume":
                shutil.rmtree(project.folder / ".dvc/tmp/lm-resume", ignore_errors=True)
            victim = Victim(project, "dvc", "repro")
            kill = kills < KILLS_A_ROUND and time.monotonic() < end
            killed = self.kill(project, victim) if kill else False
            code = victim.wait(600)
            kills += killed
            if left := survivors(project):
                self.fault(project, f"orphans 30 s after dvc ended: {left}")
            output = victim.output()
            resumed, step = resumed_at(output), last_step(output)
            if resumed:
                self.resumes += 1
                self.repeated += max(0, reached - resumed)
            lost = reached - resumed
            if step and lost > 2 * INTERVAL:  # since the last save, and while it was written
                self.fault(project, f"at step {reached}, went on from {resumed}")
            reached = step or reached
            if code == 0:
                break
            if not killed:
                failures += 1
                self.fault(project, f"exit code {code} without a kill: {output[-300:]}")
                if failures == 2:
                    return
        different = {n for n, _ in outputs(project).items() ^ self.expected[kind].items()}
        if different:
            self.fault(project, f"exit code 0, but different: {', '.join(sorted(different))}")
        self.heal(project)
        if found := litter(project):
            self.fault(project, f"litter: {', '.join(found)}")
        shutil.rmtree(project.folder)

    def kill(self, project: Project, victim: Victim) -> bool:
        """Wait for a random time and kill; False if it ended before."""
        end = time.monotonic() + self.random.uniform(0.2, LONGEST_S)
        while time.monotonic() < end:
            if victim.process.poll() is not None:
                return False
            victim.listen()
            time.sleep(0.005)
        target = self.random.choice([*TARGETS, "rank"])
        number = self.random.choice(SIGNALS)
        if self.random.random() < 0.5:
            target, number = "group", SIGNALS[2]
            while victim.process.poll() is None and not self.is_being_written(project):
                victim.listen()  # and no more: sleeping would miss an instant
            if victim.process.poll() is not None:
                return False
        stage = (running := running_stage(project)) and stage_name(running)
        victim.kill(target, number)
        self.kills[f"{number.name} to {target if stage else 'dvc'}"] += 1
        self.hit[stage or "between stages"] += 1
        return True

    def is_being_written(self, project: Project) -> bool:
        """Whether DVC has emptied one of the files that it writes in place."""
        for name in ("dvc.lock", ".dvc/tmp/rwlock"):
            with suppress(FileNotFoundError):
                if (project.folder / name).stat().st_size == 0:
                    return True
        return False

    def heal(self, project: Project) -> None:
        """What `make repro` does first."""
        if self.broken != "heal":
            for line in heal(project).splitlines():
                self.heals[line.removeprefix("healed: ").split(":")[0].split(" (")[0]] += 1

    def fault(self, project: Project, text: str) -> None:
        self.faults.append(f"{project.folder.name}: {text}")
        print(f"FAULT {self.faults[-1]}", flush=True)

    def report(self) -> str:
        lines = [f"{self.rounds} rounds, {sum(self.kills.values())} kills"]
        for title, counts in (("kills", self.kills), ("hit", self.hit), ("healed", self.heals)):
            lines += [f"{title:8}{count:5}  {name}" for name, count in sorted(counts.items())]
        lines.append(f"resumed {self.resumes:5}  times, {self.repeated} steps repeated")
        lines.append(f"faults  {len(self.faults):5}")
        return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--break", dest="broken", choices=["nothing", "heal", "resume"],
                        default="nothing")  # fmt: skip
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        soak = Soak(Path(folder), arguments.seed, arguments.broken)
        end = time.monotonic() + arguments.seconds
        while time.monotonic() < end:
            soak.round(end)
        print(soak.report())
    sys.exit(bool(soak.faults))


if __name__ == "__main__":
    main()
