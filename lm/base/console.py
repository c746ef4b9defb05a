"""What a long run says: plain lines in a log, a progress bar on a terminal."""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

tqdm.monitor_interval = 0  # its thread would stand in the way of processes that fork


_muted = False


def mute() -> None:
    """Say nothing from here on: of several processes that work together, one speaks."""
    global _muted
    _muted = True


def say(text: str) -> None:
    """One line now, above the progress bar if there is one."""
    if not _muted:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


class Progress:
    """A line every `interval` steps, and at the last, with speed and time left."""

    def __init__(self, step: int, max_steps: int, interval: int, tokens_per_step: int):
        self.first, self.max_steps, self.interval = step, max_steps, interval
        self.tokens_per_step = tokens_per_step
        self.start = time.perf_counter()
        self.bar = tqdm(
            total=max_steps,
            initial=step,
            unit="step",
            disable=_muted or not sys.stderr.isatty(),
            leave=False,
        )

    def show(self, record: dict[str, Any], average_loss: float, remark: str = "") -> None:
        """Report one finished step, with a remark behind its figures."""
        self.bar.update(1)
        step = record["step"]
        if step % self.interval == 0 or step == self.max_steps:
            elapsed, done = self.elapsed_s(), step - self.first
            say(
                f"step {step:>{len(str(self.max_steps))}}/{self.max_steps}"
                f"  loss {record['train_loss']:.4f}  average {average_loss:.4f}"
                f"  lr {record['learning_rate']:.2e}  grad norm {record['grad_norm']:.3f}"
                f"  {done * self.tokens_per_step / elapsed:,.0f} tokens/s"
                f"  ETA {duration((self.max_steps - step) * elapsed / done)}{remark}"
            )
        if record.get("valid_loss") is not None:
            say(f"step {step}: validation loss {record['valid_loss']:.4f}")

    def elapsed_s(self) -> float:
        """Seconds since the first step of this process."""
        return time.perf_counter() - self.start

    def close(self) -> None:
        """Take the bar away."""
        self.bar.close()


class ByteProgress:
    """How much of some bytes is done, how fast, and how long it will take: a line each interval."""

    def __init__(self, what: str, total_bytes: int, interval_s: float = 10.0):
        self.what, self.total, self.interval_s = what, total_bytes, interval_s
        self.done, self.start = 0, time.perf_counter()
        self.told = self.start
        self.bar = tqdm(
            desc=what, total=total_bytes, unit="B", unit_scale=True, leave=False,
            disable=not sys.stderr.isatty(),
        )  # fmt: skip

    def show(self, n_bytes: int) -> None:
        """So many more are done."""
        self.bar.update(n_bytes)
        self.done += n_bytes
        now = time.perf_counter()
        if self.bar.disable and now - self.told >= self.interval_s:
            self.told = now
            speed = max(1, self.done) / (now - self.start)  # the first files may all be empty
            say(
                f"{self.what} {self.done / 1e6:,.0f} of {self.total / 1e6:,.0f} MB"
                f"  {speed / 1e6:,.1f} MB/s  ETA {duration((self.total - self.done) / speed)}"
            )

    def close(self) -> None:
        """Take the bar away; say how fast it was if it took long enough to be asked."""
        self.bar.close()
        elapsed = time.perf_counter() - self.start
        if elapsed >= 1:
            speed = self.done / elapsed / 1e6
            say(f"{self.what}: {self.done / 1e6:,.1f} MB in {duration(elapsed)}, {speed:,.1f} MB/s")


def count(n: int, what: str) -> str:
    """A number of things in words: "1 run", "2,000 runs"."""
    return f"{n:,} {what}{'s' * (n != 1)}"


def few(words: Sequence[str], most: int = 3) -> str:
    """Join the first few words, with the number of the others: "a, b, c and 2 more"."""
    rest = len(words) - most
    return ", ".join(words[:most]) + f" and {rest} more" * (rest > 0)


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """What differs between two mappings, by key, as "before -> now"."""
    names = sorted(name for name in {**before, **now} if before.get(name) != now.get(name))
    return {name: f"{_short(before.get(name))} -> {_short(now.get(name))}" for name in names}


def _short(value: Any) -> str:
    shown = value if isinstance(value, str) else json.dumps(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def duration(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
