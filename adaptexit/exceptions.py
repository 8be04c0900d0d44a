"""Every warning and error that the package defines, and how warnings reach the caller."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

_PACKAGE = str(Path(__file__).parent) + os.sep


class CalibrationWarning(UserWarning):
    """Calibration data say less than they seem to: they are few, learned from already, or without some classes."""


class LabelWarning(UserWarning):
    """The labels hardly fit the model's answers."""


class SaverWarning(UserWarning):
    """A saver does not pay: running it costs more than the work it takes off the models behind it."""


class CostWarning(UserWarning):
    """A model does work that is not counted."""


class InputWarning(UserWarning):
    """Inputs are taken, but differ from those of ``fit``, or may not be what the model was trained on."""


class SplitWarning(UserWarning):
    """Something of the model is not carried over into its stages."""


class FullModelWarning(UserWarning):
    """Training together with exits has cost the full model accuracy."""


class CheckpointWarning(UserWarning):
    """What lies where a training keeps its state cannot be taken up."""


class SplitError(ValueError):
    """A model cannot be run in stages that way."""


class DifferenceError(SplitError):
    """The stages answer differently from the model.

    Attributes
    ----------
    difference : relative to the largest value; inf where shapes differ
    """

    def __init__(self, message: str, difference: float = float("inf")) -> None:
        super().__init__(message)
        self.difference = difference


class UnsupportedValueError(TypeError):
    """A carried value that samples cannot be picked out of."""


def warn(message: str, category: type[Warning]) -> None:
    """Warn at the line outside the package from which it was called, however deep inside the cause is."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level + 1)
