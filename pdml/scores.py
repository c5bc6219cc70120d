"""Classification scores of the remote-sensing literature: overall and average accuracy, Cohen's kappa.

Glue over scikit-learn. What is added here is the rule for classes that a split leaves out. All scores are fractions;
tables multiply by 100.
"""

import numpy as np
from sklearn.metrics import accuracy_score, cohen_kappa_score, recall_score


def _checked(target, prediction, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    target, prediction = np.asarray(target), np.asarray(prediction)
    if target.shape != prediction.shape or target.ndim != 1:
        raise ValueError(f"target {target.shape} and prediction {prediction.shape}: not two equal vectors")
    for name, values in (("target", target), ("prediction", prediction)):
        if values.dtype.kind not in "iu":
            raise ValueError(f"{name} must hold integers, not {values.dtype}")
        # scikit-learn drops labels outside the list without a word
        if values.size and (values.min() < 0 or values.max() >= num_classes):
            raise ValueError(f"{name} holds classes outside 0..{num_classes - 1}")
    return target, prediction


def classification_scores(target, prediction, num_classes: int, classes=None) -> dict:
    """Return overall accuracy, average accuracy, Cohen's kappa and per-class accuracy, as fractions.

    ``classes`` (C,) bool marks the classes that count (default: all). Pixels whose true class is left out are
    dropped; predictions into such a class are errors. ``per_class`` has None for a class that is left out or
    has no pixel, and ``aa`` is the mean of the others. ``kappa`` is None where it is not defined (one class
    only, all of it right). ValueError if no pixel is left.
    """
    target, prediction = _checked(target, prediction, num_classes)
    counted = np.ones(num_classes, bool) if classes is None else np.asarray(classes)
    if counted.dtype != bool or counted.shape != (num_classes,):
        raise ValueError(f"classes must be a boolean mask of length {num_classes}")
    keep = counted[target]
    target, prediction = target[keep], prediction[keep]
    if target.size == 0:
        raise ValueError("no pixel of a counted class is left to score")
    labels = np.arange(num_classes)
    present = np.bincount(target, minlength=num_classes) > 0
    recall = recall_score(target, prediction, labels=labels, average=None, zero_division=0)
    # agreement by chance is 1 and kappa 0/0
    certain = (target == target[0]).all() and (prediction == target[0]).all()
    return {
        "oa": float(accuracy_score(target, prediction)),
        "aa": float(recall[present].mean()),
        "kappa": None if certain else float(cohen_kappa_score(target, prediction, labels=labels)),
        "per_class": [float(value) if there else None for value, there in zip(recall, present, strict=True)],
    }
