"""Token shards as one array that stays on disk, verified when a file is opened."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lm.base.errors import InputError
from lm.data.shards import REMEDY

HASHED_TOKENS = 1 << 18  # read at once to verify a file
OPEN_FILES = 100  # at a time for each of two splits: macOS allows a process 256


class TokenStream:
    """Shards as one 1-D array of ids that stay on disk: len(), slices, rows of equal length.

    Files are read, not memory-mapped: access to a mapped file that was truncated ends the process
    by SIGBUS without a message. Copying a window costs no more than mapping it.
    """

    def __init__(
        self,
        files: Sequence[Path],
        entries: Sequence[dict[str, Any]],
        dtype: np.dtype[Any],
        vocab_size: int,
    ):
        """Verify the files by their entries in tokens.json.

        Raises InputError if a file is missing, truncated, extended or edited, or has an id beyond
        the vocabulary.
        """
        self._descriptors: dict[int, int] = {}  # by number of the file, the oldest first
        self._verified: dict[int, tuple[int, int, int]] = {}  # inode, size, time of change
        self._files, self._entries, self.dtype = files, entries, dtype
        self._vocab_size = vocab_size
        lengths = [entry["tokens"] for entry in entries]
        self._bounds = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        for number in range(len(files)):
            os.close(self._open(number))

    def __len__(self) -> int:
        return int(self._bounds[-1])

    def __getitem__(self, place: slice) -> NDArray[Any]:
        """Return the ids of a slice without a step. Raises InputError if a file has changed.

        Every id is compared with the vocabulary, in case a file was rewritten in place. This costs
        next to nothing; the model would fail with an IndexError.
        """
        start, stop, _ = place.indices(len(self))
        ids = np.empty(max(0, stop - start), dtype=self.dtype)
        view = ids.view(np.uint8).data
        file = int(np.searchsorted(self._bounds, start, side="right")) - 1
        offset = (start - int(self._bounds[file])) * self.dtype.itemsize
        while view:
            rest = int(self._bounds[file + 1] - self._bounds[file]) * self.dtype.itemsize - offset
            if rest == 0:
                file, offset = file + 1, 0
                continue
            size = os.preadv(self._descriptor(file), [view[:rest]], offset)  # 2 GiB at most
            if size == 0:
                raise InputError(f"{self._files[file]}: became shorter while it was read; {REMEDY}")
            view, offset = view[size:], offset + size
        if ids.size and ids.max() >= self._vocab_size:
            raise self._beyond_vocabulary(ids, start)
        return ids

    def rows(self, starts: NDArray[np.int64], length: int) -> NDArray[Any]:
        """Return `length` ids from each start, (len(starts), length). Raises as a slice does."""
        width, size = length * self.dtype.itemsize, self.dtype.itemsize
        files = np.searchsorted(self._bounds, starts, side="right") - 1
        offsets = (starts - self._bounds[files]) * size
        sizes = np.minimum(width, (self._bounds[files + 1] - starts) * size)
        places = zip(files.tolist(), sizes.tolist(), offsets.tolist(), strict=True)
        read = [os.pread(self._descriptor(f), size, offset) for f, size, offset in places]
        if min(map(len, read), default=width) < width:
            for row, start in enumerate(starts.tolist()):
                if len(read[row]) < width:  # continues in the next file, or the file has shrunk
                    read[row] = self[start : start + length].tobytes()
        rows = np.frombuffer(b"".join(read), dtype=self.dtype).reshape(-1, length)
        if rows.size and rows.max() >= self._vocab_size:
            row = int(rows.max(axis=1).argmax())
            raise self._beyond_vocabulary(rows[row], int(starts[row]))
        return rows

    def _beyond_vocabulary(self, ids: NDArray[Any], start: int) -> InputError:
        """Return the error for the first of some ids, from `start` on, beyond the vocabulary."""
        at = int((ids >= self._vocab_size).argmax())
        file = int(np.searchsorted(self._bounds, start + at, side="right")) - 1
        return InputError(
            f"{self._files[file]}: token {start + at - self._bounds[file]} has id {ids[at]}, but "
            f"the vocabulary has {self._vocab_size} ids; {REMEDY}"
        )

    def _descriptor(self, number: int) -> int:
        """Return an open file; if OPEN_FILES are open, close the one that was opened first."""
        descriptor = self._descriptors.get(number)
        if descriptor is None:
            if len(self._descriptors) == OPEN_FILES:
                os.close(self._descriptors.pop(next(iter(self._descriptors))))
            descriptor = self._descriptors[number] = self._open(number)
        return descriptor

    def _open(self, number: int) -> int:
        """Open a file; verify its content unless it has not changed since it was verified."""
        if not self._files[number].is_file():
            raise InputError(f"{self._files[number]}: no such file; {REMEDY}")
        descriptor = os.open(self._files[number], os.O_RDONLY)
        status = os.fstat(descriptor)
        stamp = status.st_ino, status.st_size, status.st_mtime_ns
        if stamp != self._verified.get(number):
            try:
                self._verify(descriptor, number)
            except BaseException:
                os.close(descriptor)
                raise
            self._verified[number] = stamp
        return descriptor

    def _verify(self, descriptor: int, number: int) -> None:
        file, entry = self._files[number], self._entries[number]
        size = entry["tokens"] * self.dtype.itemsize
        if (found := os.fstat(descriptor).st_size) != size:
            raise InputError(f"{file}: {found} bytes, but tokens.json says {size}; {REMEDY}")
        digest, beyond, start = hashlib.sha256(), None, int(self._bounds[number])
        buffer = np.empty(HASHED_TOKENS, dtype=self.dtype)
        view = buffer.view(np.uint8).data
        with open(descriptor, "rb", closefd=False) as stream:
            while read := stream.readinto(view):
                digest.update(view[:read])
                ids = buffer[: read // self.dtype.itemsize]
                if beyond is None and ids.size and ids.max() >= self._vocab_size:
                    beyond = self._beyond_vocabulary(ids, start)
                start += len(ids)
        if digest.hexdigest() != entry["sha256"]:
            raise InputError(f"{file}: content differs from the hash in tokens.json; {REMEDY}")
        if beyond is not None:
            raise beyond

    def __del__(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
