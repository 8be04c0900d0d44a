"""What one input looked like when the estimator was fitted, and what is said of inputs that look otherwise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from adaptexit.exceptions import InputWarning, warn


@dataclass(frozen=True)
class InputSpec:
    """The inputs that an estimator was fitted on.

    Attributes
    ----------
    shape : tuple of int
        Of one input, without the axis of the samples.
    resizes : bool
        Whether every model brings images to its own size, so that any size will do.
    """

    shape: tuple[int, ...]
    resizes: bool = False

    def check(self, shape: tuple[int, ...]) -> None:
        """Refuse a batch of this shape (B, ...) whose inputs have other axes or channels; warn of another size.

        Raises
        ------
        ValueError
        """
        own = tuple(shape[1:])
        if own == self.shape:
            return
        right = f"X must have the shape (N, {', '.join(map(str, self.shape))}) of the inputs of fit; got {tuple(shape)}"
        if shape[:1] == self.shape[:1] and len(shape) == len(self.shape):
            raise ValueError(f"{right}, which looks like one input alone. Give it an axis for the samples: X[None].")
        if len(own) != len(self.shape) or (own and own[0] != self.shape[0]):
            what = "channels" if len(self.shape) == 3 else "features"
            differ = f"{own[0]} {what} instead of {self.shape[0]}" if len(own) == len(self.shape) else "other axes"
            raise ValueError(f"{right}: {differ}. Convert the inputs, or fit on inputs like these.")
        if not self.resizes:
            warn(
                f"inputs have shape {tuple(own)}, those of fit had {self.shape}: the model takes them, but thresholds "
                "and costs were found on the other size. Resize the inputs, or calibrate on inputs like these.",
                InputWarning,
            )

    @classmethod
    def of(cls, x: Any, resizes: bool) -> InputSpec:
        """Of a batch (B, ...)."""
        return cls(tuple(int(size) for size in x.shape[1:]), resizes)
