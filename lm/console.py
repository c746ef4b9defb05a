"""What a training run says: plain lines in a log, a progress bar as well on a terminal."""

import sys
import time
from typing import Any

from tqdm import tqdm


def say(text: str) -> None:
    """One line now, above the progress bar if there is one."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


class Progress:
    """A line every `interval` steps, and at the last, with speed and time left."""

    def __init__(self, step: int, max_steps: int, interval: int, tokens_per_step: int):
        self.first, self.max_steps, self.interval = step, max_steps, interval
        self.tokens_per_step = tokens_per_step
        self.start = time.perf_counter()
        self.bar = tqdm(
            total=max_steps, initial=step, unit="step", disable=not sys.stderr.isatty(), leave=False
        )

    def show(self, record: dict[str, Any], average_loss: float) -> None:
        """Report one finished step."""
        self.bar.update(1)
        step = record["step"]
        if step % self.interval == 0 or step == self.max_steps:
            elapsed, done = self.elapsed_s(), step - self.first
            say(
                f"step {step:>{len(str(self.max_steps))}}/{self.max_steps}"
                f"  loss {record['train_loss']:.4f}  average {average_loss:.4f}"
                f"  lr {record['learning_rate']:.2e}  grad norm {record['grad_norm']:.3f}"
                f"  {done * self.tokens_per_step / elapsed:,.0f} tokens/s"
                f"  ETA {duration((self.max_steps - step) * elapsed / done)}"
            )
        if record.get("valid_loss") is not None:
            say(f"step {step}: validation loss {record['valid_loss']:.4f}")

    def elapsed_s(self) -> float:
        """Seconds since the first step of this process."""
        return time.perf_counter() - self.start

    def close(self) -> None:
        """Take the bar away."""
        self.bar.close()


def duration(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
