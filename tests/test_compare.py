"""Is a difference larger than the seed noise? The statistics, the report, and real sweeps."""

import json
import re
import shutil
import signal
import statistics

import numpy as np
import pytest
import scipy  # its stats, which take seconds to import, when a test asks for them
import vl_convert

from lm.base.errors import InputError
from tests.kill import Victim, commit, git, living, run, survivors, versioned
from tests.project import ROOT
from tools.experiments.compare import BITS, LOSS, report
from tools.experiments.read import Experiment
from tools.experiments.statistics import compare, difference, t_interval
from tools.experiments.sweep import points


@pytest.fixture
def project(tmp_path):
    """Committed, never run; `make` finds its environment ready."""
    project = versioned(tmp_path / "project")
    shutil.copy(ROOT / "Makefile", project.folder)
    for name in ("requirements.txt", "constraints.txt", ".venv/.ready"):
        (project.folder / name).parent.mkdir(exist_ok=True)
        (project.folder / name).touch()
    commit(project)
    yield project
    survivors(project, 0)


def sweep(project, **variables):
    return ("make", "sweep", *(f"{name}={value}" for name, value in variables.items()))


def logs(project):
    """What the experiments have written, the last one last."""
    files = (project.folder / ".dvc/tmp/exps/run").glob("*/*.out")
    return "".join(f.read_text() for f in sorted(files, key=lambda f: f.stat().st_mtime))


def test_make_sweep_runs_the_grid_once_and_tells_what_dvc_recorded(project):
    alone = run(project, *sweep(project, SET="train.lr=1e30", SEEDS="1"), timeout=300)
    how = "diverged at step 2: loss is nan"
    assert alone.returncode == 0, alone.stdout
    assert alone.stdout.count(f"train.lr=1e30 train.seed=1: {how} (") == 1
    command = sweep(project, SET="train.lr=1e-3,1e-2", SEEDS="1,2")
    done = run(project, *command, timeout=300)
    assert done.returncode == 0, done.stdout
    assert logs(project).count("Running stage 'tokens'") == 1
    assert logs(project).count("Running stage 'train'") == 5
    table = {float(cells[0]): cells for cells in cells_of(done.stdout)}
    assert table.pop(1e30)[1:] == ["1", "", "", "", how, ""]
    assert "Left out" not in done.stdout
    kept = project.folder / re.findall(r"curves up to there: .*/(\.dvc/tmp/\S+)", logs(project))[0]
    assert [row.split(",")[0] for row in kept.read_text().splitlines()] == ["step", "1"]
    losses = shown_by_dvc(project)
    assert {len(seeds) for seeds in losses.values()} == {2}
    for lr, seeds in losses.items():
        mean, spread = statistics.mean(seeds.values()), statistics.stdev(seeds.values())
        assert table[lr][1:4] == ["2", f"{mean:.4f}", f"{spread:.4f}"]
    better, worse = sorted(losses, key=lambda lr: sum(losses[lr].values()))
    assert table[better][5] == "best"
    theirs = scipy.stats.ttest_rel(
        *[[losses[lr][seed] for seed in (1, 2)] for lr in (worse, better)]
    )
    ends = theirs.confidence_interval()
    assert f"(95% CI {ends.low:.4f} to {ends.high:.4f})" in table[worse][5]
    assert project.read("metrics/compare.md").decode() in done.stdout
    assert b"train.lr" in project.read("metrics/compare.svg")
    assert git(project, "status", "--porcelain", "-uno") == ""
    again = run(project, *command)
    assert again.returncode == 0
    assert again.stdout.startswith("4 in the grid, 0 to queue\n**Validation loss"), again.stdout


@pytest.mark.soak
def test_results_of_changed_code_are_made_anew_and_stand_apart(project):
    assert (
        run(project, *sweep(project, SET="train.lr=1e-2", SEEDS="1,2"), timeout=300).returncode == 0
    )
    code = project.folder / "stages" / "corpus.py"  # its output stays the same
    code.write_text(code.read_text() + "# changed\n")
    done = run(project, *sweep(project, SET="train.lr=1e-2", SEEDS="1"), timeout=300)
    assert "Not committed, but the experiments use it: stages/corpus.py" in done.stdout
    assert "1 in the grid, 1 to queue" in done.stdout
    assert "Stage 'train' is cached" in logs(project)
    assert "The code differs" in done.stdout
    assert sorted(cells[1] for cells in cells_of(done.stdout)) == ["1", "2"]


