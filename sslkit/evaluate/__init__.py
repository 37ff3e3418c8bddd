"""Evaluation of encoders: each opens labelled data, extracts features and returns an `EvaluationResult`.

Read `probes.scoring` first. ``probes``, ``label_free`` and ``detection`` use ``features``, which uses the files here.
"""

from sslkit.evaluate.compare_scores import comparable
from sslkit.evaluate.evaluation_result import EvaluationResult, Score
from sslkit.evaluate.features.compared_encoders import TransferOptions
from sslkit.evaluate.features.encoder import Encoder, load_encoder
from sslkit.evaluate.features.extraction import extract_features
from sslkit.evaluate.features.readouts import Readout
from sslkit.evaluate.label_free.collapse_metrics import LabelFreeMetrics, label_free_metrics
from sslkit.evaluate.label_free.diagnose import Diagnosis, diagnose_encoder
from sslkit.evaluate.labelled_data import Splits
from sslkit.evaluate.probes.finetune import FinetuneProtocol
from sslkit.evaluate.probes.knn import KnnProtocol, knn_accuracy
from sslkit.evaluate.probes.linear import LinearProtocol, linear_accuracy
from sslkit.evaluate.probes.scoring import evaluate_finetune, evaluate_knn, evaluate_knn_grid, evaluate_linear

__all__ = [
    "Diagnosis",
    "Encoder",
    "EvaluationResult",
    "FinetuneProtocol",
    "KnnProtocol",
    "LabelFreeMetrics",
    "LinearProtocol",
    "Readout",
    "Score",
    "Splits",
    "TransferOptions",
    "comparable",
    "diagnose_encoder",
    "evaluate_finetune",
    "evaluate_knn",
    "evaluate_knn_grid",
    "evaluate_linear",
    "extract_features",
    "knn_accuracy",
    "label_free_metrics",
    "linear_accuracy",
    "load_encoder",
]
