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

FLOORS = [
    {"errors"},
    {"config", "rng", "files", "history", "console", "signals", "report", "compare"},
    {"functional", "card", "processes", "shares", "settings"},
    {"formats", "listing", "packages", "grammar", "tokenizer", "shards", "sampling", "baselines"}
    | {"workers", "model", "optim", "schedule", "device", "dcp"},
    {"fitting"},
    {"text", "encoder", "tokens", "checkpoint", "decoder", "parallel"},
    {"prepare", "resume", "huggingface"},
    {"publish", "sample", "check", "train", "evaluate", "excerpt", "generate", "export", "gguf"},
    {"footprint"},
    {"plan", "completions"},
    {"run", "verify", "demo", "serve"},
]
BYTES_SIDE = (FLOORS[3] - {"model", "optim", "schedule", "device", "dcp"}) | {
    "text",
    "encoder",
    "tokens",
}
BYTES_SIDE |= {"prepare", "publish", "sample", "check"}
TORCH_SIDE = {"functional", "model", "decoder", "optim", "schedule", "device", "dcp"}
TORCH_SIDE |= {"processes", "shares", "parallel"}
PIPELINE = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
MODEL = load_params(SMOKE)["model"]
MODULES = sorted(path.stem for path in (ROOT / "lm").glob("*.py") if path.stem != "__init__")


def imports(path: Path) -> set[str]:
    """Project modules that a file imports, e.g. {"lm.prepare.documents", "stages.run"}."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
            found |= {f"{node.module}.{name.name}" for name in node.names}
    return {n for n in found if n and (ROOT / f"{n.replace('.', '/')}.py").exists()}


def closure(module: str) -> set[str]:
    """Relative paths of the files that importing a module brings in, packages included."""
    todo, done = [module], set()
    while todo:
        name = todo.pop()
        if name not in done:
            done.add(name)
            todo += imports(source(name)) | {name.split(".")[0]}
    return {source(name).relative_to(ROOT).as_posix() for name in done}


def source(module: str) -> Path:
    """The file of a module, or a package's __init__.py."""
    path = ROOT / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def test_every_module_has_a_floor():
    assert sorted(name for floor in FLOORS for name in floor) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_go_down_the_floors(module):
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    for imported in imports(ROOT / "lm" / f"{module}.py"):
        package, name = imported.split(".")
        assert package == "lm"
        assert floor[name] < floor[module], imported


def test_bytes_and_torch_never_meet_below_the_joins():
    for module in BYTES_SIDE:
        reached = closure(f"lm.{module}")
        assert not reached & {f"lm/{name}.py" for name in TORCH_SIDE}
        assert "torch" not in (ROOT / "lm" / f"{module}.py").read_text().replace("(no torch)", "")
    for module in TORCH_SIDE:
        assert not closure(f"lm.{module}") & {f"lm/{name}.py" for name in BYTES_SIDE}


def test_preparing_data_loads_no_torch():
    stages = "stages.check, stages.corpus, stages.tokenizer, stages.tokens"
    program = f"import sys, {stages}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("stage", PIPELINE)
def test_dvc_deps_are_the_files_each_stage_imports(stage):
    code = {dep for dep in PIPELINE[stage]["deps"] if dep.endswith(".py")}
    assert code == closure(f"stages.{stage}")


def test_each_stage_depends_on_the_settings_it_reads():
    keys = {f"data.{key}" for key in load_params(SMOKE)["data"]}
    reading = keys - {
        "data.source",
        "data.packages",
        "data.grammar_bytes",
        "data.path",
    }  # DVC watches the path itself
    assert {name: set(stage["params"]) for name, stage in PIPELINE.items()} == {
        "corpus": {"data.source", "data.packages", "data.grammar_bytes", "data.path"},
        "tokenizer": {"tokenizer", *reading},
        "tokens": reading,
        "train": {"model", "train"},
        "evaluate": {"evaluate", "data.source"},
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
    for file in (ROOT / "presets").glob("*.yaml"):
        assert {s: set(keys) for s, keys in load_params(file).items()} == default


def test_default_packages_are_the_pinned_ones():
    pins = set(re.findall(r"^\w[\w-]*==[\w.]+", (ROOT / "requirements.txt").read_text(), re.M))
    assert set(load_params(ROOT / "params.yaml")["data"]["packages"]) <= pins
    assert all(
        "://" not in (ROOT / name).read_text() for name in ("requirements.txt", "constraints.txt")
    )


def test_readme_explains_every_setting():
    readme = (ROOT / "README.md").read_text()
    for section, keys in load_params(ROOT / "params.yaml").items():
        for key in keys:
            assert f"`{section}.{key}`" in readme, f"{section}.{key}"


def test_readme_tour_names_every_module():
    readme = (ROOT / "README.md").read_text()
    for module in MODULES:
        assert f"`{module}`" in readme, module


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
