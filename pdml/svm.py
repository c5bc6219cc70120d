"""The baseline without a network: a linear support vector machine on single spectra.

A method that sees whole patches should beat it; where it does not, the training budget or the scene is what
the tables measure.
"""

import numpy as np
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from pdml.inference import Readout, ScenePrediction
from pdml.scenes import Scene, Split


def predict_svm(scene: Scene, split: Split, penalty: float) -> ScenePrediction:
    """Fit to the standardised spectra of the training pixels and decide every pixel; no probabilities."""
    height, width, bands = scene.cube.shape
    machine = make_pipeline(StandardScaler(), SVC(kernel="linear", C=penalty))
    machine.fit(scene.cube[split.train].astype(np.float64), scene.labels[split.train])
    decided = machine.predict(scene.cube.reshape(-1, bands).astype(np.float64))
    maps = decided.reshape(height, width).astype(np.int16) - 1
    return ScenePrediction(Readout(maps, np.full((height, width), np.nan, np.float32)), None)
