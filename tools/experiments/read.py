"""Read the experiments that git and DVC know: their results, and what made each.

    python -m tools.experiments [REV ...]    print results and the settings that differ

Settings, code and text of a result come from its dvc.lock, which DVC writes with it: params.yaml
may have been edited since.
"""

import argparse
import json
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lm.base.errors import Diverged, EnvironmentFault, InputError, one_line_errors
from lm.base.files import sha256_json
from lm.base.params import parse_yaml
from stages import CODE as FOLDERS
from tools.repository import commit_of, opened

SEED, CODE, TEXT = "train.seed", "code", "text"
WHICH = "a commit, with its experiments, or an experiment by name; default: HEAD"
RETRIED_S = 60.0  # on a busy machine a worker takes long to make the folder of a task
RESULTS = {  # the columns of the table, and where they come from
    "loss_nats": "metrics/eval.json",
    "bits_per_byte": "metrics/eval.json",
    "valid_loss": "metrics/train.json",
}


@dataclass
class Experiment:
    """A row of `dvc exp show`, with the facts from its dvc.lock."""

    name: str
    rev: str
    state: str  # success, running, queued, failed, diverged; of a commit: baseline
    params: dict[str, Any]  # of params.yaml, by section.key
    metrics: dict[str, float] = field(default_factory=dict)  # by file:key
    made_by: dict[str, Any] = field(default_factory=dict)  # settings, code and text of the results
    tokenizer: str | None = None  # its hash
    environment: dict[str, str] = field(default_factory=dict)
    diverged: str | None = None  # how, in words


def read_experiments(revisions: list[str]) -> list[Experiment]:
    """Return revisions and their experiments, as `dvc exp show` does; HEAD's if none is given.

    Raises InputError for a revision that git and DVC do not know.
    """
    with opened() as repo:
        return [_read(repo, *row) for row in _rows(repo, revisions, hide_workspace=True)]


def _rows(repo: Any, revisions: list[str], hide_workspace: bool) -> list[tuple[str, Any, str]]:
    """Return name, content and state of each row of `dvc exp show`, named as asked for.

    Try again if `dvc exp show` fails, as it does while a worker makes or removes the folder of a
    task: the git repository there may be empty ("Empty git repo"), and notes half written.
    """
    from dvc.exceptions import NotDvcRepoError
    from dvc.scm import SCMError
    from dvc.utils.serialize import ParseError
    from scmrepo.exceptions import SCMError as InnerSCMError

    if repo.scm.no_commits:
        raise InputError("git has no commit, and an experiment starts from one; run: git commit")
    names = {commit_of(repo, revision): revision for revision in revisions}
    until_s = time.monotonic() + RETRIED_S
    while True:
        try:
            bases = repo.experiments.show(revs=revisions, hide_workspace=hide_workspace)
            break
        except (OSError, NotDvcRepoError, SCMError, InnerSCMError, ParseError) as error:
            if time.monotonic() > until_s:
                said = " ".join(str(error).split()) or type(error).__name__
                raise EnvironmentFault(f"`dvc exp show` fails: {said}") from None
        time.sleep(0.5)
    rows = []
    for base in bases:
        short = base.rev if base.rev == "workspace" else base.rev[:7]
        rows.append((names.get(base.rev) or base.name or short, base, "baseline"))
        for one in base.experiments or []:
            state = str(one.executor.state) if one.executor else "success"
            rows.append((one.name or one[0].rev[:7], one[0], state))
    return rows


def _read(repo: Any, name: str, shown: Any, state: str) -> Experiment:
    experiment = Experiment(name, shown.rev, state, _params(shown))
    if state == "failed":
        experiment.diverged = divergence(last_lines(repo.experiments.celery_queue, shown.rev))
        experiment.state = "diverged" if experiment.diverged else state
    if shown.data and state in ("success", "baseline"):
        with repo.switch(shown.rev):
            if repo.dvcfs.exists("dvc.lock"):
                lock = parse_yaml(repo.dvcfs.read_text("dvc.lock"), "dvc.lock")
                _read_lock(repo, experiment, lock)
    if experiment.made_by:
        experiment.metrics = {
            f"{path}:{key}": value
            for path, file in shown.data.metrics.items()
            for key, value in flat(file.get("data", {})).items()
            if is_number(value)
        }
    return experiment


def last_lines(tasks: Any, rev: str) -> list[str]:
    """Return the last lines that a queued experiment has written, while DVC lists it."""
    process = tasks.proc.get(rev)
    if process is None:
        return []
    with open(process.stdout, "rb") as file:
        file.seek(max(0, file.seek(0, 2) - 4096))
        return file.read().decode(errors="replace").split("\n")[1:-1]


