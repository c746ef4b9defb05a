"""The house rules that can be checked: floors, DVC dependencies, sizes, pins, the README."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from lm.base.config import load_params
from lm.model.transformer import ModelConfig, TransformerLM
from tests.project import ROOT, SMOKE
from tools import settings

ARCHITECTURE = (ROOT / "docs" / "ARCHITECTURE.md").read_text()
# the rows of its table of wings, lowest first: a wing may import those above it in the table
WINGS = re.findall(r"^\| `(lm/\w+|stages|tools)/` \|", ARCHITECTURE, re.M)
WITHOUT_TORCH = ["lm/base", "lm/corpus", "lm/data", "lm/prepare"]
PIPELINE = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
MODEL = load_params(SMOKE)["model"]
FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("lm", "stages", "tools")
    for path in (ROOT / folder).rglob("*.py")
)


def imports(path: Path) -> set[str]:
    """Project modules that a file imports, e.g. {"lm.prepare.documents", "stages.run"}."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
            found |= {f"{node.module}.{name.name}" for name in node.names}
    ours = {n for n in found if n and n.partition(".")[0] in ("lm", "stages", "tools")}
    return {n for n in ours if source(n).exists()}


def closure(module: str) -> set[str]:
    """Relative paths of the files that importing a module brings in, packages included."""
    todo, done = [module], set()
    while todo:
        name = todo.pop()
        if name not in done:
            done.add(name)
            parts = name.split(".")
            packages = {".".join(parts[:depth]) for depth in range(1, len(parts))}
            todo += imports(source(name)) | packages
    return {source(name).relative_to(ROOT).as_posix() for name in done}


def source(module: str) -> Path:
    """The file of a module, or a package's __init__.py."""
    path = ROOT / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def wing(file: str) -> str:
    """The wing of a file: "lm/train" of "lm/train/step.py", "stages", "tools"; or lm's own file."""
    parts = Path(file).parts
    if parts[0] != "lm":
        return parts[0]
    return f"lm/{parts[1]}" if len(parts) > 2 else file


def test_the_wings_are_those_of_the_page():
    files = {"lm/__init__.py", "lm/demo.py"}  # before all others, and above lm
    assert {wing(file) for file in FILES} - files == set(WINGS)


@pytest.mark.parametrize("file", FILES)
def test_imports_only_go_to_earlier_wings(file):
    order = ["lm/__init__.py", *WINGS]
    order.insert(order.index("stages"), "lm/demo.py")
    for name in imports(ROOT / file):
        imported = source(name).relative_to(ROOT).as_posix()
        assert order.index(wing(imported)) <= order.index(wing(file)), imported


@pytest.mark.parametrize("name", [name for name in WINGS if name.startswith("lm/")])
def test_a_wing_says_its_one_job_in_five_lines(name):
    text = (ROOT / name / "__init__.py").read_text()
    assert text.count("\n") <= 5
    (begin,) = re.findall(r"Begin with (\w+\.py)", text)
    assert (ROOT / name / begin).is_file()


def test_no_two_wings_have_a_file_of_one_name():
    names = [Path(file).name for file in FILES if file.startswith("lm/")]
    assert not {n for n in names if names.count(n) > 1} - {"__init__.py", "__main__.py"}


@pytest.mark.parametrize("file", [f for f in FILES if wing(f) in WITHOUT_TORCH])
def test_text_and_tokens_are_prepared_without_torch(file):
    text = (ROOT / file).read_text().replace("(no torch)", "").replace("No torch", "")
    assert not re.search(r"^\s*(import|from) torch", text, re.M)
    assert {wing(f) for f in closure(file.removesuffix(".py").replace("/", "."))} <= {
        *WITHOUT_TORCH,
        "lm/__init__.py",
    }


def test_preparing_data_loads_no_torch():
    stages = "stages.check, stages.corpus, stages.tokenizer, stages.tokens"
    program = f"import sys, {stages}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("stage", PIPELINE)