def shown_by_dvc(project):
    """The losses by learning rate and seed, from `dvc exp show`."""
    shown = json.loads(run(project, "dvc", "exp", "show", "--json").stdout)
    found = {}
    for several in shown[1]["experiments"]:
        if (several["executor"] or {}).get("state") == "failed":
            continue
        data = several["revs"][0]["data"]
        train = data["params"]["params.yaml"]["data"]["train"]
        loss = data["metrics"]["metrics/eval.json"]["data"]["loss_nats"]
        found.setdefault(train["lr"], {})[train["seed"]] = loss
    return found


def cells_of(text):
    """The cells of a Markdown table's rows, without its head."""
    table = [line for line in text.split("\n") if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]


def runs(*losses, first=1):
    """The losses of one setting, by seed."""
    return dict(enumerate(losses, start=first))


def test_a_difference_worked_out_by_hand():
    """Differences 1, 2, 3: mean 2, standard error 1 / sqrt(3); t(0.975, 2) = 4.3027 (tables)."""
    d = difference(runs(11.0, 22.0, 33.0), runs(10.0, 20.0, 30.0))
    assert d.mean == 2.0
    assert d.low == pytest.approx(2 - 4.3027 / 3**0.5, abs=1e-4)
    assert d.high == pytest.approx(2 + 4.3027 / 3**0.5, abs=1e-4)
    assert d.margin == pytest.approx(4.3027 / 3**0.5, abs=1e-4)
    assert (d.paired, d.shown) == (True, False)
    assert difference(runs(11.0, 22.1, 33.0), runs(10.0, 21.0, 32.0)).shown


@pytest.mark.parametrize("comparisons", [1, 6])
def test_shared_seeds_are_compared_as_scipy_ttest_rel_does(comparisons):
    rng = np.random.default_rng(0)
    for n in (2, 3, 8):
        a, b = rng.normal(3.3, 0.02, (2, n))
        theirs = scipy.stats.ttest_rel(a, b).confidence_interval(1 - 0.05 / comparisons)
        shuffled = {seed: runs(*a)[seed] for seed in range(n, 0, -1)}
        ours = difference(shuffled, runs(*b), comparisons)
        assert (ours.low, ours.high) == pytest.approx(tuple(theirs), rel=1e-9)
        assert ours.paired


@pytest.mark.parametrize("comparisons", [1, 6])
def test_other_seeds_are_compared_as_scipy_welch_does(comparisons):
    rng = np.random.default_rng(1)
    for n, m in ((2, 2), (3, 5), (9, 4)):
        a, b = rng.normal(3.3, 0.1, n), rng.normal(3.2, 0.01, m)
        theirs = scipy.stats.ttest_ind(a, b, equal_var=False)
        theirs = theirs.confidence_interval(1 - 0.05 / comparisons)
        ours = difference(runs(*a), runs(*b, first=100), comparisons)
        assert (ours.low, ours.high) == pytest.approx(tuple(theirs), rel=1e-9)
        assert not ours.paired


def test_only_shared_seeds_are_paired_and_few_of_many_are_not_enough():
    a, b = runs(1.0, 2.0, 4.0), runs(0.9, 1.8, 3.7, 9.0, 9.0)
    theirs = scipy.stats.ttest_rel([1.0, 2.0, 4.0], [0.9, 1.8, 3.7]).confidence_interval()
    assert (difference(a, b).low, difference(a, b).high) == pytest.approx(tuple(theirs))
    assert not difference(runs(1.0, 2.0, 4.0, 3.0), runs(1.0, 2.0, 4.0, 3.0, first=3)).paired


def test_a_mean_has_the_interval_of_tables():
    """Mean 3.225, standard deviation 0.18930, 4 values; t(0.975, 3) = 3.18245 (tables)."""
    ends = [3.225 + sign * 3.18245 * 0.18930 / 2 for sign in (-1, 1)]
    assert t_interval(0.95, [3.1, 3.2, 3.5, 3.1]) == pytest.approx(ends, abs=1e-4)


def test_identical_results_are_no_difference_and_one_seed_is_no_evidence():
    best, (same, nothing, alone) = compare([runs(3.0, 3.1), runs(3.0, 3.1), runs(1.0)])
    assert best == 0
    assert (same, alone) == (None, None)
    assert (nothing.mean, nothing.low, nothing.high, nothing.shown) == (0, 0, 0, False)
    assert nothing.seeds_needed is None
    assert compare([runs(3.0), runs(2.0)]) == (None, [None, None])