def divergence(lines: list[str]) -> str | None:
    """Return how the training that wrote these last lines diverged; None if it did not."""
    text = "\n".join(lines)
    found = re.search(r"^error: ([a-z ]+ is \S+) at step (\d+)", text, re.M)
    if found is None or f"exited with {Diverged.exit_code}" not in text:
        return None
    return f"diverged at step {found[2]}: {found[1]}"


def _read_lock(repo: Any, experiment: Experiment, lock: dict[str, Any]) -> None:
    """Add the settings and files that made the results, unless stages contradict each other."""
    facts: dict[str, set[str]] = defaultdict(set)
    read, made, settings = set[str](), set[str](), dict[str, Any]()
    for stage in lock.get("stages", {}).values():
        for kind, paths in (("deps", read), ("outs", made)):
            for file in stage.get(kind, []):
                paths.add(file["path"])
                facts[file["path"]].add(json.dumps(file.get("md5", file)))
        for key, value in flat(stage.get("params", {}).get("params.yaml", {})).items():
            facts[f"setting {key}"].add(json.dumps(value))
            settings[key] = value
    if SEED not in settings or any(len(values) > 1 for values in facts.values()):
        return
    sources = {name: min(facts[name]) for name in sorted(read - made)}
    code = {name: md5 for name, md5 in sources.items() if Path(name).parts[0] in FOLDERS}
    text = [md5 for name, md5 in sources.items() if name not in code]
    experiment.made_by = settings | {CODE: sha256_json(code)[:7], TEXT: sha256_json(text)[:7]}
    experiment.tokenizer = min(facts["data/tokenizer"], default=None)
    with suppress(OSError, ValueError):  # the model is not in the cache
        files = _cached(repo, json.loads(min(facts["models/model"])))
        (md5,) = (file["md5"] for file in files if file["relpath"] == "provenance.json")
        experiment.environment = _cached(repo, md5)["environment"]


def _cached(repo: Any, md5: str) -> Any:
    return json.loads(Path(repo.cache.local.oid_to_path(md5)).read_text())


def flat(nested: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested mappings as one, with dots in its keys."""
    found: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            found |= {f"{key}.{inner}": leaf for inner, leaf in flat(value).items()}
        else:
            found[key] = value
    return found


def is_number(value: Any) -> bool:
    """Return whether a setting or a metric is a number; true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def show(value: Any) -> str:
    """Return a value as params.yaml has it."""
    return value if isinstance(value, str) else json.dumps(value)


def label(setting: Mapping[str, Any], names: list[str]) -> str:
    """Return a setting as `dvc exp run -S` takes it."""
    return " ".join(f"{name}={show(setting.get(name, ''))}" for name in names) or "the setting"


def varying(settings: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the names whose values are not the same in all settings."""
    several = list(settings)
    names = {name: None for setting in several for name in setting}
    return [n for n in names if len({show(setting.get(n, "")) for setting in several}) > 1]


def table(revisions: list[str]) -> Any:
    """Return revisions and their experiments as a table; workspace and HEAD if none is given.

    A baseline shows all settings that differ anywhere, an experiment only those that it changed.
    """
    from rich.table import Table

    found = Table(box=None, pad_edge=False)
    found.add_column("experiment", overflow="fold")
    for name in RESULTS:
        found.add_column(name, justify="right", no_wrap=True)
    found.add_column("settings that differ", overflow="fold")
    with opened() as repo:
        rows = _rows(repo, revisions, hide_workspace=bool(revisions))
    several = [deciding(_params(shown)) for _, shown, _ in rows]
    differing, base = varying(filter(None, several)), dict[str, Any]()
    for (name, shown, state), settings in zip(rows, several, strict=True):
        before = base
        if state == "baseline":
            before, base = {}, settings
        changed = [k for k in differing if k in settings and settings[k] != before.get(k, ...)]
        indent = "" if state == "baseline" else "  "
        remark = "" if state in ("baseline", "success") else f" ({state})"
        metrics = shown.data.metrics if shown.data else {}
        values = [metrics.get(file, {}).get("data", {}).get(key) for key, file in RESULTS.items()]
        cells = [f"{value:.4f}" if is_number(value) else "-" for value in values]
        words = label(settings, changed) if changed else ""
        found.add_row(f"{indent}{name}{remark}", *cells, words)
    return found


def _params(shown: Any) -> dict[str, Any]:
    """Return params.yaml of a row of `dvc exp show`, by section.key."""
    return flat(shown.data.params.get("params.yaml", {}).get("data", {}) if shown.data else {})


def deciding(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that can change a result."""
    return {key: value for key, value in params.items() if not key.startswith("runtime.")}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("revisions", nargs="*", metavar="REV", help=WHICH)
    arguments = parser.parse_args()
    with one_line_errors():
        from rich.console import Console

        Console(markup=False, highlight=False, emoji=False).print(table(arguments.revisions))
