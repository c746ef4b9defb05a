"""Test all that this project promises on a GPU, within a budget of seconds.

    make bench-gpu                       (python -m benchmarks.gpu)
    make bench-gpu DEVICE=cpu TINY=1     try it: tiny models, on any machine, in a minute

It writes gpu.json, gpu.md for docs/BENCHMARKS.md, and a log of each part. It downloads nothing:
nanoGPT's one file, model.py, must be in the folder that the variable NANOGPT names. It needs torch,
NumPy and what training imports. It exits with 1 if a part failed or something is not equal; a goal
of speed or memory that is missed is only a row of the table.
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Thread, Timer
from typing import Any

from benchmarks.gpu.equality import CASES
from benchmarks.gpu.parts import PARTS
from benchmarks.worker import Child, Failed
from lm.base.errors import one_line_errors
from lm.base.files import write_json
from lm.base.signals import sigterm_raises
from lm.machine.device import choose_device

Figures = list[dict[str, Any]]  # each with "part", "name" and its numbers
Of = Callable[[str, str, str], float]  # part, name, key -> the number
RESERVE_S = 5.0  # of the budget, to write the tables
ITSELF = "the part itself"


GOALS: tuple[tuple[str, Callable[[Of], float], str, float], ...] = (
    ("straight = resumed, settings",
     lambda of: sum(of("equality", case, "equal") for case in CASES), "at least", len(CASES)),
    ("124M, tokens/s over nanoGPT's",
     lambda of: of("124M", "nanoGPT", "ms") / of("124M", "ours", "ms"), "at least", 1.15),
    ("124M, MFU",
     lambda of: of("124M", "ours", "mfu"), "at least", 0.5),
    ("17M, 327.68M tokens, minutes",
     lambda of: of("17M", "ours", "minutes"), "at most", 5),
    ("deterministic mode, share of a step",
     lambda of: 1 - of("124M", "ours, not deterministic", "ms") / of("124M", "ours", "ms"),
     "at most", 0.05),
    ("memory apart from the plan, share",
     lambda of: abs(of("preset", "gpt2-124m", "peak_of_plan") - 1), "at most", 0.1),
    ("decoding one row in bfloat16, tokens/s",
     lambda of: of("decode", "bfloat16, batch 1, temperature 0", "tokens_per_s"),
     "at least", 1500),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="use tiny models")
    parser.add_argument("--budget", type=float, default=470, help="seconds after which it stops")
    parser.add_argument("--out", type=Path, default=Path("metrics/gpu"), metavar="FOLDER")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS, metavar="PART")
    options = parser.parse_args()
    with one_line_errors(), sigterm_raises():
        choose_device(options.device)
        options.out.mkdir(parents=True, exist_ok=True)
        figures = Acceptance(options).perform()
        print(f"\n{(options.out / 'gpu.md').read_text()}")
    if wrong := [f"{f['part']}: {f['name']}" for f in figures if is_wrong(f)]:
        sys.exit(f"failed or not equal: {'; '.join(wrong)}")


def is_wrong(figure: dict[str, Any]) -> bool:
    """Return whether a part failed or found unequal what must be equal."""
    return "failed" in figure or not (figure.get("equal", True) and figure.get("close", True))


class Acceptance:
    """Runs the parts until the budget ends; keeps what they have found so far."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.figures, self.start = options, Figures(), time.monotonic()

    def perform(self) -> Figures:
        """Run all parts, side by side if they may; after each, write all that is known."""
        names, tiny = self.options.parts, self.options.tiny
        together = [name for name in names if not PARTS[name].alone and not tiny]
        for name in names:
            if name not in together:
                self.perform_part(name)
            elif name == together[0]:
                threads = [
                    Thread(target=self.perform_part, args=[n], daemon=True) for n in together
                ]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
            write_json(self.options.out / "gpu.json", self.figures)
            text = markdown(self.figures, time.monotonic() - self.start)
            text += "These are tiny models: the goals are not meant for them.\n" * tiny
            (self.options.out / "gpu.md").write_text(text)
        return self.figures

    def perform_part(self, name: str) -> None:
        """Add the figures of a part, or why there are none, and keep its log."""
        options, part, start = self.options, PARTS[name], time.monotonic()
        left_s = self.start + options.budget - RESERVE_S - start
        if left_s < part.needed_s and not options.tiny:
            why = f"{left_s:.0f} s left, {part.needed_s:g} s needed"
            self.add(name, {"name": ITSELF, "left_out": why})
        else:
            most_s = max(1.0, min(part.most_s, left_s))
            with Child("benchmarks.gpu.parts", [name, options.device, options.tiny]) as child:
                child.spawn()
                timer = Timer(most_s, os.killpg, (child.process.pid, signal.SIGKILL))
                timer.daemon = True
                timer.start()
                try:
                    while not (said := child.answer()).get("done"):
                        self.add(name, said)
                    self.add(name, {"name": ITSELF, "took_s": time.monotonic() - start})
                except Failed as failure:
                    stopped = time.monotonic() - start >= most_s
                    why = f"stopped after {most_s:.0f} s" if stopped else str(failure)[-300:]
                    self.add(name, {"name": ITSELF, "failed": why})
                finally:
                    timer.cancel()
                (options.out / f"{name}.log").write_text(child.log)

    def add(self, part: str, figure: dict[str, Any]) -> None:
        """Keep a figure, and print it."""
        self.figures.append({"part": part} | figure)
        said = "  ".join(f"{key} {shown(figure[key])}" for key in columns([figure]))
        print(f"[{part}] {figure['name']}: {said}", flush=True)


def columns(figures: Figures) -> list[str]:
    """Return the numbers that some figures have, in order."""
    keys = dict.fromkeys(key for figure in figures for key in figure)
    return [key for key in keys if key not in ("part", "name", "longest")]


def shown(value: Any) -> str:
    """Return a figure as people read it."""
    match value:
        case bool():
            return "yes" if value else "NO"
        case float():
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
        case _:
            return str(value).replace("|", "/")


def markdown(figures: Figures, elapsed_s: float) -> str:
    """Return the goals beside what was found, a table of each part, and the longest kernels."""

    def of(part: str, name: str, key: str) -> float:
        mine = [f[key] for f in figures if (f["part"], f["name"]) == (part, name) and key in f]
        return float(mine[0])

    lines = ["| goal | asked for | found | |", "|---|--:|--:|---|"]
    for words, value_of, side, bound in GOALS:
        found, verdict = "", "not measured"
        with suppress(IndexError):
            value = value_of(of)
            met = value >= bound if side == "at least" else value <= bound
            found, verdict = shown(value), "reached" if met else "missed"
        lines.append(f"| {words} | {side} {bound:g} | {found} | {verdict} |")
    for part in dict.fromkeys(f["part"] for f in figures):
        mine = [f for f in figures if f["part"] == part]
        keys = columns(mine)
        lines += ["", f"| {part} | {' | '.join(key.replace('_', ' ') for key in keys)} |"]
        lines.append(f"|---|{'--:|' * len(keys)}")
        for figure in mine:
            cells = [shown(figure[key]) if key in figure else "" for key in keys]
            lines.append(f"| {figure['name']} | {' | '.join(cells)} |")
        for figure in mine:
            if longest := figure.get("longest"):
                lines += ["", f"{figure['name']}, the longest of a step, ms:", ""]
                lines += [f"    {ms:8.3f}  {kernel}" for kernel, ms in longest.items()]
    return "\n".join([*lines, "", f"All of it took {elapsed_s:.0f} s.", ""])


if __name__ == "__main__":
    main()
