"""Draw every curve as SVG and on a page that needs no network; several revisions share a chart.

    python -m tools.report.plots [REV ...]    draw experiments, commits, workspace (the default)
    python -m tools.report.plots --template   write the page that DVC's `plots show` and `diff` fill

DVC draws what dvc.yaml and .dvc/plots/curve.json say. This adds the loss by wall-clock time. Times
do not reproduce, so no stage may declare them, and DVC has none for other revisions.
"""

import argparse
import json
from pathlib import Path

import vl_convert
from dvc.fs import LocalFileSystem
from dvc.render.match import match_defs_renderers
from dvc.repo import Repo
from dvc.repo.experiments.brancher import switch_repo
from dvc_data.index import DataIndexDirError
from dvc_render import VegaRenderer, render_html

from lm.base.console import say
from lm.base.errors import InputError, one_line_errors
from lm.base.files import atomic_write
from lm.base.run_id import clock_file
from lm.runs.history import Clock
from stages.run import RUNS_ROOT
from tools.report.vega import VEGA_LITE, script
from tools.repository import opened

PLOTS, TEMPLATE = Path("plots"), Path(".dvc/plots-page.html")


def write_template() -> None:
    """Write the page into which DVC puts its plots; it contains Vega instead of loading it."""
    page = Path(__file__).with_name("plots.html").read_text()
    atomic_write(TEMPLATE, page.replace("VEGA", script()).encode())


def draw(revisions: list[str]) -> list[Path]:
    """Write plots/*.svg and plots/index.html. Raises InputError for an unknown revision."""
    with opened() as repo:
        found = match_defs_renderers(
            repo.plots.show(revs=revisions), templates_dir=repo.plots.templates_dir
        )
        clocks = {revision: clock(repo, revision) for revision in revisions}
    for revision in sorted({revision for each in found for revision in each.source_errors}):
        say(
            f"{revision}: some results are missing; if the run has ended, `dvc pull` or "
            "`dvc repro` gets them"
        )
    plots = [each.renderer for each in found if each.renderer.datapoints]
    if not plots:
        raise InputError(f"no curves of {', '.join(revisions)}; run `dvc repro`")
    for plot in plots:
        if "<" in json.dumps([plot.name, plot.datapoints]):  # the page would run it as HTML
            raise InputError(f"{plot.name}: '<' in the data or in a revision's name: not drawn")
    by_time = [by_wall_clock(plot, clocks) for plot in plots if plot.name == "loss"]
    plots[1:1] = [plot for plot in by_time if plot.datapoints]
    PLOTS.mkdir(exist_ok=True)
    for old in PLOTS.glob("*.svg"):
        old.unlink()
    written = []
    for plot in plots:
        svg = vl_convert.vegalite_to_svg(plot.get_filled_template(), vl_version=VEGA_LITE)
        written.append(PLOTS / f"{plot.name.replace(' ', '_')}.svg")
        atomic_write(written[-1], svg.encode())
    if not TEMPLATE.exists():
        write_template()
    render_html(plots, PLOTS / "index.html", TEMPLATE)
    return [*written, PLOTS / "index.html"]


def clock(repo: Repo, revision: str) -> Clock:
    """Return the times of a revision's training; empty if this machine does not have them."""
    with switch_repo(repo, revision) as (there, _):
        in_folder = isinstance(there.fs, LocalFileSystem)  # a workspace, or else a commit
        files, root = (there.fs, there.root_dir) if in_folder else (there.dvcfs, "")
        try:
            provenance = files.read_text(Path(root, "models/model/provenance.json").as_posix())
            times = clock_file(RUNS_ROOT, json.loads(provenance))
        except (FileNotFoundError, DataIndexDirError, ValueError):  # not in the cache, or torn
            if not in_folder:
                return Clock()
            times = Path(root, "metrics/wall_clock.csv")  # the training is still running
    return Clock.from_csv(times.read_bytes() if times.is_file() else b"")


def by_wall_clock(losses: VegaRenderer, clocks: dict[str, Clock]) -> VegaRenderer:
    """Return the plot of the losses by the time of training."""
    points = []
    for point in losses.datapoints:
        step = int(point["step"]) if point["step"].isdecimal() else -1
        if (elapsed_s := clocks[point["rev"]].elapsed_s.get(step)) is not None:
            points.append({**point, "elapsed_s": elapsed_s})
    known = [revision for revision in losses.get_revs() if clocks[revision].elapsed_s]
    for revision in losses.get_revs():
        if revision not in known:
            say(f"{revision}: trained elsewhere, so no times for the loss by wall-clock time")
    texts = {"title": "Loss by wall-clock time", "x": "elapsed_s", "x_label": "seconds of training"}
    properties = {**losses.properties, **texts, "revs_with_datapoints": known}
    return VegaRenderer(points, "loss by wall-clock", **properties)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("revisions", nargs="*", metavar="REV", default=["workspace"])
    parser.add_argument("--template", action="store_true", help="write the page for DVC to fill")
    arguments = parser.parse_args()
    with one_line_errors():
        if arguments.template:
            write_template()
        else:
            for path in draw(arguments.revisions):
                say(str(path))
