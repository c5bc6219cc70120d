"""Scores agree with their definitions, with torchmetrics and with scikit-learn."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import balanced_accuracy_score
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_cohen_kappa

from pdml.scores import classification_scores

EXACT = 1e-12  # the same float64 sums in another order
FLOAT32 = 1e-6  # torchmetrics computes in float32

CLASSES = 5
pairs = st.integers(1, 60).flatmap(
    lambda n: st.tuples(*[arrays(np.int64, n, elements=st.integers(0, CLASSES - 1)) for _ in range(2)])
)


@given(pairs, arrays(bool, CLASSES))
@settings(max_examples=60, deadline=None)
def test_scores_are_what_their_definitions_say(pair, classes):
    target, prediction = pair
    keep = classes[target]
    if not keep.any():
        with pytest.raises(ValueError, match="no pixel"):
            classification_scores(target, prediction, CLASSES, classes)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = classification_scores(target, prediction, CLASSES, classes)
    matrix = np.zeros((CLASSES, CLASSES))
    for true, predicted in zip(target[keep], prediction[keep], strict=True):
        matrix[true, predicted] += 1
    n = matrix.sum()
    observed, chance = np.trace(matrix) / n, matrix.sum(1) @ matrix.sum(0) / n**2
    recall = [matrix[c, c] / matrix[c].sum() if matrix[c].sum() else None for c in range(CLASSES)]
    assert scores["oa"] == pytest.approx(observed, abs=EXACT)
    assert scores["aa"] == pytest.approx(np.mean([r for r in recall if r is not None]), abs=EXACT)
    assert scores["per_class"] == pytest.approx(recall, abs=EXACT)
    if chance == 1:
        assert scores["kappa"] is None
    else:
        assert scores["kappa"] == pytest.approx((observed - chance) / (1 - chance), abs=EXACT)


def test_scores_equal_torchmetrics_and_scikit_learn():
    rng = np.random.default_rng(0)
    target, noise = rng.integers(0, 4, 400), rng.integers(0, 4, 400)
    prediction = np.where(rng.random(400) < 0.7, target, noise)
    scores = classification_scores(target, prediction, 4)
    tensors = torch.tensor(prediction), torch.tensor(target)
    assert scores["oa"] == pytest.approx(float(multiclass_accuracy(*tensors, 4, average="micro")), abs=FLOAT32)
    assert scores["kappa"] == pytest.approx(float(multiclass_cohen_kappa(*tensors, 4)), abs=FLOAT32)
    assert scores["aa"] == pytest.approx(balanced_accuracy_score(target, prediction), abs=EXACT)


def test_prediction_into_a_left_out_class_is_an_error_and_its_pixels_are_dropped():
    classes = np.array([True, True, False])
    scores = classification_scores([0, 0, 1, 2, 2], [0, 2, 1, 2, 0], 3, classes)
    assert scores["oa"] == pytest.approx(2 / 3)
    assert scores["per_class"] == [0.5, 1.0, None]
    assert scores["aa"] == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("target", "prediction"), [([0, 3], [0, 0]), ([0, 0], [0, -1]), ([0, 1], [0]), ([0.0, 1.0], [0, 1])]
)
def test_labels_that_scikit_learn_would_drop_in_silence_are_refused(target, prediction):
    with pytest.raises(ValueError):
        classification_scores(target, prediction, 3)
