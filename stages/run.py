"""What every stage shares: its command line, its settings, and how it ends.

A stage is started as `python -m stages.NAME [-S section.key=value ...]`.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm
from lm.config import load_params
from lm.errors import EnvironmentFault, InputError, one_line_errors
from lm.files import sha256_file
from lm.signals import end_with_parent

Params = dict[str, dict[str, Any]]


def run(
    stage: Callable[[Params, argparse.Namespace], None],
    sections: list[str],
    *extra_arguments: tuple[str, dict[str, Any]],
) -> None:
    """Parse the command line, read params.yaml, run the stage; user errors end in one line.

    An override outside of `sections`, which are all that the stage reads, is such an error.
    """
    parser = argparse.ArgumentParser(description=sys.modules[stage.__module__].__doc__)
    parser.add_argument(
        "-S",
        dest="overrides",
        action="append",
        default=[],
        metavar="section.key=value",
        help="override a setting of params.yaml; can be repeated",
    )
    for name, options in extra_arguments:
        parser.add_argument(name, **options)
    arguments = parser.parse_args()
    with one_line_errors():
        if not Path(lm.__file__).is_relative_to(Path.cwd()):
            raise EnvironmentFault(
                f"lm comes from {Path(lm.__file__).parent}, not from {Path.cwd()}; run "
                "`python -m stages.NAME` in the project's root folder and do not install lm"
            )
        if "DVC_ROOT" in os.environ:
            end_with_parent()
        params = load_params(Path("params.yaml"), arguments.overrides)
        for override in arguments.overrides:
            if override.split(".")[0] not in sections:
                known = ", ".join(sections)
                raise InputError(f"-S {override}: this stage reads the sections {known} alone")
        stage(params, arguments)


def imported_code() -> dict[str, str]:
    """The SHA-256 of every file of this project that is imported now, by relative path."""
    files = (getattr(module, "__file__", None) for module in list(sys.modules.values()))
    ours = {Path(file) for file in files if file and Path(file).is_relative_to(Path.cwd())}
    ours = {file for file in ours if file.relative_to(Path.cwd()).parts[0] in ("lm", "stages")}
    return {file.relative_to(Path.cwd()).as_posix(): sha256_file(file) for file in sorted(ours)}
