"""Calibrators: thin estimators over :mod:`adaptexit.core` that learn thresholds from recorded outputs."""

from adaptexit.calibrators.base import CalibrationWarning
from adaptexit.calibrators.cpm import CPMCalibrator
from adaptexit.calibrators.eenet import EENetScheduler
from adaptexit.calibrators.em import EMRouter
from adaptexit.calibrators.patience import PatienceCalibrator
from adaptexit.calibrators.temperature import TemperatureCalibrator
from adaptexit.calibrators.threshold import ThresholdCalibrator

__all__ = [
    "CPMCalibrator",
    "CalibrationWarning",
    "EENetScheduler",
    "EMRouter",
    "PatienceCalibrator",
    "TemperatureCalibrator",
    "ThresholdCalibrator",
]
