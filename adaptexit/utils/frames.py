"""Tables: for pandas, which is an extra, and as text."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas

READABLE = (".csv", ".csv.gz", ".parquet", ".pq")
"""How the names of tables that :func:`read_frame` reads end."""


def as_frame(data: Any, **options: Any) -> pandas.DataFrame:
    """``pandas.DataFrame(data, **options)``, or an error that says how to get pandas."""
    try:
        import pandas
    except ImportError as error:
        raise ImportError("to_frame needs pandas: pip install pandas (the extra 'plot' brings it).") from error
    return pandas.DataFrame(data, **options)


def aligned(rows: Sequence[Sequence[str]], n_words: int = 1) -> list[str]:
    """Rows of cells as lines of one width: the first ``n_words`` columns to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            f"{cell:<{width}}" if i < n_words else f"{cell:>{width}}"
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def read_frame(path: str | os.PathLike[str]) -> pandas.DataFrame:
    """A CSV or Parquet file as a table; columns of one name keep it, so that whoever uses them can refuse them."""
    file = Path(path).expanduser()
    if not file.name.lower().endswith(READABLE):
        raise ValueError(
            f"frame must be a file that ends in one of {list(READABLE)}; got {file}. Read it yourself and give the "
            "table (a DataFrame, or a dict of columns)."
        )
    if not file.is_file():
        raise FileNotFoundError(f"frame must be a file; {file} is {'a folder' if file.is_dir() else 'not there'}.")
    try:
        import pandas
    except ImportError as error:
        raise ImportError(
            "reading a file needs pandas: pip install pandas (the extra 'plot' brings it), or give a dict of columns."
        ) from error
    try:
        if file.name.lower().endswith((".parquet", ".pq")):
            return pandas.read_parquet(file)
        # Names of classes such as "None" and "NA" are no gaps.
        table = pandas.read_csv(file, keep_default_na=False, na_values=["", "nan", "NaN"])
        header = pandas.read_csv(file, header=None, nrows=1, dtype=str, keep_default_na=False)
        table.columns = header.iloc[0].tolist()
        return table
    except ImportError as error:
        raise ImportError(f"{file} is Parquet, which pandas reads with pyarrow: pip install pyarrow.") from error
    except Exception as error:  # whatever a reader raises for a file that is none of its kind
        raise ValueError(f"frame could not be read: {file}: {error}") from error
