"""Draw the top of the report for README: `python -m tools.report.picture` writes docs/report.png.

    metrics/report.html (`make report`) --headless Chromium--> docs/report.png

Chromium is the package `chromium` of Debian.
"""

import os
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

from lm.base.console import say
from lm.base.errors import EnvironmentFault, one_line_errors
from lm.base.files import atomic_write, require_file
from tools.report.report import ONE

PICTURE = Path("docs/report.png")
SIZE = "1200,1040"  # pixels: down to the first curve
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def screenshot(page: Path) -> bytes:
    """Return the top of a page as PNG. Raises EnvironmentFault if no Chromium draws it."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise EnvironmentFault(f"no {' or '.join(BROWSERS)} on PATH; install one and run again")
    with TemporaryDirectory() as scratch:
        shot = Path(scratch, "page.png")
        command = [browser, "--headless", "--hide-scrollbars", f"--user-data-dir={scratch}/user",
                   f"--window-size={SIZE}", f"--screenshot={shot}"]  # fmt: skip
        command += ["--no-sandbox"] if os.geteuid() == 0 else []  # it refuses to start for root
        done = subprocess.run(
            [*command, page.resolve().as_uri()], capture_output=True, text=True, timeout=60
        )
        if not shot.is_file():
            raise EnvironmentFault(f"{browser} wrote no picture: {done.stderr[-200:].strip()}")
        return shot.read_bytes()


def main() -> None:
    """Run the command line."""
    with one_line_errors():
        require_file(ONE, "; run `make report` to write it")
        atomic_write(PICTURE, screenshot(ONE))
        say(f"Picture in {PICTURE}: {PICTURE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
