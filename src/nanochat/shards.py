"""Read shards: parquet files with a column of documents."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

NAMED = 8  # columns that an error names
HIDDEN = (".", "__")  # first characters of files that are no data, such as macOS's ._ sidecars


class ShardError(ValueError):
    """Say in one line which shard cannot be read, and why."""


def data_dir() -> Path:
    """Return the default folder of the shards."""
    from nanochat.common import base_dir

    return base_dir() / "base_data"


def list_shards(folder: Path | None = None) -> list[Path]:
    """Return the folder's parquet files, sorted; none if it does not exist. The last of several is for validation."""
    found = (folder or data_dir()).glob("*.parquet")
    return sorted(path for path in found if path.is_file() and not path.name.startswith(HIDDEN))


def read_shard(path: Path, column: str = "text", start: int = 0) -> Iterator[str]:
    """Yield the texts from row `start`, one row group in memory at a time; rows without a text are skipped.

    Raises ShardError if the file is damaged or has no such column of text.
    """
    return (text for text in read_rows(path, column, start) if text is not None)


def read_rows(
    path: Path,
    column: str = "text",
    start: int = 0,
    *,
    encoding: str | None = None,
    skip: Callable[[str, int], object] | None = None,
) -> Iterator[str | None]:
    """Yield each row's text from row `start`, or None for a null, one row group in memory at a time.

    `encoding` decodes a column of bytes, which is refused without it. `skip` is called, with the error and the number
    of rows, for a row or a row group that cannot be read; without it, that raises ShardError, as does any other damage.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            _check_column(path, file.schema_arrow, column, encoding)
            first = 1  # the number of the row group's first row
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if start < rows:
                    try:
                        table = file.read_row_group(group, columns=[column])
                    except (pa.ArrowException, OSError, EOFError) as error:
                        where = f"rows {first} to {first + rows - 1}"
                        reason = f"{path}: cannot be read ({where}: {_first_line(error)})"
                        if skip is None:
                            raise ShardError(reason) from None
                        skip(reason, rows - start)
                    else:
                        # a dotted name also reads a field of that path inside a struct
                        values = table.column(table.schema.get_field_index(column))[start:]
                        yield from _texts(path, values, first + start, encoding or "utf-8", skip)
                start = max(0, start - rows)
                first += rows
    except (pa.ArrowException, OSError, EOFError) as error:
        raise ShardError(f"{path}: cannot be read ({_first_line(error)})") from None


def _texts(
    path: Path, values: Any, first: int, encoding: str, skip: Callable[[str, int], object] | None
) -> Iterator[str | None]:
    try:
        texts = values.to_pylist()
    except UnicodeDecodeError:  # a writer may have put any bytes into a column of strings
        import pyarrow as pa

        texts = values.cast(pa.large_binary()).to_pylist()
    for number, text in enumerate(texts, first):
        if isinstance(text, bytes):
            try:
                text = text.decode(encoding)
            except UnicodeDecodeError as error:
                reason = f"{path}: cannot be read (row {number}: {error})"
                if skip is None:
                    raise ShardError(reason) from None
                skip(reason, 1)
                continue
        yield text


def check_shard(path: Path, column: str | None = None) -> None:
    """Raise ShardError unless the parquet footer is intact and has the column, if one is given. Reads no text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            if column is not None:
                _check_column(path, file.schema_arrow, column, None)
    except (pa.ArrowException, OSError) as error:
        raise ShardError(f"{path}: cannot be read ({_first_line(error)})") from None


def _check_column(path: Path, schema: Any, column: str, encoding: str | None) -> None:
    others = [field.name for field in schema if _is_text(field.type) and schema.names.count(field.name) == 1]
    if advice := " or ".join(name for name in others[:3] if name != column):
        advice = f"; give --column {advice}"
    if column not in schema.names:
        names = ", ".join(schema.names[:NAMED]) + (" and more" if len(schema.names) > NAMED else "")
        raise ShardError(f"{path}: has no column {column}, only {names}{advice}")
    if schema.names.count(column) > 1:
        raise ShardError(f"{path}: has {schema.names.count(column)} columns {column}; rename one{advice}")
    kind = schema.field(column).type
    if _is_bytes(kind):
        advice = f"; give --encoding utf-8 if these bytes are UTF-8{advice.replace('; give', ', or')}"
        if encoding is not None:
            return
    if not _is_text(kind):
        raise ShardError(f"{path}: column {column} holds {kind}, not text{advice}")


def _is_text(kind: Any) -> bool:
    """Tell whether a column of this type holds strings, or nothing but nulls."""
    import pyarrow.types as kinds

    text = kind.value_type if kinds.is_dictionary(kind) else kind
    return bool(
        kinds.is_string(text) or kinds.is_large_string(text) or kinds.is_string_view(text) or kinds.is_null(text)
    )


def _is_bytes(kind: Any) -> bool:
    import pyarrow.types as kinds

    return bool(
        kinds.is_binary(kind)
        or kinds.is_large_binary(kind)
        or kinds.is_binary_view(kind)
        or kinds.is_fixed_size_binary(kind)
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
