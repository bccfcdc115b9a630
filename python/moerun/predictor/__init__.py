"""Which experts the tokens of a sequence will use, told from the tokens alone.

`PathPredictor` names the experts of all layers before the first one runs, `train` makes its file
from traces (which needs PyTorch: `pip install 'moerun[predictor]'`), `evaluate` measures it beside
simpler ways to guess. docs/predictor.md has the net, the file, the definitions, and figures.
"""

from moerun.boundary import guard
from moerun.predictor.evaluation import Evaluation, evaluate
from moerun.predictor.files import PredictorInfo, read_info
from moerun.predictor.inference import PathPredictor, PathState
from moerun.predictor.shape import NetShape, default_shape
from moerun.predictor.training import TrainingProgress, TrainingResult, train

__all__ = [
    "Evaluation",
    "NetShape",
    "PathPredictor",
    "PathState",
    "PredictorInfo",
    "TrainingProgress",
    "TrainingResult",
    "default_shape",
    "evaluate",
    "read_info",
    "train",
]

guard(__all__, __name__)
