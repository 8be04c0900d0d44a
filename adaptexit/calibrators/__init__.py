"""Calibrators: thin estimators over :mod:`adaptexit.core` that learn thresholds from recorded outputs.

Importing them does not import torch; routers and schedules do when they learn.
"""

from adaptexit.calibrators.base import Calibrator as Calibrator
from adaptexit.calibrators.cpm import CPMCalibrator as CPMCalibrator
from adaptexit.calibrators.eenet import EENetScheduler as EENetScheduler
from adaptexit.calibrators.em import EMRouter as EMRouter
from adaptexit.calibrators.patience import PatienceCalibrator as PatienceCalibrator
from adaptexit.calibrators.temperature import TemperatureCalibrator as TemperatureCalibrator
from adaptexit.calibrators.threshold import ThresholdCalibrator as ThresholdCalibrator
