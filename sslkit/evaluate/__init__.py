"""How an encoder is judged. Knows encoders that give features and sources of labelled images, never a method."""

from sslkit.evaluate.compare_scores import comparable
from sslkit.evaluate.features.extraction import Encoder, extract_features, load_encoder
from sslkit.evaluate.label_free.collapse_metrics import LabelFree, label_free
from sslkit.evaluate.label_free.diagnose import Diagnosis, diagnose_encoder
from sslkit.evaluate.probes.finetune import FinetuneProtocol
from sslkit.evaluate.probes.knn import KnnProtocol, knn_accuracy
from sslkit.evaluate.probes.linear import LinearProtocol, linear_accuracy
from sslkit.evaluate.probes.scoring import (
    Judgement,
    Score,
    evaluate_finetune,
    evaluate_knn,
    evaluate_knn_grid,
    evaluate_linear,
)

__all__ = [
    "Diagnosis",
    "Encoder",
    "FinetuneProtocol",
    "Judgement",
    "KnnProtocol",
    "LabelFree",
    "LinearProtocol",
    "Score",
    "comparable",
    "diagnose_encoder",
    "evaluate_finetune",
    "evaluate_knn",
    "evaluate_knn_grid",
    "evaluate_linear",
    "extract_features",
    "knn_accuracy",
    "label_free",
    "linear_accuracy",
    "load_encoder",
]
