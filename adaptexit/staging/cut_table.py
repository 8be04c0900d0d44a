"""A table of the places where a model can be cut, and what it costs to get there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, overload

from adaptexit.utils.frames import as_frame

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class CutPoint:
    """One place where a model can be cut.

    Attributes
    ----------
    name : str
        Dotted name of the module; the cut is right after it returns.
    shape : tuple of int, or nested
        Shape of its output without the sample axis. Lists, tuples and dicts of tensors are nested alike; whatever is
        no tensor stands there as the name of its type.
    macs : float
        MACs a sample from the input to here.
    relative_macs : float
        The same as a share of the whole model's.
    latency_s : float
        Seconds a sample from the input to here, at the batch size of the example.
    is_tensor : bool
        Whether the output holds one tensor, alone or beside numbers: what a head can read.
    is_narrow : bool
        Whether nothing else computed so far, nor the input, is needed afterwards.
    """

    name: str
    shape: Any
    macs: float
    relative_macs: float
    latency_s: float
    is_tensor: bool
    is_narrow: bool


@dataclass(frozen=True, repr=False)
class CutTable(Sequence[CutPoint]):
    """Cut points in execution order, printed as a table.

    Attributes
    ----------
    points : tuple of CutPoint
    macs, latency_s : float
        MACs and seconds a sample of the whole model.
    """

    points: tuple[CutPoint, ...]
    macs: float
    latency_s: float

    @property
    def names(self) -> list[str]:
        """Name of every cut point."""
        return [point.name for point in self.points]

    def to_frame(self) -> pandas.DataFrame:
        """A pandas table, one row a cut point, columns as the attributes of :class:`CutPoint` (needs pandas)."""
        return as_frame([asdict(point) for point in self.points], columns=list(CutPoint.__dataclass_fields__))

    @overload
    def __getitem__(self, index: int) -> CutPoint: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[CutPoint]: ...
    def __getitem__(self, index: int | slice) -> CutPoint | Sequence[CutPoint]:
        return self.points[index]

    def __len__(self) -> int:
        return len(self.points)

    def __repr__(self) -> str:
        yes = ("no", "yes")
        header = ("cut", "output", "M MACs", "share", "ms", "tensor", "narrow")
        rows = [
            (p.name, str(p.shape), *_costs(p.macs, p.relative_macs, p.latency_s), yes[p.is_tensor], yes[p.is_narrow])
            for p in self.points
        ]
        rows.append(("whole model", "", *_costs(self.macs, 1.0, self.latency_s), "", ""))
        widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if column < 2 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in (header, *rows)
        )


def _costs(macs: float, relative: float, latency_s: float) -> tuple[str, str, str]:
    return f"{macs / 1e6:.4g}", f"{relative:.1%}", f"{latency_s * 1e3:.3g}"
