"""Shapes in signatures are executed; one thread: two on busy cores can be 38 times slower."""

import atexit
import fcntl
import gc
import os
import pickle
import shutil
import signal
import tempfile

os.environ["OMP_NUM_THREADS"] = "1"
# a shell that runs the tests in the background has them ignore Ctrl-C; what they start must not
signal.signal(signal.SIGINT, signal.default_int_handler)

if "LM_WARM" not in os.environ:  # the workers' processes have it from the first
    os.environ["LM_WARM"] = tempfile.mkdtemp(prefix="warm-")
    atexit.register(shutil.rmtree, os.environ["LM_WARM"])

from importlib.util import find_spec

from jaxtyping import install_import_hook

if not find_spec("beartype"):  # requirements-train.txt does without
    os.environ["LM_SHAPE_CHECKS"] = "0"
if os.environ.setdefault("LM_SHAPE_CHECKS", "1") != "0":
    import tests.typecheck  # noqa: F401 - the hook finds it by name

    install_import_hook("lm", "tests.typecheck.checked")

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

from lm.base.params import load_params
from lm.base.sections import read_section
from lm.base.settings import TrainConfig
from lm.model.transformer import ModelConfig, TransformerLM
from lm.prepare.sources import DataConfig
from tests.kill import commit, copied, dvc, lent, outputs, versioned
from tests.project import SMOKE, Project
from tests.servers import reserved_port

torch.set_num_threads(1)
# the same examples every time; a busy machine is no defect
hypothesis.settings.register_profile("steady", deadline=None, derandomize=True)
hypothesis.settings.load_profile("steady")


LONG = (
    "compare",
    "pipeline",
    "experiments",
    "launch",
    "kill",
    "crash",
    "demo",
    "remotes",
    "plots",
    "stages",
)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[Any]:
    """Look for no garbage among what collection imports, then or later: a quarter of its time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests first: else one worker ends with a long one while the others wait."""
    order = [f"test_{name}.py" for name in LONG]
    items.sort(key=lambda item: order.index(item.path.name) if item.path.name in order else 99)
    if not torch.cuda.is_available():
        elsewhere = "test_gpu.py" if "LM_TEST_DEVICE" in os.environ else ""
        for item in items:
            if item.get_closest_marker("cuda") and item.path.name != elsewhere:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def smoke_params() -> dict[str, dict[str, Any]]:
    """The settings of presets/smoke.yaml."""
    return load_params(SMOKE)


@pytest.fixture
def model_config(smoke_params) -> ModelConfig:
    """A two-layer model over 96 tokens and 16 positions."""
    smoke_params["model"]["vocab_size"] = 96
    return replace(read_section(ModelConfig, smoke_params, "model"), context_length=16)


@pytest.fixture
def train_config(smoke_params) -> TrainConfig:
    decided = smoke_params["train"] | {"compile": False}  # as the plan decides
    return read_section(TrainConfig, {"train": decided}, "train")


@pytest.fixture
def data_config(smoke_params) -> DataConfig:
    return read_section(DataConfig, smoke_params, "data")


@pytest.fixture
def model(model_config) -> TransformerLM:
    torch.manual_seed(0)
    return TransformerLM(model_config).eval()


@pytest.fixture
def project(tmp_path) -> Iterator[Project]:
    """A copy of this repository in an empty folder, with small settings and a small text."""
    project = Project(tmp_path / "project")
    yield project
    project.close()


@pytest.fixture
def port() -> Iterator[int]:
    """A port on which nobody listens."""
    with reserved_port() as port:
        yield port


@pytest.fixture(scope="session")
def made_once(tmp_path_factory) -> Callable[[str, Callable[[Path], Any]], Any]:
    """What a function makes in a folder, made by the first worker that needs it, for all."""
    base = tmp_path_factory.getbasetemp()  # of this worker; without workers, of this run
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def once(name: str, make: Callable[[Path], Any]) -> Any:
        shared = base / name
        shared.mkdir(exist_ok=True)
        with open(shared / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            kept = shared / "made.pickle"
            if not kept.exists():
                kept.write_bytes(pickle.dumps(make(shared)))
            return pickle.loads(kept.read_bytes())

    return once


@pytest.fixture(scope="session")
def baseline(made_once) -> Project:
    """A project whose pipeline has run and is committed: to be copied, not changed."""

    def make(folder: Path) -> Project:
        project = versioned(folder / "baseline", eval_interval=8)  # the last part is shorter
        dvc(project, "repro")
        commit(project)
        return project

    return made_once("baseline", make)


@pytest.fixture
def finished(baseline, tmp_path) -> Iterator[Project]:
    """A copy of the baseline."""
    with lent(baseline, tmp_path / "project") as project:
        yield project


@pytest.fixture(scope="session")
def long_run(made_once) -> tuple[Project, dict[str, str]]:
    """A run without DVC, long enough to be caught: its project before it, and what it ends in."""

    def make(folder: Path) -> tuple[Project, dict[str, str]]:
        project = Project(folder / "long")
        project.set("train.max_steps", 160)
        project.set("train.eval_interval", 20)
        project.prepare("tokenizer", "tokens")
        whole = copied(project, folder / "whole")
        whole.prepare("train")
        return project, outputs(whole)

    return made_once("long", make)
