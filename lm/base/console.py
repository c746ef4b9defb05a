"""Print the messages of a long run: plain lines in a log, a progress bar on a terminal."""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

tqdm.monitor_interval = 0  # starts no thread: this process may fork
_muted = False


def mute() -> None:
    """Print nothing from now on: of several processes only rank 0 prints."""
    global _muted
    _muted = True


def say(text: str) -> None:
    """Print text at once, above the progress bar, unless this process is muted."""
    if not _muted:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


class Progress:
    """Show the progress of a training: a line with speed and time left every `interval` steps."""

    def __init__(self, step: int, max_steps: int, interval: int, tokens_per_step: int):
        self.first, self.max_steps, self.interval = step, max_steps, interval
        self.tokens_per_step = tokens_per_step
        self.start = time.perf_counter()
        hidden = _muted or not sys.stderr.isatty()
        self.bar = tqdm(total=max_steps, initial=step, unit="step", disable=hidden, leave=False)

    def show(self, record: dict[str, Any], average_loss: float, remark: str = "") -> None:
        """Count a finished step; print its figures, followed by `remark`, if a line is due."""
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
        """Return the seconds since this process began to train."""
        return time.perf_counter() - self.start

    def close(self) -> None:
        """Remove the bar."""
        self.bar.close()


class ByteProgress:
    """Show the progress through bytes: a line with speed and time left every `interval_s`."""

    def __init__(self, what: str, total_bytes: int, interval_s: float = 10.0):
        self.what, self.total, self.interval_s = what, total_bytes, interval_s
        self.done, self.start = 0, time.perf_counter()
        self.shown = self.start
        self.bar = tqdm(
            desc=what, total=total_bytes, unit="B", unit_scale=True, leave=False,
            disable=not sys.stderr.isatty(),
        )  # fmt: skip

    def show(self, n_bytes: int) -> None:
        """Count `n_bytes` more as done."""
        self.bar.update(n_bytes)
        self.done += n_bytes
        now = time.perf_counter()
        if self.bar.disable and now - self.shown >= self.interval_s:
            self.shown = now
            speed = max(1, self.done) / (now - self.start)  # the first files may all be empty
            say(
                f"{self.what} {self.done / 1e6:,.0f} of {self.total / 1e6:,.0f} MB"
                f"  {speed / 1e6:,.1f} MB/s  ETA {duration((self.total - self.done) / speed)}"
            )

    def close(self) -> None:
        """Remove the bar; print the speed if the work took a second or more."""
        self.bar.close()
        elapsed = time.perf_counter() - self.start
        if elapsed >= 1:
            speed = self.done / elapsed / 1e6
            say(f"{self.what}: {self.done / 1e6:,.1f} MB in {duration(elapsed)}, {speed:,.1f} MB/s")


def count(n: int, what: str) -> str:
    """Return a number with its noun: "1 run", "2,000 runs"."""
    return f"{n:,} {what}{'s' * (n != 1)}"


def few(words: Sequence[str], most: int = 3) -> str:
    """Join the first `most` words and count the others: "a, b, c and 2 more"."""
    rest = len(words) - most
    return ", ".join(words[:most]) + f" and {rest} more" * (rest > 0)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Return the keys whose values differ between two mappings, each with "before -> now"."""

    def short(value: Any) -> str:
        shown = value if isinstance(value, str) else json.dumps(value)
        return shown if len(shown) <= 60 else f"{shown[:57]}..."

    names = sorted(name for name in {**before, **now} if before.get(name) != now.get(name))
    return {name: f"{short(before.get(name))} -> {short(now.get(name))}" for name in names}


def duration(seconds: float) -> str:
    """Return seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
