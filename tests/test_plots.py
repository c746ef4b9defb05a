"""Curves: overlaid, drawn without a network, as files, and while the training runs."""

import csv
import io
import json
import os
import re
import shutil
import signal
import xml.etree.ElementTree as ET
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

from lm.runs.checkpoint import read_extra
from lm.runs.history import COLUMNS
from tests.browser import BROWSER, needs_browser
from tests.kill import (
    Victim,
    commit,
    copied,
    dvc,
    git,
    heal,
    litter,
    outputs,
    resumed_at,
    run,
    running_stage,
    survivors,
    versioned,
)

STEPS, INTERVAL = 200, 20  # of validations and checkpoints
# of two revisions; training and validation are two lines each
LINES = {"loss": 4, "loss by wall-clock": 4, "loss by tokens": 4,
         "learning rate": 2, "gradient norm": 2, "loss by position": 2}  # fmt: skip
SVG = "{http://www.w3.org/2000/svg}"


def draw(project, *revisions, code=0):
    done = run(project, "python", "-m", "tools.report.plots", *revisions)
    assert done.returncode == code, done.stdout
    return done.stdout


def dvc_json(project, *arguments):
    """What a command prints as JSON, among what it says on stderr."""
    output = dvc(project, *arguments, "--json")
    return json.JSONDecoder().raw_decode(output, re.search(r"^[\[{]", output, re.M).start())[0]


def rows(project, name="metrics/curves.csv"):
    return list(csv.DictReader(io.StringIO(project.read(name).decode())))


@contextmanager
def stopped(project, *command):
    """A command whose training stands still in the middle; killed afterwards."""
    victim = Victim(project, *command)
    victim.wait_for("Model has")
    stage = running_stage(project)
    victim.wait_for(f"step  50/{STEPS}")
    stage.send_signal(signal.SIGSTOP)
    yield
    os.killpg(victim.process.pid, signal.SIGKILL)
    victim.wait()
    assert survivors(project) == []


class Compared:
    """A project with a committed run, which was killed once, and the experiment `faster`."""

    def __init__(self, folder):
        self.project = project = versioned(folder, STEPS, INTERVAL, INTERVAL)
        project.set("evaluate.max_new_tokens", 1)
        dvc(project, "repro", "corpus", "tokens")
        commit(project)
        with stopped(project, "dvc", "repro"):
            self.shown = dvc_json(project, "metrics", "show")
            self.experiments = dvc_json(project, "exp", "show")
            self.drawn = dvc_json(project, "plots", "show")["data"]
            self.last_row = rows(project)[-1]
        (store,) = (project.folder / ".dvc" / "tmp" / "lm-clock").iterdir()
        times = csv.DictReader(io.StringIO(store.read_text()))
        self.times_before_the_kill = [row["elapsed_s"] for row in times]
        heal(project)
        self.status = dvc_json(project, "status", "train")
        self.resumed = resumed_at(dvc(project, "repro"))
        self.litter, self.ended = litter(project), outputs(project)
        self.curves, self.times = rows(project), rows(project, "metrics/wall_clock.csv")
        commit(project)
        dvc(project, "exp", "run", "-n", "faster", "-S", "train.lr=2e-2")
        self.files = draw(project, "HEAD", "faster")


@pytest.fixture(scope="session")
def shared(made_once):
    return made_once("plots", lambda folder: Compared(folder / "project"))


@pytest.fixture
def project(shared, tmp_path):
    project = copied(shared.project, tmp_path / "project")
    yield project
    project.close()


def test_a_running_training_shows_its_metrics_and_curves(shared):
    step = int(shared.last_row["step"])
    assert 40 <= step < STEPS
    (train,) = (rev["data"]["metrics/train.json"] for rev in shared.shown.values())
    assert train["data"]["step"] == step
    assert train["data"]["valid_loss"] > 0
    workspace = shared.experiments[0]["data"]["metrics"]["metrics/train.json"]
    assert workspace == train
    points = shared.drawn["loss by tokens"][0]["content"]["data"]["values"]
    assert max(int(point["step"]) for point in points) == step


