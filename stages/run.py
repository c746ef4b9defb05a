"""Run a stage: `python -m stages.NAME [-S section.key=value ...]`.

command line, params.yaml --run_stage--> Inputs --the stage--> outputs, if no input has changed
"""

import argparse
import importlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lm
from lm.base.console import differences, say
from lm.base.errors import EnvironmentFault, InputError, one_line_errors
from lm.base.files import sha256_file
from lm.base.params import add_overrides, load_params
from lm.base.paths import PARAMS
from lm.base.sections import Config, read_section
from stages import CODE, EXECUTED, ROOT

# not among the outputs, which DVC deletes; in a temporary workspace DVC_ROOT is the main project
SCRATCH = Path(os.environ.get("DVC_ROOT", "."), ".dvc", "tmp")
RUNS_ROOT = SCRATCH / "lm-resume"  # above all run folders
Params = dict[str, dict[str, Any]]
Signature = tuple[int, int, int, int]
Listing = Callable[[], list[Path]]


class Inputs:
    """The settings, code and files that a stage reads, and a check that none has changed.

    DVC hashes dependencies after the stage. It would record an input that was edited meanwhile
    with outputs made from the old one.
    """

    def __init__(self, arguments: argparse.Namespace, sections: list[str]):
        self.arguments, self.sections = arguments, sections
        self.params = load_params(PARAMS, arguments.overrides)
        self.code = _imported_code()
        self.files: dict[Path, str] = {}  # SHA-256 of the files that were hashed
        self._signatures: dict[Path, Signature] = {}  # of all watched files
        self._listings: list[tuple[Listing, list[Path]]] = []
        self._last_compared: list[Signature | None] = []  # signatures of code and params.yaml
        self._last_edits = ""  # what differed in them

    def section(self, kind: type[Config], name: str, **derived: Any) -> Config:
        """Return a section of params.yaml as its dataclass; see lm.base.sections.read_section."""
        return read_section(kind, self.params, name, str(PARAMS), **derived)

    def watch(self, *paths: Path) -> None:
        """Hash files, and all files of folders, before the stage reads them."""
        for path in paths:
            for file in self.watch_without_hashing(partial(_files, path)):
                self.files[file] = sha256_file(file)

    def watch_without_hashing(
        self, listing: Listing, files: list[Path] | None = None
    ) -> list[Path]:
        """Record size and times of files that are too large to hash twice; return the files.

        Pass `files` if `listing` has just returned them.
        """
        files = listing() if files is None else files
        self._listings.append((listing, files))
        self._signatures.update({file: _signature(file) for file in files})
        return files

    def check_files(self, rehash: bool = False) -> None:
        """Raise InputError if a file has changed; with `rehash` hash unchanged-looking ones too."""
        for listing, listed in self._listings:
            for file in sorted(set(listing()) - set(listed)):
                raise _changed(file)
        for file, before in self._signatures.items():
            if not file.is_file():
                raise _changed(file)
            signature, sha256 = _signature(file), self.files.get(file)
            if signature != before or (rehash and sha256 is not None):
                if sha256_file(file) != sha256:
                    raise _changed(file)
                self._signatures[file] = signature

    def check(self) -> None:
        """Raise InputError if anything that the stage read has changed. Call before publishing."""
        self.check_files(rehash=True)
        if edits := self._edits():
            raise _changed(edits)

    def warn_of_edits(self) -> None:
        """Warn, once for each edit, that `check` will raise an error at the end."""
        files = [PARAMS, *map(Path, self.code)]
        try:
            signatures = [_signature(file) if file.is_file() else None for file in files]
            if signatures == self._last_compared:
                return
            self._last_compared = signatures
            edits = self._edits()
        except (InputError, OSError) as error:  # an editor may be writing it
            edits = str(error)
        if edits and edits != self._last_edits:  # signatures may be of a file half written
            say(
                f"warning: {edits} has changed since the stage read it; the stage goes on as it "
                "began, and publishes nothing unless the change is undone before the end"
            )
        self._last_edits = edits

    def _edits(self) -> str:
        """Name the code and the settings that have changed since the stage read them."""
        found = [
            file
            for file, sha256 in self.code.items()
            if not Path(file).is_file() or sha256_file(Path(file)) != sha256
        ]
        now = load_params(PARAMS, self.arguments.overrides)
        for section in self.sections:
            if section != "runtime":
                differing = differences(self.params[section], now.get(section, {}))
                found += [f"{PARAMS}: {section}.{k} ({how})" for k, how in differing.items()]
        return ", ".join(found)


def _changed(what: Path | str) -> InputError:
    return InputError(
        f"{what} has changed since the stage read it; nothing is published, because DVC would "
        "record the new version with results of the old one; undo the change or keep it, and run "
        "again"
    )


def run_stage(
    stage: Callable[[Inputs], None],
    sections: list[str],
    *extra_arguments: tuple[str, dict[str, Any]],
) -> None:
    """Run a stage that reads only these sections; print an error as one line and exit."""
    parser = argparse.ArgumentParser(description=sys.modules[stage.__module__].__doc__)
    add_overrides(parser)
    for name, options in extra_arguments:
        parser.add_argument(name, **options)
    arguments = parser.parse_args()
    with one_line_errors():
        if not Path(lm.__file__).is_relative_to(Path.cwd()):
            raise EnvironmentFault(
                f"lm comes from {Path(lm.__file__).parent}, not from {Path.cwd()}; run "
                "`python -m stages.NAME` in the project's root folder and do not install lm"
            )
        inputs = Inputs(arguments, sections)
        for override in arguments.overrides:
            if override.split(".")[0] not in sections:
                known = ", ".join(sections)
                raise InputError(f"-S {override}: this stage reads only the sections {known}")
        if "RANK" not in os.environ:  # otherwise the launcher has checked them
            _check_all_settings(inputs.params, stage.__name__.removesuffix("_stage"))
        stage(inputs)


def _check_all_settings(params: Params, stage: str) -> None:
    """Exit with one line if any setting is wrong, including those that only later stages read.

    The check runs in a process of its own, so that the stage does not depend on its imports.
    """
    get = multiprocessing.get_context
    context = get("fork") if sys.platform == "linux" else get("spawn")  # see lm.prepare.workers
    process = context.Process(target=_check, args=(params, stage))
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(process.exitcode)


def _check(params: Params, stage: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the stage reports the interruption
    with one_line_errors():
        importlib.import_module("lm.check").check(params, str(PARAMS), stage)


def _files(path: Path) -> list[Path]:
    """Return the file, or all files of the folder; return [] if missing: its reader raises."""
    return sorted(file for file in (path, *path.rglob("*")) if file.is_file())


def _signature(file: Path) -> Signature:
    """Return figures that differ after any change of content: no program can set the ctime."""
    status = file.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _imported_code() -> dict[str, str]:
    """Return the SHA-256 of every imported file of this project by its relative path."""
    files = (getattr(module, "__file__", None) for module in list(sys.modules.values()))
    ours = sorted({Path(file).absolute() for file in files if file})
    return {
        file.relative_to(ROOT).as_posix(): EXECUTED.get(file) or sha256_file(file)
        for file in ours
        if any(file.is_relative_to(ROOT / name) for name in CODE)
    }
