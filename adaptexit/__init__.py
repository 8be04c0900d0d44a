"""Spend less compute on easy inputs: cascades and early exits for pretrained vision models.

Names are imported when first used, so that :mod:`adaptexit.core` can be had without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adaptexit.calibrators import (
        CalibrationWarning,
        CPMCalibrator,
        EENetScheduler,
        EMRouter,
        PatienceCalibrator,
        TemperatureCalibrator,
        ThresholdCalibrator,
    )
    from adaptexit.cascade import CascadeSaver, SaverWarning
    from adaptexit.comparison import Comparison, compare
    from adaptexit.core.frontier import OperatingPoint, ParetoFrontier
    from adaptexit.core.outputs import ExitOutputs
    from adaptexit.displays import (
        BarsDisplay,
        ComparisonDisplay,
        ExemplarDisplay,
        ExitFlowDisplay,
        JobRatioDisplay,
        ParetoDisplay,
        ReliabilityDisplay,
        SweepDisplay,
    )
    from adaptexit.labels import LabelWarning
    from adaptexit.multi_exit import MultiExitClassifier
    from adaptexit.persistence import load
    from adaptexit.training import BoostNetRecipe, CalexNetRecipe, FrozenRecipe, PTEERecipe, ZTWRecipe

__version__ = "0.1.0"

_HOMES = {
    "CascadeSaver": "adaptexit.cascade",
    "SaverWarning": "adaptexit.cascade",
    "Comparison": "adaptexit.comparison",
    "compare": "adaptexit.comparison",
    "MultiExitClassifier": "adaptexit.multi_exit",
    "CalibrationWarning": "adaptexit.calibrators",
    "LabelWarning": "adaptexit.labels",
    "FrozenRecipe": "adaptexit.training",
    "CalexNetRecipe": "adaptexit.training",
    "PTEERecipe": "adaptexit.training",
    "ZTWRecipe": "adaptexit.training",
    "BoostNetRecipe": "adaptexit.training",
    "ThresholdCalibrator": "adaptexit.calibrators",
    "CPMCalibrator": "adaptexit.calibrators",
    "EENetScheduler": "adaptexit.calibrators",
    "EMRouter": "adaptexit.calibrators",
    "PatienceCalibrator": "adaptexit.calibrators",
    "TemperatureCalibrator": "adaptexit.calibrators",
    "ExitOutputs": "adaptexit.core.outputs",
    "OperatingPoint": "adaptexit.core.frontier",
    "ParetoFrontier": "adaptexit.core.frontier",
    "ParetoDisplay": "adaptexit.displays",
    "JobRatioDisplay": "adaptexit.displays",
    "BarsDisplay": "adaptexit.displays",
    "ComparisonDisplay": "adaptexit.displays",
    "ExitFlowDisplay": "adaptexit.displays",
    "ReliabilityDisplay": "adaptexit.displays",
    "SweepDisplay": "adaptexit.displays",
    "ExemplarDisplay": "adaptexit.displays",
    "load": "adaptexit.persistence",
}

__all__ = [
    "BarsDisplay",
    "BoostNetRecipe",
    "CPMCalibrator",
    "CalexNetRecipe",
    "CalibrationWarning",
    "CascadeSaver",
    "Comparison",
    "ComparisonDisplay",
    "EENetScheduler",
    "EMRouter",
    "ExemplarDisplay",
    "ExitFlowDisplay",
    "ExitOutputs",
    "FrozenRecipe",
    "JobRatioDisplay",
    "LabelWarning",
    "MultiExitClassifier",
    "OperatingPoint",
    "PTEERecipe",
    "ParetoDisplay",
    "ParetoFrontier",
    "PatienceCalibrator",
    "ReliabilityDisplay",
    "SaverWarning",
    "SweepDisplay",
    "TemperatureCalibrator",
    "ThresholdCalibrator",
    "ZTWRecipe",
    "__version__",
    "compare",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'adaptexit' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
