"""The baseline without a network: a linear support vector machine on single pixels.

A method that sees whole patches should beat it; where it does not, the training budget or the scene is what
the tables measure. It reads all bands, or the principal components that the networks read: standardised, or with
the scaling that they have in the networks, where only the first component has a standard deviation of 1.
"""

import numpy as np
import torch
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from pdml.inference import Readout, ScenePrediction
from pdml.model import PrincipalComponents
from pdml.scenes import Scene, Split
from shared.errors import UserError

INPUTS = ("spectrum", "components", "components-as-scaled")


def svm_input(scene: Scene, split: Split, kind: str, components: int) -> np.ndarray:
    """Return what the SVM reads of every pixel, (H, W, features) float64, before any scaling of its own.

    ``kind`` is one of INPUTS. Raises UserError for another one and for too few training pixels.
    """
    if kind not in INPUTS:
        raise UserError(f"unknown method.model.input {kind!r}; set one of {', '.join(INPUTS)}")
    if kind == "spectrum":
        return scene.cube.astype(np.float64)
    spectral = PrincipalComponents(scene.cube.shape[2], components)
    spectral.fit(scene.cube[split.train])
    image = torch.from_numpy(scene.cube.astype(np.float32)).permute(2, 0, 1)[None]  # (1, bands, H, W)
    return spectral(image)[0].permute(1, 2, 0).double().numpy()


def predict_svm(scene: Scene, split: Split, penalty: float, kind: str, components: int) -> ScenePrediction:
    """Fit to the training pixels, read as ``svm_input`` says, and decide every pixel; no probabilities."""
    pixels = svm_input(scene, split, kind, components)
    steps = [] if kind == "components-as-scaled" else [StandardScaler()]
    machine = make_pipeline(*steps, SVC(kernel="linear", C=penalty))
    machine.fit(pixels[split.train], scene.labels[split.train])
    height, width, features = pixels.shape
    decided = machine.predict(pixels.reshape(-1, features))
    maps = decided.reshape(height, width).astype(np.int16) - 1
    return ScenePrediction(Readout(maps, np.full((height, width), np.nan, np.float32)), None)
