"""Tables for pandas, which is an extra."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas


def as_frame(data: Any, **options: Any) -> pandas.DataFrame:
    """``pandas.DataFrame(data, **options)``, or an error that says how to get pandas."""
    try:
        import pandas
    except ImportError as error:
        raise ImportError("to_frame needs pandas: pip install pandas (the extra 'plot' brings it).") from error
    return pandas.DataFrame(data, **options)
