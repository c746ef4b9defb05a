"""Write all results of a run to one page: `python -m tools.report` writes metrics/report.html.

    python -m tools.report --compare REV    beside another run: metrics/report-compare.html

No stage of dvc.yaml does this, because the page shows times, which do not reproduce. It reads the
stages' outputs without torch, in a second. DVC has all of another revision but its times.

    metrics/, params.yaml, provenance --> RunResults --page.py, page.html--> metrics/report.html
"""

import argparse
import csv
import io
import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from lm.base.console import say
from lm.base.errors import InputError, one_line_errors
from lm.base.files import atomic_write, require_file, sha256_file
from lm.base.params import parse_yaml
from lm.base.result_files import COUNT, MAYBE, SHAPES, SOME, require_shape
from lm.base.tables import DIVERGED
from lm.runs.history import COLUMNS
from tools.report.page import Rows, RunResults, page
from tools.report.vega import script
from tools.repository import commit_of, git, is_under_git, opened, run_git

ONE, TWO = Path("metrics/report.html"), Path("metrics/report-compare.html")
CURVES_ALONE = {  # keys of metrics/train.json if the run diverged, perhaps in its first step
    **dict.fromkeys(("step", "tokens"), COUNT),
    **dict.fromkeys(("parameters", DIVERGED), SOME),
    **dict.fromkeys(("train_loss", "valid_loss"), MAYBE),
}
CALIBRATION = ("above", "up_to", "tokens", "confidence", "accuracy")
Read = Callable[[str], bytes]


def read_run(name: str, read: Read, commit: str, clocks: bool) -> RunResults:
    """Return the results of a run. Raises InputError for a file that is missing or torn."""

    def parsed(file: str) -> Any:
        data = read(file)
        try:
            content = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{file}: not valid JSON ({error}); run `make repro`") from None
        diverged = isinstance(content, dict) and DIVERGED in content
        require_shape(content, CURVES_ALONE if diverged else SHAPES[Path(file).name], file)
        return content

    def rows(file: str, columns: Iterable[str]) -> Rows:
        data = read(file)
        try:
            table = csv.DictReader(io.StringIO(data.decode()))
            return [{key: float(row[key]) for key in columns} for row in table]
        except (ValueError, TypeError, KeyError, csv.Error):
            raise InputError(f"{file}: not a table of numbers; run `make repro`") from None

    curves, train = rows("metrics/curves.csv", COLUMNS), parsed("metrics/train.json")
    params = parse_yaml(read("params.yaml").decode(), "params.yaml")
    run = RunResults(name, commit, params, parsed("metrics/data.json"), train, curves)
    if DIVERGED in train:  # other results there are not of this run
        return run
    run.provenance = parsed("models/model/provenance.json")
    run.evaluation = parsed("metrics/eval.json")
    run.positions = rows("metrics/loss_by_position.csv", ("position", "loss_nats"))
    run.calibration = rows("metrics/calibration.csv", CALIBRATION)
    run.samples, run.held_out = parsed("metrics/samples.json"), parsed("metrics/held_out.json")
    # times are of the last training here; DVC may have restored another run's results since
    last = ""
    with suppress(InputError):
        read("metrics/performance.json")
        last = repr(rows("metrics/wall_clock.csv", COLUMNS))
    if clocks and last == repr(curves):  # as text, since nan != nan
        run.performance = parsed("metrics/performance.json")
    return run


def workspace() -> RunResults:
    """Return the run whose results are in the workspace."""

    def read(name: str) -> bytes:
        require_file(Path(name), "; run `make repro`")
        return Path(name).read_bytes()

    commit = "none: not under git"
    if is_under_git(Path()):
        head = run_git(Path(), "rev-parse", "-q", "--verify", "HEAD").stdout
        commit = head.strip() or "none yet"
        if git("status", "--porcelain", "--untracked-files=no"):
            commit += ", with uncommitted changes"
    run = read_run("workspace", read, commit, clocks=True)
    for file, sha256 in run.provenance.get("code", {}).items():
        if not Path(file).is_file() or sha256_file(Path(file)) != sha256:
            run.changed_code.append(file)
    return run


def revision(name: str) -> RunResults:
    """Return a run that git and DVC know. Raises InputError if its results are not here."""
    with opened() as repo:
        from dvc_data.index import DataIndexDirError

        commit = commit_of(repo, name)
        with repo.switch(commit):

            def read(file: str) -> bytes:
                try:
                    return bytes(repo.dvcfs.read_bytes(file))
                except (FileNotFoundError, DataIndexDirError):
                    raise InputError(
                        f"{name}: {file}: not in git or DVC's cache; run `dvc pull`, or evaluate "
                        "that revision with this code"
                    ) from None

            return read_run(name, read, commit, clocks=False)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--compare", metavar="REV", help="a commit or an experiment by name")
    arguments = parser.parse_args()
    with one_line_errors():
        runs, target = [workspace()], ONE
        if arguments.compare is not None:
            runs, target = [revision(arguments.compare), *runs], TWO
        atomic_write(target, page(runs, script()).encode(), durable=False)
        say(f"Report in {target}")
