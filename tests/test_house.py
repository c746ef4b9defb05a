"""The house rules that can be checked: wings, DVC dependencies, sizes, copies, pins, the README."""

import ast
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import yaml

from lm.base.params import load_params
from tests.project import ROOT
from tools import settings

ARCHITECTURE = (ROOT / "docs" / "ARCHITECTURE.md").read_text()
# the rows of its table of wings, lowest first: a wing may import those above it in the table
WINGS = re.findall(r"^\| `(lm/\w+|stages|tools)/` \|", ARCHITECTURE, re.M)
ABOVE_LM = ["lm/check.py", "lm/demo.py"]  # as are the command lines, each wing's __main__.py
WITHOUT_TORCH = ["lm/base", "lm/corpus", "lm/data", "lm/prepare"]
PIPELINE = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
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
    assert {wing(file) for file in FILES} - {"lm/__init__.py", *ABOVE_LM} == set(WINGS)


def test_the_picture_names_every_tool():
    """A file of tools/ with a command line, or a folder with a __main__.py."""
    files = [ROOT / file for file in FILES if wing(file) == "tools"]
    folders = {path.parent.name for path in files if path.name == "__main__.py"}
    single = {path.stem for path in files if path.parent.name == "tools"}
    commands = {
        name for name in single if "__main__" in (ROOT / "tools" / f"{name}.py").read_text()
    }
    (named,) = re.findall(r"^tools/ +([\w ]+):", ARCHITECTURE, re.M)
    assert set(named.split()) == commands | folders


@pytest.mark.parametrize("file", FILES)
def test_imports_only_go_to_earlier_wings(file):
    above = WINGS.index("stages")
    order = [WINGS[0], "lm/__init__.py", *WINGS[1:above], *ABOVE_LM, *WINGS[above:]]
    a_command = re.fullmatch(r"lm/\w+/__main__\.py", file)
    from_wing = ABOVE_LM[-1] if a_command else wing(file)
    by_name = re.findall(r'import_module\("(\w[\w.]*)"', (ROOT / file).read_text())
    for name in imports(ROOT / file) | set(by_name):
        imported = source(name).relative_to(ROOT).as_posix()
        assert order.index(wing(imported)) <= order.index(from_wing), imported
        assert not imported.endswith("/__main__.py")


def test_in_lm_only_command_lines_and_checks_of_settings_know_paths():
    knowing = {f for f in FILES if f[:3] == "lm/" and "lm.base.paths" in imports(ROOT / f)}
    others = {f for f in knowing if "def main(" not in (ROOT / f).read_text()}
    assert others == {"lm/check.py", "lm/prepare/sources.py"}
    places = re.compile(r'Path\(f?"(data|models|metrics|params)\b')
    files = [f for f in FILES if f[:3] == "lm/" or wing(f) == "stages"]
    assert [f for f in files if places.search((ROOT / f).read_text())] == ["lm/base/paths.py"]


@pytest.mark.parametrize("name", [name for name in WINGS if name.startswith("lm/")])
def test_a_wing_says_its_one_job_in_five_lines(name):
    text = (ROOT / name / "__init__.py").read_text()
    assert text.count("\n") <= 5
    (begin,) = re.findall(r"Begin with (\w+\.py)", text)
    assert (ROOT / name / begin).is_file()


def test_every_page_says_the_same_beginning():
    files = "lm/train/loop.py, then lm/train/step.py, then lm/model/transformer.py"
    for page in ("README.md", "docs/ARCHITECTURE.md", "lm/__init__.py"):
        text = " ".join((ROOT / page).read_text().replace("`", "").split())
        assert f"Begin with {files}" in text, page


def test_readme_names_every_wing():
    _, _, code = (ROOT / "README.md").read_text().partition("## How to read the code\n")
    assert not [name for name in WINGS if f"{name}/" not in code.partition("\n## ")[0]]


def test_what_a_newcomer_reads_is_short():
    files = [ROOT / file for file in FILES if wing(file) in ("lm/model", "lm/train")]
    assert sum(file.read_text().count("\n") for file in files) < 2650


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


@pytest.mark.parametrize("stage", PIPELINE)
def test_the_page_names_the_wings_of_each_stage(stage):
    (wings,) = re.findall(rf"^\| {stage} \|.*\| ([\w, ]+) \|$", ARCHITECTURE, re.M)
    deps = PIPELINE[stage]["deps"]
    assert wings.split(", ") == [dep[3:] for dep in deps if re.fullmatch(r"lm/\w+", dep)]


