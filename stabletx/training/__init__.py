"""Training: fit, evaluate, predict, and what a run leaves behind."""

from stabletx.training.checkpoint import CheckpointError
from stabletx.training.config import TrainingConfig, default_model
from stabletx.training.evaluate import Evaluation, Prediction, evaluate, predict
from stabletx.training.events import JsonLinesLog, TensorBoardLog
from stabletx.training.fit import FitResult, TrainingError, fit
from stabletx.training.metrics import Metrics, classification_metrics
from stabletx.training.schedule import learning_rate_factor

__all__ = [
    "CheckpointError",
    "Evaluation",
    "FitResult",
    "JsonLinesLog",
    "Metrics",
    "Prediction",
    "TensorBoardLog",
    "TrainingConfig",
    "TrainingError",
    "classification_metrics",
    "default_model",
    "evaluate",
    "fit",
    "learning_rate_factor",
    "predict",
]
