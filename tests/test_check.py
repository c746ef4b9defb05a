"""Every setting is checked before anything runs: by each stage, by make repro and by lm.plan."""

import subprocess

import pytest

from lm.base.errors import InputError
from lm.base.params import load_params
from lm.check import check
from lm.plan.__main__ import main
from tests.kill import ran, run, versioned
from tests.project import ROOT, SMOKE

PRESETS = sorted((ROOT / "presets").glob("*.yaml"))


@pytest.mark.parametrize("file", PRESETS, ids=lambda file: file.stem)
def test_a_preset_is_right_once_its_text_is_there(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    params = load_params(file)
    (tmp_path / params["data"]["path"]).mkdir(parents=True)
    for suffix in ("jsonl", "parquet", "txt"):
        (tmp_path / params["data"]["path"] / f"a.{suffix}").touch()
    check(params, str(file))


def test_the_plan_checks_without_planning(capsys):
    main(["--check", "--params", str(SMOKE)])
    assert capsys.readouterr().out == f"{SMOKE}: ok\n"
    with pytest.raises(SystemExit, match="2"):
        main(["--check", "--params", str(SMOKE), "-S", "evaluate.top_p=2"])
    assert capsys.readouterr().err == f"error: {SMOKE}: evaluate.top_p = 2.0: must be in (0, 1]\n"


def test_make_repro_checks_before_dvc_looks():
    command = ["make", "-n", "repro"]
    steps = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    assert steps.index("python -m stages.check") < steps.index("dvc repro")


def test_what_dvc_brings_or_makes_need_not_be_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    params = load_params(SMOKE, ["data.path=made/text"])
    with pytest.raises(InputError, match="data.path = made/text: no such file or folder"):
        check(params, "params.yaml")
    check(params, "params.yaml", "tokenizer")  # whose part it is to read them
    for name, content in (
        ("made/text.dvc", ""),
        ("made.dvc", ""),
        ("dvc.yaml", "stages:\n  clean:\n    outs:\n      - made/text:\n          push: false\n"),
        ("dvc.yaml", "stages:\n  clean:\n    outs:\n    - made/\n"),
    ):
        (tmp_path / "made").mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
        check(params, "params.yaml")
        (tmp_path / name).unlink()


def test_dvc_tells_of_a_later_stages_setting_and_of_missing_text_before_it_tokenizes(tmp_path):
    project = versioned(tmp_path / "project")
    for key, wrong, line in (
        ("evaluate.top_p", 2, "error: params.yaml: evaluate.top_p = 2.0: must be in (0, 1]"),
        ("data.path", "owner/dataset", "error: data.path = owner/dataset: no such file or folder"),
    ):
        section, name = key.split(".")
        right = project.params[section][name]
        project.set(key, wrong)
        done = run(project, "dvc", "repro")
        assert line in done.stdout
        assert "Errno" not in done.stdout
        assert ran(done.stdout) == ["corpus"]
        project.set(key, right)
    run(project, "dvc", "repro", "tokenizer")
    done = run(project, "dvc", "exp", "run", "-S", "data.path=owner/dataset")
    assert "error: data.path = owner/dataset: no such file or folder" in done.stdout
