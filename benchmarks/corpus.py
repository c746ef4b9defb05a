"""Make a text of any size for benchmarks: Python source and its documentation, in documents."""

import ast
import sysconfig
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

END = b"<|endoftext|>"
MAX_FILE_BYTES = 200_000


def documents(size_bytes: int) -> Iterator[bytes]:
    """Yield source files of the installed packages, and after each the English of its docstrings.

    After the last file, begin again with altered words, so that no two documents are the same.
    """
    site = Path(sysconfig.get_paths()["purelib"])
    files = sorted(f for f in site.rglob("*.py") if f.stat().st_size <= MAX_FILE_BYTES)
    for number, file in enumerate(cycle(files)):
        for text in _texts(file):
            text = text.strip()
            if text and b"\0" not in text and END not in text:
                yield _altered(text, number // len(files))
                size_bytes -= len(text)
        if size_bytes <= 0:
            return


def _texts(file: Path) -> list[bytes]:
    """Return a file's source and its docstrings; nothing if this Python cannot parse it."""
    try:
        data = file.read_bytes()
        nodes = [
            n for n in ast.walk(ast.parse(data)) if isinstance(n, ast.ClassDef | ast.FunctionDef)
        ]
        data.decode()
        return [data, "\n\n".join(filter(None, map(ast.get_docstring, nodes))).encode()]
    except (SyntaxError, ValueError, RecursionError):
        return []


def _altered(text: bytes, lap: int) -> bytes:
    """Return the text with a mark on some words, which differs in each lap."""
    return text if lap == 0 else text.replace(b"e ", b"e%d " % lap)
