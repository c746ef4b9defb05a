"""The formats of text files, by suffix: a new one is a new file in this folder, with READERS.

The suffix decides the format. The first bytes of a file can only contradict it: then the file is
one bad record, so that nothing becomes text that a person would not call text.
"""

from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

from lm.prepare.file_bytes import compression
from lm.prepare.records import Reader, ReadOptions

READERS: dict[str, type[Reader]] = {}
for module in iter_modules(__path__):
    readers = import_module(f"{__name__}.{module.name}").READERS
    assert not READERS.keys() & readers.keys()
    READERS.update(readers)


def suffix_of(file: Path) -> str:
    """Return the suffix in small letters, with that of its compression, as .txt or .txt.gz."""
    packed = file.suffix if compression(file) else ""
    return (Path(file.stem).suffix + packed if packed else file.suffix).lower()


def reader_of(file: Path, options: ReadOptions) -> Reader:
    """Return a reader of a file, by its suffix or the one before .gz or .zst."""
    inner = file.stem if compression(file) else file.name
    return READERS.get(Path(inner).suffix.lower(), READERS[""])(file, options)
