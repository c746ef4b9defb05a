"""Read parquet tables by row groups, with about one chunk of the column in memory."""

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
from lm.prepare.records import (
    NAME_ANOTHER,
    SKIP,
    Bad,
    Reader,
    ReadOptions,
    Records,
    checked,
    not_one,
)

ROWS = 1024  # at a time


class Parquet(Reader):
    """A table, the text in one of its columns. Stretches count in row groups, offsets in rows."""

    description = "table, column {}"

    def starts(self, size: int) -> list[int]:
        """Return the row groups at which stretches of about `size` bytes of text begin."""
        if compression(self.file):
            return [0]
        with _table(self.file, self.options) as (_, columns):
            sizes = [column.total_uncompressed_size for column in columns]
        stretch = np.cumsum([0, *sizes])[:-1] // size
        return [0, *(np.flatnonzero(np.diff(stretch)) + 1).tolist()]

    def read(self, start: int = 0, stop: int | None = None) -> Records:
        """Yield the rows of the row groups from `start` to before `stop`."""
        field = self.options.text_field
        with _table(self.file, self.options) as (table, columns):
            row = sum(table.metadata.row_group(i).num_rows for i in range(len(columns))[:start])
            size = sum(column.total_compressed_size for column in columns[start:stop])
            made = 0
            for i in range(len(columns))[start:stop]:
                for data in _values(table, field, i, columns[i].total_uncompressed_size):
                    if data is None:
                        yield Bad(
                            row, "no text", f"column '{field}' is null; remove the row {SKIP}"
                        )
                    else:
                        made += len(data)
                        refuse_expansion(self.file, size, made, self.options.max_expansion)
                        yield checked(row, data, self.options)
                    row += 1

    def content(self, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """Yield how the column is stored in the row groups, and its pages."""
        if compression(self.file):
            yield from super().content()
            return
        with _table(self.file, self.options) as (table, columns), open(self.file, "rb") as stream:
            may_be_null = table.schema_arrow.field(self.options.text_field).nullable
            for column in columns[start:stop]:
                stored = (column.physical_type, column.compression, column.num_values)
                yield repr((*stored, may_be_null)).encode()
                first = column.dictionary_page_offset or column.data_page_offset
                stream.seek(min(first, column.data_page_offset))
                yield from chunks(stream, column.total_compressed_size)

    def name(self, offset: int) -> str:
        return f"{self.file}: row {offset}"  # from 0


@contextmanager
def _table(file: Path, options: ReadOptions) -> Iterator[tuple[Any, list[Any]]]:
    """Open a parquet file; yield it with the text column of each row group.

    A compressed file is unpacked into a temporary file first.
    """
    import pyarrow
    from pyarrow.parquet import ParquetFile, read_metadata

    with ExitStack() as stack:
        if compression(file):
            stream: Any = stack.enter_context(tempfile.TemporaryFile())
            unpacked = stack.enter_context(Decompressed(file, options.max_expansion))
            shutil.copyfileobj(unpacked, stream, limits.CHUNK_BYTES)
        else:
            refuse_pointer(file)
            stream = stack.enter_context(open(file, "rb"))
        try:
            metadata = read_metadata(stream)
            number = _column(file, metadata.schema, options.text_field)
            columns = [metadata.row_group(i).column(number) for i in range(metadata.num_row_groups)]
            # buffered: a row group is not read as a whole
            table = ParquetFile(
                stream,
                metadata=metadata,
                buffer_size=1 << 20,
                pre_buffer=False,
                page_checksum_verification=True,
                read_dictionary=[options.text_field] if _is_shared(columns) else [],
            )
            yield stack.enter_context(table), columns
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            reason = str(error).split("\n")[0]
            raise InputError(
                f"{file}: damaged or not a parquet table ({reason}); fetch it again"
            ) from None


def _is_shared(columns: Sequence[Any]) -> bool:
    """Return whether all rows of a column refer to values in a dictionary.

    Read as plain values, a thousand rows of one long value take a thousand times its memory. Where
    most values are not in a dictionary, reading them as one takes four times as long.
    """
    size = 0  # outside of dictionaries, beyond 8 bytes a row
    for column in columns:
        values = column.data_page_offset - (
            column.dictionary_page_offset or column.data_page_offset
        )
        size += column.total_compressed_size - values - 8 * column.num_values - 1024
    return size <= 0


def _column(file: Path, schema: Any, name: str) -> int:
    """Return the number of the text column among the stored columns."""
    from pyarrow import types

    arrow = schema.to_arrow_schema()
    if problem := not_one(name, arrow.names):
        raise InputError(f"{file}: {problem}")
    kind = arrow.field(name).type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    is_text = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
    if not any(test(kind) for test in (*is_text, types.is_string_view, types.is_binary_view)):
        raise InputError(f"{file}: column '{name}' is {kind}, not text; {NAME_ANOTHER}")
    stored = [schema.column(i).path for i in range(len(schema))]
    if problem := not_one(name, stored):  # field b of column a is stored as "a.b", too
        raise InputError(f"{file}: {problem}")
    return stored.index(name)


def _values(table: Any, name: str, group: int, size: int) -> Iterator[bytes | None]:
    """Yield the values of a column in a row group, None for a null, about one chunk in memory.

    Takes the bytes from Arrow's buffers, without a str in between. `size` is the column's in bytes.
    """
    import pyarrow

    num_rows = table.metadata.row_group(group).num_rows
    rows = min(ROWS, 1 + limits.CHUNK_BYTES * num_rows // max(1, size))
    for batch in table.iter_batches(rows, [group], columns=[name], use_threads=False):
        column = array = batch.column(0)
        places = np.arange(len(column))
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
