"""The formats of text files, by suffix. To add one, add a file with READERS to this folder.

The suffix decides the format. If the first bytes of a file contradict it, the file is one bad
record, so that an image or an archive never becomes text.
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
    """Return the suffix in lower case, as .txt, with that of a compression, as .txt.gz."""
    packed = file.suffix if compression(file) else ""
    return (Path(file.stem).suffix + packed if packed else file.suffix).lower()


def reader_of(file: Path, options: ReadOptions) -> Reader:
    """Return the reader of a file, by its suffix or by the one before its compression's."""
    inner = file.stem if compression(file) else file.name
    return READERS.get(Path(inner).suffix.lower(), READERS[""])(file, options)
