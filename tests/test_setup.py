"""`make setup`: an environment that is there already, one that was moved, what belongs into it."""

import ast
import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.project import ROOT, one_line


@pytest.fixture
def folder(tmp_path):
    """The Makefile, and nothing to install."""
    folder = tmp_path / "a project's folder, ünnamed"
    folder.mkdir()
    shutil.copy(ROOT / "Makefile", folder)
    for name in ("requirements.txt", "constraints.txt"):
        (folder / name).touch()
    return folder


def make(folder, target=".venv/.ready", **environment):
    command = ["make", f"PYTHON={sys.executable}", target]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(
        command, cwd=folder, env=clean | environment, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("place", [pytest.param(".venv", marks=pytest.mark.soak), "../shared"])
def test_an_environment_without_pip_is_used_also_as_a_link(folder, place):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], cwd=folder, check=True)
    if place != ".venv":
        (folder / ".venv").symlink_to(place)
    mine = folder / place / "mine"
    mine.touch()
    code, said = make(folder)
    assert code == 0, said
    assert (folder / ".venv/.ready").read_text() == f"{(folder / place).resolve()}\n"
    assert mine.exists()
    assert (folder / ".venv/bin/pip3").exists()
    assert make(folder) == (0, "")


def test_an_environment_that_cannot_have_pip_is_refused_in_a_line(folder):
    (folder / ".venv/bin").mkdir(parents=True)
    python = folder / ".venv/bin/python"
    python.write_text("#!/bin/sh\ncase $2 in pip | ensurepip) exit 1 ;; esac\n")
    python.chmod(0o755)
    code, said = make(folder)
    assert code == 2
    assert "error: .venv has no pip and ensurepip cannot install it; run: rm -r .venv" in said


def test_a_moved_project_says_what_to_do(folder):
    (folder / ".venv").mkdir()
    (folder / ".venv/.ready").write_text(f"{folder / '.venv'}\n")
    assert "made as" not in make(folder, "setup")[1]
    moved = folder.rename(folder.with_name("moved"))
    code, said = make(moved, "repro")
    assert code == 2
    assert f"error: .venv was made as {folder / '.venv'} and then moved or copied" in said
    assert "run: rm -r .venv && make setup" in said


def test_git_ignores_an_environment_that_is_a_link():
    for name in (".venv", ".venv-lm-eval/bin/x"):
        assert subprocess.run(["git", "check-ignore", "-q", name], cwd=ROOT).returncode in (0, 128)
    assert ".venv*" in (ROOT / ".gitignore").read_text().splitlines()


IMPORTED_AS = {"PyYAML": "yaml", "vl-convert-python": "vl_convert", "Flask": "flask",
               "Jinja2": "jinja2"}  # fmt: skip
PARTS = {"dvc_data", "dvc_render", "scmrepo", "pygit2", "werkzeug", "markupsafe"}  # of DVC, Flask


def required(name):
    """What a file of requirements brings, by the names in Python."""
    names = re.findall(r"^([\w.-]+)(?:\[\w+\])?[=>]=", (ROOT / name).read_text(), re.M)
    return {IMPORTED_AS.get(n, n.replace("-", "_")) for n in names}


def test_what_runs_is_in_the_requirements_of_running():
    imported = set()
    folders = ("lm", "stages", "tools")
    for path in [file for folder in folders for file in (ROOT / folder).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {name.name.partition(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.partition(".")[0])
    imported -= sys.stdlib_module_names | {"lm", "stages", "tools"}
    assert imported - PARTS <= required("requirements.txt")
    assert not imported & required("requirements-dev.txt")
    assert not required("requirements.txt") & required("requirements-dev.txt")


@pytest.fixture
def without(tmp_path):
    """Packages in front of the real ones: what training does without cannot be imported."""
    (tmp_path / "without").mkdir()
    here = required("requirements.txt") | required("requirements-dev.txt") | PARTS
    brought = {"torch", "networkx", "sympy", "jinja2", "markupsafe"}  # by torch
    for name in here - required("requirements-train.txt") - brought:
        stub = f"raise ModuleNotFoundError('No module named {name}', name='{name}')"
        (tmp_path / "without" / f"{name}.py").write_text(stub)
    return {"PYTHONPATH": f"{tmp_path / 'without'}{os.pathsep}{ROOT}"}


TRAINING = """
import pkgutil, runpy, sys
from importlib import import_module
for name in ("lm.machine", "lm.model", "lm.train", "lm.runs", "lm.plan", "lm.generate",
             "benchmarks"):
    for module in pkgutil.walk_packages(import_module(name).__path__, name + "."):
        if not module.name.endswith("__main__"):
            import_module(module.name)
prompt = "--prompt", "def", "--max-new-tokens", "3", "--device", "cpu"
for name, arguments in {
    "stages.tokenizer": (), "stages.tokens": (), "lm.plan": (), "stages.train": (),
    "stages.evaluate": (), "lm.generate": prompt,
}.items():
    sys.argv = [name, *arguments]
    runpy.run_module(name, run_name="__main__", alter_sys=True)
"""


def test_training_and_using_a_model_need_only_their_own_requirements(project, without):
    done = project.run("python", "-c", TRAINING, **without)
    assert done.returncode == 0, done.stderr
    assert (project.folder / "metrics" / "eval.json").exists()
    assert done.stdout.splitlines()[-1].startswith("def")


@pytest.mark.parametrize(
    ("name", "module"), [("cheroot", "lm.serve"), ("orjson", "stages.tokenizer")]
)
def test_a_missing_package_is_named_in_a_line(project, without, name, module):
    (project.folder / "text" / "a.jsonl").write_text('{"text": "word"}\n')
    done = project.run("python", "-m", module, **without)
    assert (done.returncode, one_line(done)) == (
        3,
        f"error: the Python package {name} is missing; run `make setup`, or pip install it",
    )


def test_the_licence_is_named():
    assert "MIT License" in (ROOT / "LICENSE").read_text()
    assert 'license = "MIT"' in (ROOT / "pyproject.toml").read_text()
    assert "(LICENSE)" in (ROOT / "README.md").read_text()