def test_what_python_and_editors_leave_in_a_wing_runs_no_stage_again():
    litter = [f"lm/base/{name}" for name in ("__pycache__/files.pyc", ".files.py.swp", "files.py~")]
    ask = [sys.executable, "-m", "dvc", "check-ignore", "lm/base/files.py", *litter]
    done = subprocess.run(ask, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == litter


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


@pytest.mark.parametrize("file", ["lm/train/loop.py", "lm/train/step.py"])
def test_the_loop_and_a_step_are_read_on_one_screen(file):
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 45, node.name


def test_the_map_of_the_pipeline_is_short():
    assert (ROOT / "dvc.yaml").read_text().count("\n") < 200


# --- nothing stands twice ---------------------------------------------------------------

COPIED_LINES = 6  # of a function as Python prints it, a statement a line: about eight as we wrap


class Anonymous(ast.NodeTransformer):
    """A function but for what a copy of it may call or say in another way.

    That is its own name, its arguments and variables, annotations, docstrings and texts.
    """

    def __init__(self, function):
        names = [node for node in ast.walk(function) if isinstance(node, ast.Name)]
        self.own = {name.id for name in names if isinstance(name.ctx, ast.Store)}
        self.own |= {node.arg for node in ast.walk(function) if isinstance(node, ast.arg)}

    def visit_FunctionDef(self, node):
        self.generic_visit(node)
        node.name, node.returns = "_", None
        return node

    def visit_Name(self, node):
        return ast.Name("_") if node.id in self.own - {"self"} else node

    def visit_arg(self, node):
        return ast.arg("_")

    def visit_AnnAssign(self, node):
        self.generic_visit(node)
        node.annotation = ast.Name("_")
        return node

    def visit_Constant(self, node):
        return ast.Constant("") if isinstance(node.value, str) else node

    def visit_JoinedStr(self, node):
        return ast.Constant("")


def functions(text):
    """(name, node) of the functions and methods of a file; those within one are part of it."""
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            methods = (n for n in node.body if isinstance(n, ast.FunctionDef))
            yield from ((f"{node.name}.{method.name}", method) for method in methods)


def copies(texts):
    """The groups of functions, as "file: name", that have COPIED_LINES alike in one piece."""
    found = defaultdict(set)
    for file, text in texts.items():
        for name, function in functions(text):
            lines = ast.unparse(Anonymous(function).visit(function)).split("\n")[1:]
            lines = [line.strip() for line in lines if line.strip(" '\"")]
            for i in range(len(lines) - COPIED_LINES + 1):
                found[tuple(lines[i : i + COPIED_LINES])].add(f"{file}: {name}")
    return {tuple(sorted(places)) for places in found.values() if len(places) > 1}


def test_no_logic_stands_twice():
    assert not copies({file: (ROOT / file).read_text() for file in FILES})


def test_a_copy_with_other_names_and_words_is_found():
    text = (ROOT / "lm" / "base" / "files.py").read_text()
    renamed = text.replace("scratch", "draft").replace("path", "place")
    assert renamed != text
    assert ("a: replacing", "b: replacing") in copies({"a": text, "b": renamed})


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
            values, default, what, readers = re.split(r" (?<!\\)\| ", row.removesuffix(" |"))[1:]
            assert values, key
            assert default != "``", key
            assert len(what) > 5, key
            assert set(readers.split(", ")) <= PIPELINE.keys(), key


@pytest.mark.parametrize("stage", PIPELINE)
def test_the_page_of_settings_names_the_stages_that_read_runtime(stage):
    row = rf"^\| `runtime\.(\w+)` \|.*\| (?:\w+, )*{stage}(?:, \w+)* \|$"
    named = set(re.findall(row, settings.PAGE.read_text(), re.M))
    program = (ROOT / "stages" / f"{stage}.py").read_text()
    read = set(re.findall(r'RuntimeConfig, "runtime"\)\.?(\w*)', program))
    if read == {""}:  # it takes the whole section
        reached = "".join((ROOT / file).read_text() for file in closure(f"stages.{stage}"))
        read = set(re.findall(r"\bruntime\.(\w+)", reached))
    assert named == read & load_params(ROOT / "params.yaml")["runtime"].keys()


def test_the_loop_of_the_tour_runs(tmp_path, monkeypatch):
    """The hand-written loop of docs/TOUR.md, as it stands there."""
    _, _, section = (ROOT / "docs" / "TOUR.md").read_text().partition("## A loop of your own\n")
    snippet, *_ = re.findall(r"```python\n(.*?)```", section, re.S)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(snippet, names)
    assert names["it"] == 100
    assert names["loss"].item() < 1.0
    assert (tmp_path / "mine.safetensors").exists()