def simulated(rng, sweeps, means, seeds, *, spread=(), shared=0.0, apart=False):
    """Sweeps of normal losses; `shared`: how much of a seed's noise all settings have alike."""
    spread = np.array(spread or [1.0] * len(means))[:, None]
    for _ in range(sweeps):
        noise = rng.standard_normal((len(means), seeds)) * spread
        noise += shared * rng.standard_normal(seeds)
        table = np.array(means)[:, None] + noise
        yield [runs(*row, first=100 * i if apart else 1) for i, row in enumerate(table)]


@pytest.mark.parametrize(
    ("settings", "seeds", "options"),
    [
        (2, 3, {}),
        (3, 3, {"shared": 2.0}),
        (6, 5, {}),
        (4, 4, {"apart": True}),
        (3, 5, {"apart": True, "spread": [0.2, 1.0, 5.0]}),
    ],
)
def test_equal_settings_are_seldom_found_to_differ(settings, seeds, options):
    """In at most 5 % of sweeps anything is called worse than the best, though that was picked."""
    sweeps, means = 600, [0.0] * settings
    found = sum(
        any(d.shown for d in compare(sweep)[1] if d)
        for sweep in simulated(np.random.default_rng(2), sweeps, means, seeds, **options)
    )
    assert found / sweeps < 0.05 + 3 * (0.05 * 0.95 / sweeps) ** 0.5


def test_without_a_correction_equal_settings_would_often_be_found_to_differ():
    """What the rate above would be, by scipy: the correction is needed and not for show."""
    sweeps, found = 500, 0
    for sweep in simulated(np.random.default_rng(3), sweeps, [0.0] * 6, 5):
        values = np.array([list(losses.values()) for losses in sweep])
        best = values[values.mean(axis=1).argmin()]
        others = [row for row in values if not np.array_equal(row, best)]
        found += bool(
            (scipy.stats.ttest_rel(others, [best] * len(others), axis=1).pvalue < 0.05).any()
        )
    assert found / sweeps > 0.2


def test_a_large_difference_is_found_and_shared_noise_does_not_hide_it():
    for options in ({}, {"shared": 20.0}):
        sweeps = list(simulated(np.random.default_rng(4), 200, [0.0, 6.0], 4, **options))
        found = [compare(sweep) for sweep in sweeps]
        assert sum(best == 0 and ds[1].shown for best, ds in found) > 190


@pytest.mark.parametrize("apart", [False, True])
def test_the_advised_number_of_seeds_shows_the_difference_in_eight_of_ten_sweeps(apart):
    rng, means = np.random.default_rng(5), [0.0, 1.0]
    (large,) = simulated(rng, 1, means, 2000, apart=apart)
    seeds = difference(large[1], large[0]).seeds_needed
    assert 5 < seeds < 40
    sweeps = list(simulated(rng, 500, means, seeds, apart=apart))
    assert 0.74 < sum(difference(b, a).shown for a, b in sweeps) / len(sweeps) < 0.9


def experiment(lr, seed, loss, name="", **more):
    settings = {"train.lr": lr, "train.seed": seed, "code": "c0de", "text": "7e47"}
    found = Experiment(name or f"{lr}-{seed}", "0" * 40, "success", settings)
    found.made_by = settings | more.pop("made_by", {})
    found.metrics = {LOSS: loss, BITS: loss / 2}
    for key, value in more.items():
        setattr(found, key, value)
    return found


def sweep_of(*rows):
    return [experiment(lr, s, loss) for lr, losses in rows for s, loss in runs(*losses).items()]


