"""The bytes of a file: opened, decompressed if its suffix says so, and kept within bounds."""

from collections.abc import Iterator
from io import BufferedIOBase, BufferedReader, RawIOBase
from pathlib import Path
from typing import Any

from lm.base.errors import InputError
from lm.prepare import limits

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
POINTERS = {  # what stands in the place of a file that git alone has not brought
    b"version https://git-lfs.github.com/spec/": ("Git LFS", "git lfs pull"),
    b"/annex/objects/": ("git-annex", "git annex get"),
}


def compression(file: Path) -> str | None:
    """Return how a file is compressed, by its suffix."""
    return COMPRESSIONS.get(file.suffix.lower())


def opened(file: Path, max_expansion: int) -> BufferedReader:
    """Open a file of text as a stream, decompressed if its suffix says so.

    Raises InputError if the file is not here.
    """
    raw: Any = Decompressed(file, max_expansion) if compression(file) else open(file, "rb", 0)  # noqa: SIM115
    stream = BufferedReader(raw)
    if not compression(file):
        refuse_pointer(file, stream.peek(limits.HEAD_BYTES))
    return stream


def chunks(stream: BufferedIOBase, size: int | None = None) -> Iterator[bytes]:
    """Return the next `size` bytes of a stream, or all, in chunks."""
    left = float("inf") if size is None else size
    # most files end here: a longer buffer is mapped
    at_once = min(limits.SEARCH_BYTES, limits.CHUNK_BYTES)
    while chunk := stream.read(int(min(at_once, left))):
        left -= len(chunk)
        at_once = limits.CHUNK_BYTES
        yield chunk


class Decompressed(RawIOBase):
    """The content of a .gz or .zst file, its checksums verified; can be read once."""

    def __init__(self, file: Path, max_expansion: int):
        import pyarrow  # takes 0.1 s: only where it is needed

        refuse_pointer(file)
        self.file, self.size, self.made = file, file.stat().st_size, 0
        self.max_expansion = max_expansion
        raw = open(file, "rb")  # noqa: SIM115 - pyarrow closes it; by name it opens UTF-8 alone
        self.stream = pyarrow.input_stream(raw, compression=compression(file))

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self.stream.read(len(buffer))
        except OSError as error:
            if "requires too much memory" in str(error):  # the words of zstd
                raise InputError(
                    f"{self.file}: compressed with a window longer than 128 MiB; unpack it "
                    f"(zstd -d --long=31)"
                ) from None
            raise InputError(f"{self.file}: damaged or cut off ({error})") from None
        self.made += len(data)
        refuse_expansion(self.file, self.size, self.made, self.max_expansion)
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self.stream.close()
        super().close()


def refuse_pointer(file: Path, head: bytes | None = None) -> None:
    """Raise InputError if what stands here is not the file but says where it is."""
    if head is None:
        with open(file, "rb") as stream:
            head = stream.read(limits.HEAD_BYTES)
    for signature, (tool, command) in POINTERS.items():
        if head.startswith(signature):
            raise InputError(f"{file}: a pointer of {tool}, not the file itself; run `{command}`")


def refuse_expansion(file: Path, size: int, expanded: int, limit: int) -> None:
    """Raise InputError if a file holds more than its size allows."""
    if expanded > max(limits.MAX_DOCUMENT_BYTES, size * limit):
        raise InputError(
            f"{file}: {size:,} bytes expand to {limit} times as many or more; raise "
            "data.max_expansion if that is right"
        )
