"""Files to rows: parquet and JSON lines, with the place of every row, so that a complaint can name it.

What is wrong with a file is said in one sentence of ours; the library's own error is chained behind it.
"""

import json
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import pyarrow
import pyarrow.parquet

from dcpo_megatron.data.errors import DataError, is_unicode


class Table(NamedTuple):
    """The rows of one file: each with its place, such as "row 3 of data/train.parquet", counted from 1."""

    path: Path
    columns: tuple[str, ...]
    rows: list[tuple[str, dict]]


def read_table(path: str | Path, wanted: Collection[str]) -> Table:
    """Reads a ``.parquet`` or ``.jsonl`` (also ``.json``, ``.ndjson``: one object a line) file.

    ``wanted``: the top-level columns of a parquet file that are needed, as far as it has them; the others are not read.
    Raises DataError if the file is missing, a directory, of another kind, truncated or malformed, or has a name that is
    not Unicode.
    """
    path = Path(path)
    if not is_unicode(str(path)):
        raise DataError(f"the file name {str(path)!r} is not valid Unicode, and ids are made of it: rename the file")
    if path.is_dir():
        raise DataError(f"{path} is a directory: name the files in it")
    if not path.exists():
        raise DataError(f"there is no file {path}: check data.files (relative paths start at {Path.cwd()})")
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            return _read_parquet(path, wanted)
        if suffix in (".jsonl", ".json", ".ndjson"):
            return _read_json_lines(path)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror or 'input error'}): check it and its permissions"
        ) from error
    raise DataError(f"{path} ends in {suffix or 'nothing'!r}: only .parquet and .jsonl files are read")


def _read_parquet(path: Path, wanted: Collection[str]) -> Table:
    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        table = _widen(file.read(columns=[name for name in names if name in wanted]))
    except PermissionError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(
            f"{path} is not a readable parquet file, it may be cut off: copy or download it again"
        ) from error
    try:
        rows = table.to_pylist()
    except Exception as error:  # a text of other bytes than UTF-8, a time beyond Python's: it raises what it likes
        raise _unreadable(table, path) or error from error
    return Table(path, tuple(names), [(f"row {number} of {path}", row) for number, row in enumerate(rows, 1)])


def _unreadable(table: pyarrow.Table, path: Path) -> DataError | None:
    """The error for the first value that Python cannot hold."""
    for name, column in zip(table.column_names, table.columns, strict=True):
        for number, value in enumerate(column, 1):
            try:
                value.as_py()
            except Exception as error:
                reason = " ".join(str(error).split())
                return DataError(f"row {number} of {path}, column {name}, cannot be read ({reason}): correct it")
    return None


def _widen(table: pyarrow.Table) -> pyarrow.Table:
    """Numbers of 32 bits as the shortest decimals that mean them, in 64: 0.1, not 0.10000000149011612."""
    written, wide = (
        pyarrow.schema([field.with_type(_instead_of_float32(field.type, other)) for field in table.schema])
        for other in (pyarrow.string(), pyarrow.float64())
    )
    return table if wide == table.schema else table.cast(written).cast(wide)


def _instead_of_float32(type_: pyarrow.DataType, other: pyarrow.DataType) -> pyarrow.DataType:
    if type_ == pyarrow.float32():
        return other
    if pyarrow.types.is_struct(type_):
        return pyarrow.struct([field.with_type(_instead_of_float32(field.type, other)) for field in type_])
    if pyarrow.types.is_list(type_):
        return pyarrow.list_(type_.value_field.with_type(_instead_of_float32(type_.value_type, other)))
    return type_


def _read_json_lines(path: Path) -> Table:
    rows: list[tuple[str, dict]] = []
    columns: dict[str, None] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            place = f"line {number} of {path}"
            try:
                text = line.decode("utf-8-sig").strip()
                if not text:
                    continue
                row = json.loads(text)
            except UnicodeDecodeError as error:
                raise DataError(f"{place} is not UTF-8 text: convert the file to UTF-8") from error
            except (json.JSONDecodeError, RecursionError) as error:
                raise DataError(f"{place} is not JSON: every line must hold one JSON object") from error
            except ValueError as error:  # an integer of more digits than Python reads
                reason = str(error).partition(";")[0]
                raise DataError(f"{place} cannot be read ({reason}): correct or remove the line") from error
            if not isinstance(row, dict):
                raise DataError(f"{place} is a JSON {type(row).__name__}: every line must hold one JSON object")
            columns.update(dict.fromkeys(row))
            rows.append((place, row))
    return Table(path, tuple(columns), rows)