def test_dvc_deps_are_the_wings_each_stage_imports(stage):
    code = {dep for dep in PIPELINE[stage]["deps"] if dep.startswith(("lm/", "stages/"))}
    reached = closure(f"stages.{stage}")
    assert code == {file if file.startswith("stages/") else wing(file) for file in reached}


def test_each_stage_depends_on_the_settings_it_reads():
    assert {name: set(stage["params"]) for name, stage in PIPELINE.items()} == {
        "corpus": {"corpus", "data.path"},
        "tokenizer": {"tokenizer", "data"},
        "tokens": {"data"},
        "train": {"model", "train"},
        "evaluate": {"evaluate", "corpus.source"},
        "export": {"export", "data.path"},
    }
    for name in ("tokenizer", "tokens"):
        assert "${data.path}" in PIPELINE[name]["deps"]


def test_no_setting_reaches_a_shell_and_every_output_is_cached():
    assert not [stage["cmd"] for stage in PIPELINE.values() if "${" in stage["cmd"]]
    outs = [o for s in PIPELINE.values() for o in s["outs"] + s.get("metrics", [])]
    assert all(isinstance(out, str) for out in outs)  # no cache: false, no persist, no remote
    tracked = set(tracked_files())
    assert not [
        name for name in tracked if any(name == o or name.startswith(f"{o}/") for o in outs)
    ]


def tracked_files():
    """The files that git tracks, or none outside of a git checkout."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.splitlines()


@pytest.mark.parametrize("stage", PIPELINE)
def test_a_stage_is_short(stage):
    tree = ast.parse((ROOT / "stages" / f"{stage}.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 40, node.name


def test_presets_have_the_keys_of_params_yaml():
    default = {s: set(keys) for s, keys in load_params(ROOT / "params.yaml").items()}
    for file in (ROOT / "presets").glob("*.yaml"):  # `python -m tools.settings` adds a new one
        assert {s: set(keys) for s, keys in load_params(file).items()} == default


def test_presets_name_only_what_differs():
    default = load_params(ROOT / "presets" / "default.yaml")
    for file in (ROOT / "presets").glob("*.yaml"):
        own = yaml.safe_load(file.read_text())
        if own.pop("extends", None) is not None:
            assert not [
                (file.name, section, key)
                for section, keys in load_params(file).items()
                for key, value in keys.items()
                if (value != default[section][key]) != (key in own.get(section, {}))
            ]


def test_default_packages_are_the_pinned_ones():
    pins = set(re.findall(r"^\w[\w-]*==[\w.]+", (ROOT / "requirements.txt").read_text(), re.M))
    assert set(load_params(ROOT / "params.yaml")["corpus"]["packages"]) <= pins
    assert all(
        "://" not in (ROOT / name).read_text() for name in ("requirements.txt", "constraints.txt")
    )


def test_the_page_of_settings_explains_every_setting_and_is_up_to_date():
    text = settings.PAGE.read_text()
    assert settings.page() == text  # else run: python -m tools.settings
    for section, keys in load_params(ROOT / "params.yaml").items():
        for key in keys:
            (row,) = re.findall(rf"^\| `{section}.{key}` \|.*\|$", text, re.M)
            values, default, what, stages = re.split(r" (?<!\\)\| ", row)[1:]
            assert values, key
            assert default != "``", key
            assert len(what) > 5, key
            assert (stages.strip("| ") == "") == (section == "runtime")


def test_readme_loop_runs(tmp_path, monkeypatch):
    """The hand-written loop of README, as it stands there."""
    readme = (ROOT / "README.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", readme, re.S)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = TransformerLM(ModelConfig(vocab_size=32, **(MODEL | {"context_length": 256})))
    names = {"model": model, "dataset": np.arange(5000) % 32}
    exec(snippet, names)
    assert names["it"] == 100
    assert names["loss"].item() < 1.0
    assert (tmp_path / "mine.safetensors").exists()