def test_the_report_says_what_the_numbers_allow():
    text, _ = report(
        [
            *sweep_of((0.01, (3.00, 3.10, 3.20)), (0.02, (3.31, 3.41, 3.52))),
            *sweep_of((0.03, (3.05, 3.05, 3.30)), (0.04, (2.5,))),
        ],
        None,
    )
    rows = {cells[0]: cells[1:] for cells in cells_of(text)}
    assert list(rows) == ["0.01", "0.03", "0.02", "0.04"]
    assert rows["0.01"][:5] == ["3", "3.1000", "0.1000", "3.0000 to 3.2000", "best"]
    theirs = scipy.stats.ttest_rel([3.31, 3.41, 3.52], [3.0, 3.1, 3.2]).confidence_interval(
        1 - 0.05 / 3
    )
    interval = f"95% CI {theirs.low:.4f} to {theirs.high:.4f}"
    assert rows["0.02"][4] == f"worse than the best: +0.3133 ({interval})"
    assert rows["0.03"][4].startswith("no difference shown: +0.0333 (95% CI -")
    assert re.fullmatch(r"about \d+|> 200", rows["0.03"][5])
    assert rows["0.04"] == ["1", "2.5000", "", "", "one seed: nothing can be said", ""]
    assert "Compared by paired t over shared seeds (2 comparisons)." in text
    assert "over 3 pairs of settings" in text
    assert "winner's curse" in text
    assert "train.lr=0.04 is lower than the best, with one seed" in text


def test_a_result_counts_once_and_a_contradiction_is_told_not_averaged():
    once = sweep_of((0.01, (3.0, 3.1)), (0.02, (3.2, 3.3)))
    text, _ = report([*once, experiment(0.01, 1, 3.0, "copy")], None)
    assert text == report(once, None)[0]
    text, _ = report(once[:3], None)
    assert "nothing to compare with" in text
    assert "it takes two settings with two seeds each" in text
    text, _ = report([*once, experiment(0.01, 1, 3.4, "other")], None)
    assert [cells[:3] for cells in cells_of(text)] == [
        ["0.02", "2", "3.2500"],
        ["0.01", "1", "3.1000"],
    ]
    assert "seed 1 gave different results, left out: 3.0 (0.01-1), 3.4 (other)" in text


def test_results_of_other_code_text_or_environment_are_not_mixed_in_silence():
    once = sweep_of((0.01, (3.0, 3.1)), (0.02, (3.2, 3.3)))
    text, _ = report([*once, experiment(0.01, 3, 3.9, made_by={"code": "new"})], None)
    assert ["new", "0.01", "1"] in [cells[:3] for cells in cells_of(text)]
    assert "The code differs" in text
    text, _ = report([*once, experiment(0.01, 3, 3.9, made_by={"text": "new"})], None)
    assert ["new", "0.01", "1"] in [cells[:3] for cells in cells_of(text)]
    assert "losses on two texts cannot be compared" in text
    for i, one in enumerate(once):
        one.environment = {"torch": "2", "device": "cpu" if i else "cuda"}
    assert "The environments differ in device" in report(once, None)[0]


def test_what_cannot_be_used_is_named():
    once = sweep_of((0.01, (3.0, 3.1)), (0.02, (3.2, 3.3)))
    others = [experiment(0.03, i, 3.0, state, state=state, metrics={}, made_by={})
              for i, state in enumerate(("failed", "running", "queued"))]  # fmt: skip
    infinite, missing = experiment(0.04, 1, float("inf"), "inf"), experiment(0.04, 2, 1.0, "none")
    missing.metrics = {}
    text, _ = report([*once, *others, infinite, missing], None)
    for state in ("failed", "running", "queued"):
        assert f"Left out, {state}: {state}." in text
    assert f"1 {LOSS} is not finite, left out: inf." in text
    assert f"1 without {LOSS}, left out: none." in text
    assert len(cells_of(text)) == 2


def test_models_with_different_tokenizers_are_compared_in_bits_per_byte():
    once = sweep_of((0.01, (3.0, 3.1)), (0.02, (3.2, 3.3)))
    once[0].tokenizer = once[1].tokenizer = "larger"
    text, _ = report(once, None)
    assert BITS in text
    assert "figures per token cannot be compared; so these are bits per byte" in text
    assert "use --metric eval.bits_per_byte" in report(once, "eval.loss_nats")[0]


def test_a_metric_is_found_by_each_of_its_names_or_refused():
    once = sweep_of((0.01, (3.0, 3.1)), (0.02, (3.2, 3.3)))
    for name in (BITS, "eval.bits_per_byte", "bits_per_byte"):
        assert f"(`{BITS}`)" in report(once, name)[0]
    with pytest.raises(InputError, match=r"unknown metric; there are eval.bits_per_byte, eval"):
        report(once, "eval.bleu")
    with pytest.raises(InputError, match=r"fewer than two finished experiments"):
        report(once[:1], None)


