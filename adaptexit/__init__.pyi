# The public names, each with its home. The package reads this file to import them when they are first used.

from . import backbones as backbones
from . import calibrators as calibrators
from . import core as core
from . import displays as displays
from . import exceptions as exceptions
from . import heads as heads
from . import networks as networks
from . import staging as staging
from . import training as training
from .calibrators import Calibrator as Calibrator
from .calibrators import CPMCalibrator as CPMCalibrator
from .calibrators import EENetScheduler as EENetScheduler
from .calibrators import EMRouter as EMRouter
from .calibrators import PatienceCalibrator as PatienceCalibrator
from .calibrators import TemperatureCalibrator as TemperatureCalibrator
from .calibrators import ThresholdCalibrator as ThresholdCalibrator
from .cascade import CascadeSaver as CascadeSaver
from .comparison import Comparison as Comparison
from .comparison import compare as compare
from .core.frontier import OperatingPoint as OperatingPoint
from .core.frontier import ParetoFrontier as ParetoFrontier
from .core.outputs import ExitOutputs as ExitOutputs
from .core.trace import ExitTrace as ExitTrace
from .core.verdict import Verdict as Verdict
from .core.verdict import verdict as verdict
from .displays import BarsDisplay as BarsDisplay
from .displays import ComparisonDisplay as ComparisonDisplay
from .displays import ExemplarDisplay as ExemplarDisplay
from .displays import ExitFlowDisplay as ExitFlowDisplay
from .displays import JobRatioDisplay as JobRatioDisplay
from .displays import ParetoDisplay as ParetoDisplay
from .displays import ReliabilityDisplay as ReliabilityDisplay
from .displays import SweepDisplay as SweepDisplay
from .exceptions import CalibrationWarning as CalibrationWarning
from .exceptions import CheckpointWarning as CheckpointWarning
from .exceptions import CostWarning as CostWarning
from .exceptions import FullModelWarning as FullModelWarning
from .exceptions import InputWarning as InputWarning
from .exceptions import LabelWarning as LabelWarning
from .exceptions import SaverWarning as SaverWarning
from .exceptions import SplitError as SplitError
from .multi_exit import MultiExitClassifier as MultiExitClassifier
from .persistence import load as load
from .predictor import Predictor as Predictor
from .staging import list_cuts as list_cuts
from .staging import split as split
from .training import AutoRecipe as AutoRecipe
from .training import BoostNetRecipe as BoostNetRecipe
from .training import CalexNetRecipe as CalexNetRecipe
from .training import FrozenRecipe as FrozenRecipe
from .training import JointRecipe as JointRecipe
from .training import PTEERecipe as PTEERecipe
from .training import ZTWRecipe as ZTWRecipe

__version__: str
__all__: list[str]