def test_a_killed_training_leaves_no_results_and_goes_on_to_the_same_bytes(shared, project):
    (changes,) = (c["changed outs"] for c in shared.status["train"] if "changed outs" in c)
    assert changes["metrics/curves.csv"] == changes["metrics/train.json"] == "modified"
    assert changes["models/model"] == "deleted"
    assert 0 < shared.resumed < STEPS
    assert shared.litter == []
    git(project, "checkout", "-q", ".")
    project.set("train.lr", 1e-2)
    project.forget_runs()
    project.prepare("train")
    undisturbed = outputs(project)
    names = {
        name for name in undisturbed if name.startswith(("models/model/", "models/checkpoints/"))
    }
    names |= {"metrics/curves.csv", "metrics/train.json"}
    assert len(names) > 6
    assert {n: undisturbed[n] for n in names} == {n: shared.ended[n] for n in names}


def test_the_clock_goes_on_after_a_kill_and_is_in_no_output(shared, project):
    times = [float(row["elapsed_s"]) for row in shared.times]
    assert times == sorted(times)
    assert 0 < times[0] < times[-1] < 3600  # seconds
    kept = shared.times_before_the_kill[: shared.resumed]
    assert [row["elapsed_s"] for row in shared.times[: shared.resumed]] == kept
    without = [{k: v for k, v in row.items() if k != "elapsed_s"} for row in shared.times]
    assert without == shared.curves
    assert len(without) == STEPS
    assert "wall_clock" not in project.read("dvc.lock").decode()
    assert "wall_clock" not in git(project, "status", "--porcelain", "--untracked-files=all")
    checkpoint = project.folder / "models" / "checkpoints" / "last.safetensors"
    extra = read_extra(checkpoint)
    assert set(extra["history"]["rows"][0]) == set(COLUMNS)
    assert "elapsed" not in json.dumps(extra)


def test_by_hand_results_stay_until_the_end_and_a_continued_run_continues_their_times(project):
    names = ("metrics/curves.csv", "metrics/train.json", "metrics/wall_clock.csv")
    before = [project.read(name) for name in names]
    process = project.train_until(f"step  50/{STEPS}", "train.lr=3e-3", warm=True)
    process.kill()
    process.wait()
    assert survivors(project) == []
    assert [project.read(name) for name in names] == before
    times = rows(project, "metrics/wall_clock.csv")
    last = "models/checkpoints/last.safetensors"
    done = project.stage("train", f"train.max_steps={STEPS + 5}", resume_from=last)
    assert done.returncode == 0, done.stderr
    continued = rows(project, "metrics/wall_clock.csv")
    assert continued[:STEPS] == times
    seconds = [float(row["elapsed_s"]) for row in continued]
    assert len(seconds) == STEPS + 5
    assert seconds == sorted(seconds)


def test_revisions_are_laid_over_each_other(shared, project):
    """What DVC plots is what the two runs wrote, once for each revision and kind of loss."""
    curves = {"HEAD": shared.curves, "faster": rows(project)}
    plots = {name: plot[0]["content"] for name, plot in
             dvc_json(project, "plots", "diff", "HEAD", "faster")["data"].items()}  # fmt: skip
    assert set(plots) == set(LINES) - {"loss by wall-clock"}
    for x, name in (("step", "loss"), ("tokens", "loss by tokens")):
        drawn = [(p["rev"], p["field"], p[x], p["dvc_inferred_y_value"])
                 for p in plots[name]["data"]["values"]]  # fmt: skip
        assert sorted(drawn) == sorted(
            (revision, field, row[x], row[field])
            for revision, curve in curves.items()
            for field in ("train_loss", "valid_loss")
            for row in curve
        )
    per_step = project.params["train"]["batch_size"] * project.params["model"]["context_length"]
    assert all(int(row["tokens"]) == int(row["step"]) * per_step for row in shared.curves)
    rates = {p["rev"]: float(p["learning_rate"])
             for p in plots["learning rate"]["data"]["values"] if p["step"] == "60"}  # fmt: skip
    assert rates["faster"] == pytest.approx(2 * rates["HEAD"])
    losses = dvc_json(project, "metrics", "diff", "HEAD", "faster")["metrics/train.json"]
    for side, revision in (("old", "HEAD"), ("new", "faster")):
        value = losses["valid_loss"][side]
        assert float(curves[revision][-1]["valid_loss"]) == pytest.approx(value, rel=1e-8)


