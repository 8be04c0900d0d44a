"""Calibrators: thin estimators over :mod:`adaptexit.core` that learn thresholds from recorded outputs."""

from adaptexit.calibrators.threshold import ThresholdCalibrator

__all__ = ["ThresholdCalibrator"]
