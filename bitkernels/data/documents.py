"""Documents of text files, parquet files and datasets."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from bitkernels.data.text import read_text

# A document ends with a blank line, so that a model learns where one ends.
_END = "\n\n"

Dataset = Iterable[Mapping[str, object]]


def documents(source: str | Path | Dataset, column: str = "text") -> Iterator[str]:
    """The documents of ``source``, each ending with a blank line; empty ones are left out.

    Args:
        source: a text file (UTF-8, also ``.xz``), whose documents a blank line separates; a ``.parquet`` file, or any
            iterable of mappings, such as a dataset of the ``datasets`` library: a document a row; or a folder, whose
            files are read in the order of their names.
        column: the rows' column that holds the text.

    Raises:
        ValueError: a file cannot be read, or has no such column, or its text is no text.
        ImportError: a parquet file, without pyarrow.
    """
    if isinstance(source, str | Path):
        path = Path(source)
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
            if not files:
                raise ValueError(f"{path}: holds no files")
            found = (text for file in files for text in documents(file, column))
        elif path.suffix == ".parquet":
            found = _parquet_rows(path, column)
        else:
            found = read_text(path).split("\n\n")
    else:
        found = (_text(row, column) for row in source)
    for text in found:
        if text.strip():
            yield text.strip("\n") + _END


def _parquet_rows(path: Path, column: str) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"{path}: parquet files need pyarrow (pip install pyarrow)") from error
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not a parquet file ({error})") from error
    with file:
        if column not in file.schema_arrow.names:
            raise ValueError(f"{path}: has no column {column!r}, but {', '.join(file.schema_arrow.names)}")
        for batch in file.iter_batches(columns=[column]):
            for value in batch.column(0).to_pylist():
                yield _text({column: value}, column)


def _text(row: Mapping[str, object], column: str) -> str:
    if column not in row:
        raise ValueError(f"dataset: a row has no column {column!r}, but {', '.join(map(str, row))}")
    value = row[column]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"dataset: column {column!r} must hold text, got {type(value).__name__}")
    return value