@pytest.mark.parametrize(
    ("made_by", "scale"),
    [
        ([{"train.warmup_steps": n} for n in (10, 20)], "linear"),
        ([{"train.optimizer": name} for name in ("adamw", "muon")], None),
        ([{"train.lr": lr} for lr in (1, 2)], "log"),
        ([{"train.lr": lr, "model.norm": n} for lr in (1, 2) for n in ("rmsnorm", "none")], "log"),
        ([{"train.batch_size": n} for n in (8, 128)], "log"),
    ],
)
def test_the_plot_has_every_seed_at_its_setting(made_by, scale):
    results = [experiment(0, s, 3 + i / 10 + s / 100, made_by={"train.lr": 0} | setting)
               for i, setting in enumerate(made_by) for s in (1, 2, 3)]  # fmt: skip
    _, spec = report(results, None)
    svg = vl_convert.vegalite_to_svg(spec)
    assert svg.count('aria-roledescription="point"') == len(results) + len(made_by)
    assert spec["encoding"]["x"].get("scale", {}).get("type") == scale
    assert "Validation loss, nats per token" in svg
    assert next(iter(made_by[0])) in svg


def test_an_interval_that_dwarfs_the_seeds_does_not_set_the_axis():
    """Two seeds 0.01 apart have one of 0.127; the axis goes beyond all seeds by their span."""
    _, spec = report(sweep_of((0.01, (3.00, 3.01)), (0.02, (3.02, 3.03))), None)
    low, high = 3.00 - 0.03, 3.03 + 0.03
    assert spec["encoding"]["y"]["scale"]["domain"] == pytest.approx(
        [low - 0.05 * 0.09, high + 0.05 * 0.09]
    )


def test_a_grid_goes_seed_by_seed_and_refuses_a_gap():
    assert points(["train.lr=1,2,1", "train.seed=1,2"]) == [
        ("train.lr=1", "train.seed=1"),
        ("train.lr=2", "train.seed=1"),
        ("train.lr=1", "train.seed=2"),
        ("train.lr=2", "train.seed=2"),
    ]
    with pytest.raises(InputError, match="expected section.key=value,value"):
        points(["train.lr=1,,2"])


@pytest.mark.soak  # a minute
@pytest.mark.parametrize("how", ["ctrl-c", "kill"])
def test_a_stopped_sweep_goes_on_and_failures_are_named(project, how):
    project.set("train.max_steps", 400)  # not committed
    (project.folder / "lm" / "new.py").touch()
    command = sweep(project, SET="data.valid_fraction=0.2,2", SEEDS="1")
    victim = Victim(project, *command)
    victim.wait_until(lambda: "step  60/400" in logs(project))
    if how == "ctrl-c":
        victim.kill("group", signal.SIGINT)
    else:
        for process in living(project):
            process.kill()
    assert victim.wait() != 0
    assert survivors(project) == []
    if how == "ctrl-c":
        assert "\nstopped, training is saved; run the same command again" in victim.output()
        assert "stopped, saved at step" in logs(project)
    done = run(project, *command, timeout=300)
    assert done.returncode != 0
    assert "Not committed, but the experiments use it: params.yaml" in done.stdout
    assert "Not in git, so the experiments lack it: lm/new.py" in done.stdout
    assert "Resumed at step" in logs(project)
    failed = (
        r"error: 1 of 2 experiments failed: data.valid_fraction=2 train.seed=1 \(\S+\); `dvc queue"
    )
    assert re.search(failed, done.stdout)
    assert "error: params.yaml: data.valid_fraction = 2" in done.stdout


def test_what_cannot_be_compared_is_told_in_one_line(tmp_path):
    project = versioned(tmp_path / "project")
    for command, words in (
        (("tools.experiments.compare",), "fewer than two finished experiments"),
        (("tools.experiments.compare", "no-such-rev"), "unknown Git revision 'no-such-rev'"),
        (
            ("tools.experiments.sweep", "train.lrr=1,2"),
            "unknown key train.lrr (did you mean train.lr?)",
        ),
    ):
        done = run(project, "python", "-m", *command)
        assert done.returncode == 2
        assert done.stdout.startswith("error: ")
        assert words in done.stdout
        assert done.stdout.count("\n") == 1
    shutil.rmtree(project.folder / ".git")
    for state in ("no git", "no commit"):
        done = run(project, "python", "-m", "tools.experiments.compare")
        code = 3 if state == "no git" else 2
        assert (done.returncode, done.stdout.count("\n")) == (code, 1), (state, done.stdout)
        git(project, "init", "-q")
