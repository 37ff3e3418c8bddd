"""How an encoder is judged. Knows encoders that give features and sources of labelled images, never a method."""

from sslkit.evaluate.collapse import LabelFree, label_free
from sslkit.evaluate.compare import comparable
from sslkit.evaluate.diagnose import Diagnosis, diagnose_encoder
from sslkit.evaluate.features import Encoder, extract_features, load_encoder
from sslkit.evaluate.finetune import FinetuneProtocol
from sslkit.evaluate.judge import Judgement, Score, evaluate_finetune, evaluate_knn, evaluate_knn_grid, evaluate_linear
from sslkit.evaluate.knn import KnnProtocol, knn_accuracy
from sslkit.evaluate.linear import LinearProtocol, linear_accuracy

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
