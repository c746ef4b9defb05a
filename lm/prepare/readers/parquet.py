"""Parquet tables, read by row groups with about one chunk of the column in memory."""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from lm.base.errors import InputError
from lm.prepare import limits
from lm.prepare.file_bytes import (
    Decompressed,
    chunks,
    compression,
    refuse_expansion,
    refuse_pointer,
)
from lm.prepare.records import Bad, Reader, ReadOptions, Records, checked, not_one

ROWS = 1024  # at a time


class Parquet(Reader):
    """A table, the text in one of its columns; its stretches begin at row groups."""

    what = "table, column {}"

    def starts(self, size: int) -> list[int]:
        """Return the row groups at which stretches of about `size` bytes of text begin."""
        if compression(self.file):
            return [0]
        with _table(self.file, self.options) as table:
            column = _column(self.file, table, self.options.text_field)
            groups = (table.metadata.row_group(i) for i in range(table.num_row_groups))
            sizes = [group.column(column).total_uncompressed_size for group in groups]
        stretch = np.cumsum([0, *sizes])[:-1] // size
        return [0, *(np.flatnonzero(np.diff(stretch)) + 1).tolist()]

    def read(self, start: int = 0, stop: int | None = None) -> Records:
        """Return the rows of the row groups from `start` to before `stop`."""
        with _table(self.file, self.options) as table:
            number = _column(self.file, table, self.options.text_field)
            groups = range(table.num_row_groups)
            row = sum(table.metadata.row_group(i).num_rows for i in groups[:start])
            columns = (table.metadata.row_group(i).column(number) for i in groups[start:stop])
            size, made = sum(column.total_compressed_size for column in columns), 0
            for data in _values(table, number, self.options.text_field, groups[start:stop]):
                if data is None:
                    yield Bad(row, "no text", f"column '{self.options.text_field}' is null")
                else:
                    made += len(data)
                    refuse_expansion(self.file, size, made, self.options.max_expansion)
                    yield checked(row, data, self.options)
                row += 1

    def content(self, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """Return how the column is stored in these row groups, and its pages."""
        if compression(self.file):
            yield from super().content()
            return
        with _table(self.file, self.options) as table, open(self.file, "rb") as stream:
            number = _column(self.file, table, self.options.text_field)
            for i in range(table.num_row_groups)[start:stop]:
                column = table.metadata.row_group(i).column(number)
                stored = (column.physical_type, column.compression, column.num_values)
                yield repr((stored, table.schema.column(number).max_definition_level)).encode()
                first = column.dictionary_page_offset or column.data_page_offset
                stream.seek(min(first, column.data_page_offset))
                yield from chunks(stream, column.total_compressed_size)

    def name(self, offset: int) -> str:
        return f"{self.file}: row {offset}"  # from 0


@contextmanager
def _table(file: Path, options: ReadOptions) -> Iterator[Any]:
    """Open a parquet file; a compressed one is unpacked into a temporary file first."""
    import pyarrow
    from pyarrow.parquet import ParquetFile, read_metadata

    with ExitStack() as stack:
        if compression(file):
            source: Any = stack.enter_context(tempfile.TemporaryFile())
            unpacked = stack.enter_context(Decompressed(file, options.max_expansion))
            shutil.copyfileobj(unpacked, source, limits.CHUNK_BYTES)
        else:
            refuse_pointer(file)
            source = stack.enter_context(open(file, "rb"))
        try:
            # buffered: a row group is not read as a whole
            metadata = read_metadata(source)
            table = ParquetFile(
                source,
                metadata=metadata,
                buffer_size=1 << 20,
                pre_buffer=False,
                page_checksum_verification=True,
                read_dictionary=_shared(metadata, options.text_field),
            )
            yield stack.enter_context(table)
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            reason = str(error).split("\n")[0]
            raise InputError(f"{file}: damaged or no parquet table ({reason})") from None


def _shared(metadata: Any, name: str) -> list[str]:
    """Return the column, in a list, if its rows hold numbers of values that are stored once.

    Decoded, a thousand rows of one long value would take a thousand times its memory. Where most
    values are stored one by one, to look for equal ones takes four times as long.
    """
    paths = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
    if name not in paths:
        return []
    groups = (metadata.row_group(i) for i in range(metadata.num_row_groups))
    columns = [group.column(paths.index(name)) for group in groups]
    stored = [c.total_compressed_size for c in columns]
    values = [
        c.data_page_offset - (c.dictionary_page_offset or c.data_page_offset) for c in columns
    ]
    numbers_alone = sum(stored) - sum(values) <= sum(8 * c.num_values + 1024 for c in columns)
    return [name] if numbers_alone else []


def _column(file: Path, table: Any, name: str) -> int:
    """Return the number of a column of text among the columns that are stored."""
    from pyarrow import types

    schema = table.schema_arrow
    problem = not_one(name, schema.names)
    if problem is not None:
        raise InputError(f"{file}: {problem}; name one in data.text_field")
    kind = schema.field(name).type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    is_text = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
    if not any(test(kind) for test in (*is_text, types.is_string_view, types.is_binary_view)):
        raise InputError(
            f"{file}: column '{name}' is {kind}, not text; name one in data.text_field"
        )
    stored = [table.schema.column(i).path for i in range(len(table.schema))]
    problem = not_one(name, stored)  # the field b of a column a has the path of a column "a.b"
    if problem is not None:
        raise InputError(f"{file}: {problem}; name one in data.text_field")
    return stored.index(name)


def _values(table: Any, number: int, name: str, groups: Sequence[int]) -> Iterator[bytes | None]:
    """Return the values of a column in some row groups, about one chunk at a time."""
    for i in groups:
        group = table.metadata.row_group(i)
        size = group.column(number).total_uncompressed_size
        rows = min(ROWS, 1 + limits.CHUNK_BYTES * group.num_rows // max(1, size))
        for batch in table.iter_batches(rows, [i], columns=[name], use_threads=False):
            yield from _column_bytes(batch.column(0))


def _column_bytes(column: Any) -> Iterator[bytes | None]:
    """Return the values of an Arrow array of text, None for a null, without a str in between."""
    import pyarrow

    array, places = column, np.arange(len(column))
    if pyarrow.types.is_dictionary(column.type):
        array, places = column.dictionary, column.indices.fill_null(0).to_numpy()
    array = array.cast(pyarrow.large_binary())
    _, offsets, data = array.buffers()
    ends = np.frombuffer(offsets or bytes(8), dtype=np.int64)[array.offset :]
    view = memoryview(data) if data is not None else memoryview(b"")
    is_valid = column.is_valid().to_numpy(zero_copy_only=False)
    for place, valid in zip(places.tolist(), is_valid, strict=True):
        yield bytes(view[ends[place] : ends[place + 1]]) if valid else None


READERS = {".parquet": Parquet}
