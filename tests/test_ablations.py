"""`make ablations`: the variants of the model, one that diverges among them, and its page."""

import re
import shutil

import pytest

from lm.base.errors import InputError
from lm.base.params import load_params
from lm.base.sections import read_section
from lm.model.transformer import ModelConfig, TransformerLM
from tests.kill import commit, run, survivors, versioned
from tests.project import ROOT
from tests.test_compare import cells_of
from tools.experiments.ablations import page, variants
from tools.experiments.compare import BITS, LOSS
from tools.experiments.read import Experiment


def result(variant, seed, loss):
    made_by = {"train.seed": seed, "code": "c", "text": "t", "model.d_ff": len(variant)}
    metrics = {LOSS: loss, BITS: loss / 2, "metrics/train.json:parameters": 1000.0}
    return Experiment(f"{variant}-{seed}", "rev", "success", {}, metrics, made_by)


def test_the_variants_are_of_about_the_same_size():
    default = ROOT / "params.yaml"
    changes = variants(load_params(default)["model"])
    sizes = {}
    for name, settings in changes.items():
        params = load_params(default, settings)
        config = read_section(ModelConfig, params, "model", vocab_size=2048)
        sizes[name] = TransformerLM(config).num_parameters()
    assert sizes["SiLU"] == sizes["no RoPE"] == sizes["default"]
    assert sizes["default"] - sizes["no norm"] == 9 * 128  # two norms a layer and a last one
    assert sizes["default"] - sizes["post-norm"] == 128
    with pytest.raises(InputError, match=r"model.d_ff = 85: must be even"):
        variants({"d_ff": 85})


def test_the_page_names_each_variant_and_tells_a_divergence_as_a_result():
    changes = {"default": (), "no norm": ("model.norm=none",), "SiLU": ("model.ffn=silu",)}
    losses = {"default": (3.0, 3.1, 3.2), "no norm": (3.5,), "SiLU": (3.31, 3.41, 3.52)}
    results = {
        name: [result(name, seed, loss) for seed, loss in enumerate(several)]
        for name, several in losses.items()
    }
    for seed in (1, 2):
        seeds = {"train.seed": seed}
        failed = Experiment("no norm", "rev", "diverged", seeds, diverged="diverged at step 7: nan")
        results["no norm"].append(failed)
    text, plot = page(changes, results, "3 steps of 2 x 8 tokens")
    assert "seeds, here for 3 steps of 2 x 8 tokens.\n" in text
    what, table = (cells_of(part) for part in text.split("**Validation loss"))
    assert what == [
        ["default", "as in `params.yaml`", "1,000"],
        ["no norm", "`model.norm=none`", "1,000"],
        ["SiLU", "`model.ffn=silu`", "1,000"],
    ]
    assert table[0][:5] == ["default", "3", "3.1000", "0.1000", "3.0000 to 3.2000"]
    assert [row[:3] for row in table] == [
        ["default", "3", "3.1000"],
        ["SiLU", "3", "3.4133"],
        ["no norm", "1", "3.5000"],
        ["no norm", "2", ""],
    ]
    assert table[1][5].startswith("worse than the best: +0.3133")
    assert table[3][5] == "diverged at step 7: nan"
    assert {len(row) for row in table} == {7}
    places = {point["x"] for points in plot["datasets"].values() for point in points}
    assert places == set(losses)


@pytest.mark.soak  # five experiments, a minute
def test_make_ablations_goes_on_where_a_variant_diverges(tmp_path):
    """At a rate that only normalised layers survive."""
    project = versioned(tmp_path / "project", steps=4)
    project.set("train.lr", 100.0)
    project.set("train.weight_decay", 0.0)
    shutil.copy(ROOT / "Makefile", project.folder)
    (project.folder / "docs" / "images").mkdir(parents=True)
    for name in ("requirements.txt", "constraints.txt", ".venv/.ready"):
        (project.folder / name).parent.mkdir(exist_ok=True)
        (project.folder / name).touch()
    commit(project)
    done = run(project, "make", "ablations", "SEEDS=1", timeout=400)
    survivors(project, 0)
    assert done.returncode == 0, done.stdout
    text = project.read("docs/ABLATIONS.md").decode()
    assert text in done.stdout
    rows = {cells[0]: cells for cells in cells_of(text.partition("**Validation loss")[2])}
    assert set(rows) == {"default", "no norm", "post-norm", "no RoPE", "SiLU"}
    assert re.match(r"diverged at step \d: (loss|gradient norm) is (nan|inf)", rows["no norm"][5])
    assert {row[5] for name, row in rows.items() if name != "no norm"} == {
        "one seed: nothing can be said"
    }
    assert b"post-norm" in project.read("docs/images/ablations.svg")
