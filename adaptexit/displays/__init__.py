"""Pictures, as scikit-learn's display objects: data in, ``plot`` draws. They need matplotlib (the extra ``plot``).

Nothing else of the package is imported here: estimators and :mod:`adaptexit.core.metrics` make what is drawn.
"""

from adaptexit.displays.anytime import AnytimeDisplay
from adaptexit.displays.comparison import BarsDisplay, ComparisonDisplay
from adaptexit.displays.curves import JobRatioDisplay, ParetoDisplay
from adaptexit.displays.exemplars import ExemplarDisplay
from adaptexit.displays.flow import ExitFlowDisplay
from adaptexit.displays.reliability import ReliabilityDisplay
from adaptexit.displays.sweep import SweepDisplay

__all__ = [
    "AnytimeDisplay",
    "BarsDisplay",
    "ComparisonDisplay",
    "ExemplarDisplay",
    "ExitFlowDisplay",
    "JobRatioDisplay",
    "ParetoDisplay",
    "ReliabilityDisplay",
    "SweepDisplay",
]