def test_every_curve_lands_as_svg(shared, project):
    files = {Path(line).stem: project.folder / line for line in shared.files.splitlines()}
    assert files.pop("index").name == "index.html"
    assert set(files) == {name.replace(" ", "_") for name in LINES}
    for name, lines in LINES.items():
        svg = ET.parse(files[name.replace(" ", "_")])
        paths = [path for path in svg.iter(f"{SVG}path")
                 if path.get("aria-roledescription") == "line mark"]  # fmt: skip
        assert len(paths) == lines, name
        assert all(len(path.get("d").split("L")) >= STEPS // INTERVAL for path in paths)
        texts = {text.text for text in svg.iter(f"{SVG}text")}
        assert texts >= {"HEAD", "faster"} | ({"train_loss", "valid_loss"} if lines == 4 else set())
        unit = {"learning rate": "learning rate", "gradient norm": "L2 norm"}
        assert unit.get(name, "nats per token") in texts
    assert (project.folder / "plots" / "index.html").stat().st_size > 5e5


def test_a_run_of_another_machine_has_no_times_and_an_unknown_revision_is_one_line(project):
    shutil.rmtree(project.folder / ".dvc" / "tmp" / "lm-clock")
    assert (project.folder / "metrics" / "wall_clock.csv").exists()
    said = draw(project, "HEAD", "workspace")
    for revision in ("HEAD", "workspace"):
        assert f"{revision}: trained elsewhere, so no times for the loss by wall-clock time" in said
    assert "plots/loss.svg" in said
    assert "wall-clock.svg" not in said
    assert not (project.folder / "plots" / "loss_by_wall-clock.svg").exists()
    shutil.rmtree(project.folder / ".dvc" / "cache" / "files")
    said = draw(project, "HEAD", "workspace")
    assert "HEAD: some results are missing" in said
    assert "plots/loss.svg" in said
    curves = project.folder / "metrics" / "curves.csv"
    curves.write_text(curves.read_text() + "</script><script>,2,3,4,5,6\n")
    assert draw(project, code=2).startswith("error: loss: '<' in the data")
    said = draw(project, "HEAD", "nonsense", code=2)
    assert said.startswith("error: unknown Git revision 'nonsense'; ")
    assert said.count("\n") == 1


@pytest.fixture
def pages(project):
    """The pages that `dvc plots diff` and `make plots` make, with the plots on each."""
    dvc(project, "config", "--local", "plots.html_template", "plots-page.html")
    (project.folder / ".dvc" / "plots-page.html").unlink()
    draw(project, "--template")
    assert dvc(project, "plots", "diff", "HEAD", "faster").startswith("file://")
    names = {"dvc_plots": set(LINES) - {"loss by wall-clock"}, "plots": set(LINES)}
    return {project.folder / folder / "index.html": names[folder] for folder in names}


def test_the_pages_hold_vega_and_load_nothing(pages):
    for path, names in pages.items():
        text = path.read_text()
        assert text.count("vegaEmbed('#") == len(names)
        assert re.search(r"window\.vegaEmbed ?=", text)
        for outside in ('src="http', 'href="http', "cdn."):
            assert outside not in text


@needs_browser
def test_a_browser_draws_the_pages_and_asks_for_nothing_else(pages):
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"]
        )
        for path, names in pages.items():
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            asked, said = [], []
            page.on("request", lambda request, asked=asked: asked.append(request.url))
            page.on("console", lambda message, said=said: said.append(message.text))
            page.on("pageerror", lambda error, said=said: said.append(str(error)))
            page.goto(path.as_uri())
            for name in names:
                place = page.locator(f"[id='{name.replace(' ', '_')}']")
                place.locator(".mark-line path").first.wait_for(state="attached")
                assert place.locator(".mark-line path[d*=L]").count() == LINES[name]
                labels = place.locator(".role-legend-label text").all_text_contents()
                assert labels[:2] == ["HEAD", "faster"]
                assert labels[2:] == (["train_loss", "valid_loss"] if LINES[name] == 4 else [])
                box = place.locator("svg.marks").bounding_box()
                assert box["x"] >= 0
                assert box["x"] + box["width"] <= 1280
            assert (asked, said) == ([path.as_uri()], [])
            page.close()
        browser.close()
