"""Scores of a classifier, from its confusion matrix."""

from __future__ import annotations

from typing import Any

import numpy as np


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Counts of shape `(classes, classes)`: rows are the true class, columns the predicted one."""
    return np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)


def scores(confusion: np.ndarray) -> dict[str, Any]:
    """Accuracy, and the recall of each class (`None` for classes without test images)."""
    support = confusion.sum(axis=1)
    recall = [
        right / count if count else None for right, count in zip(confusion.diagonal(), support, strict=True)
    ]
    present = [value for value in recall if value is not None]
    return {
        "test_accuracy": float(confusion.trace() / support.sum()),
        "test_balanced_accuracy": float(np.mean(present)),
        "test_recall": [None if value is None else float(value) for value in recall],
    }
