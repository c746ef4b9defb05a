"""The stages of dvc.yaml, one module each.

This file runs before their imports, which take seconds.
"""

import hashlib
import os
import sys
from importlib.machinery import FileFinder, SourceFileLoader
from importlib.util import find_spec
from pathlib import Path
from types import CodeType

ROOT = Path(__file__).parent.parent
CODE = ("lm", "stages", "tools")
EXECUTED: dict[Path, str] = {}  # SHA-256 of each imported file of this project


class _FromSource(SourceFileLoader):
    """Compile a module from its source and record the hash of that source.

    Python's bytecode cache trusts size and time, so it may run an older source. And a file that is
    edited while torch is being imported would be hashed later, although an older one ran.
    """

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        source = self.get_data(path)
        EXECUTED[Path(path)] = hashlib.sha256(source).hexdigest()
        return self.source_to_code(source, path)


def _finder(folder: str) -> FileFinder:
    if not any(Path(folder).is_relative_to(ROOT / name) for name in CODE):
        raise ImportError
    return FileFinder(folder, (_FromSource, [".py"]))


sys.path_hooks.insert(0, _finder)

needed = ("torch", "numpy", "yaml", "safetensors", "tokenizers", "jaxtyping", "tqdm")
absent = [name for name in needed if find_spec(name) is None]
if absent or sys.version_info < (3, 11):
    lack = f"has no {absent[0]}" if absent else "is older than Python 3.11"
    sys.stderr.write(
        f"error: {sys.executable} {lack}: not the Python of this project; run "
        "`source .venv/bin/activate` (`make setup` makes it), then the same command again\n"
    )
    raise SystemExit(3)

from lm.base.signals import end_with_parent  # noqa: E402 - from source

if "RANK" in os.environ:  # one of several processes: torch's C++ warnings come with a traceback
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

# dvc, or the launcher of several processes, may die while torch is being imported
if {"DVC_ROOT", "TORCHELASTIC_RUN_ID"} & os.environ.keys():
    end_with_parent()
