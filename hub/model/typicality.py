"""How typical a recording is of those that the model was trained on: something else than an ECG is far from them.

The distance is Mahalanobis' (Lee et al. 2018), with mean and shrunk covariance (Ledoit and Wolf 2004) of the training
split, between features of the backbone: mean and extremes of its tokens, which the fusion reads too. The embedding
that the fusion writes keeps what the tasks ask for, and noise looks more like an ECG there. Whether the electrodes of
the arms are swapped, a logistic regression on the same features says: one of twelve leads, and one of lead I alone,
which turns around where a hand-held recorder does.

All of it lies in a file beside the weights, `typicality.safetensors`, written by `python -m benchmarks.refusal --fit`.
A model without the file answers as before and says nothing of either.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from scipy.special import expit
from transformers.utils import is_sklearn_available

TYPICALITY_FILE = "typicality.safetensors"
NUM_QUANTILES = 1001
FIT_AGAIN = "delete it, or fit it again with `python -m benchmarks.refusal --fit`"


@dataclass(frozen=True)
class Typicality:
    """What is known of the features of a model's training data, all in float32.

    Args:
        base: fingerprint of the model, see `adapters.fingerprint`.
        mean: (d,), whitening: (d, d); the distance of x is the length of `whitening @ (x - mean)`.
        quantiles: (q,), rising distances; the first and the last are the least and the greatest.
        swap_weight: (2, d), swap_bias: (2,), of the log-odds that the arm electrodes are swapped: from twelve leads,
            and from lead I alone.
    """

    base: str
    mean: np.ndarray
    whitening: np.ndarray
    quantiles: np.ndarray
    swap_weight: np.ndarray
    swap_bias: np.ndarray

    def save(self, folder: Path) -> Path:
        """Write the file; returns its path."""
        path = folder / TYPICALITY_FILE
        arrays = {name: np.ascontiguousarray(getattr(self, name), np.float32) for name in _arrays()}
        save_file(arrays, path, metadata={"base": self.base})
        return path

    @classmethod
    def load(cls, folder: Path, base: str) -> "Typicality | None":
        """Read the file of a model's folder, None where there is none.

        Args:
            base: fingerprint of the model that asks.

        Raises:
            ValueError: the file is not what `save` writes, or belongs to another model.
        """
        path = folder / TYPICALITY_FILE
        if not path.is_file():
            return None
        try:
            with safe_open(path, "np") as file:
                found = (file.metadata() or {}).get("base", "no model")
                values = {name: file.get_tensor(name) for name in _arrays()}
        except SafetensorError as error:
            raise ValueError(f"{path} cannot be read ({error}); {FIT_AGAIN}") from error
        if found != base:
            raise ValueError(f"{path} was fitted to the model {found}, this one is {base}; {FIT_AGAIN}")
        size, shapes = values["mean"].size, {name: value.shape for name, value in values.items()}
        expected = {"mean": (size,), "whitening": (size, size), "swap_weight": (2, size), "swap_bias": (2,)}
        fits = all(shapes[name] == shape for name, shape in expected.items())
        if not fits or values["quantiles"].ndim != 1 or len(values["quantiles"]) < 2:
            raise ValueError(f"{path} holds arrays that do not fit each other, {shapes}; {FIT_AGAIN}")
        if not all(np.isfinite(value).all() for value in values.values()):
            raise ValueError(f"{path} holds numbers that are not finite; {FIT_AGAIN}")
        return cls(found, **values)

    def distances(self, features: np.ndarray) -> np.ndarray:
        """How far features (n, d) are from the training data, (n,)."""
        return np.linalg.norm((features - self.mean) @ self.whitening.T, axis=1)

    def percentiles(self, distances: np.ndarray) -> np.ndarray:
        """0 to 100: the share of the reference recordings that are farther away; low is untypical."""
        levels = np.linspace(100.0, 0.0, len(self.quantiles))
        return np.interp(distances, self.quantiles, levels)

    def swap_logits(self, features: np.ndarray, lead_i: bool = False) -> np.ndarray:
        """Log-odds (n,) of swapped arm electrodes, from features (n, d) of twelve leads or of lead I alone."""
        return features @ self.swap_weight[int(lead_i)] + self.swap_bias[int(lead_i)]

    def report(self, whole: np.ndarray, lead_i: np.ndarray) -> dict[str, Any]:
        """What `quality` says of one recording: of its windows the mean distance and the mean log-odds count.

        Args:
            whole: (n, d), features of its windows of twelve leads.
            lead_i: (m, d), of its windows of lead I alone, which are looked at where there are no others.
        """
        found = dict(UNKNOWN_TYPICALITY)
        if len(whole):
            percentile = float(self.percentiles(self.distances(whole).mean(keepdims=True))[0])
            found["typicality"] = round(percentile, 1)
        if len(whole) or len(lead_i):
            logits = self.swap_logits(whole) if len(whole) else self.swap_logits(lead_i, lead_i=True)
            found["arm_electrodes_swapped"] = round(float(expit(logits.mean())), 4)
        return found


UNKNOWN_TYPICALITY: dict[str, Any] = {"typicality": None, "arm_electrodes_swapped": None}


def _arrays() -> list[str]:
    return [field.name for field in fields(Typicality) if field.name != "base"]


def fit_typicality(
    base: str,
    training: np.ndarray,
    swapped: np.ndarray,
    reference: np.ndarray,
    lead_i: np.ndarray,
    lead_i_swapped: np.ndarray,
) -> Typicality:
    """Learn what is typical.

    Args:
        base: fingerprint of the model that made the features.
        training: (n, d), features of the training split.
        swapped: (n, d), of the same recordings with swapped arm electrodes.
        reference: (m, d), of recordings that the model was not trained on: its own training data look more typical to
            it than any others ever will, so that percentiles of their distances would be too low for everybody.
        lead_i, lead_i_swapped: (l, d), of lead I alone of training recordings, as it is and turned around.

    Raises:
        ValueError: fewer recordings than dimensions, or shapes that do not fit.
        ImportError: scikit-learn is not installed (`pip install "ecg-moe[train]"`).
    """
    count, size = training.shape
    others = (swapped, reference, lead_i, lead_i_swapped)
    if count <= size or any(values.shape[1] != size or len(values) < 2 for values in others):
        raise ValueError(
            f"expected more than {size} training features and two or more of each of the others, of one width; found "
            f"{training.shape}, then {', '.join(str(values.shape) for values in others)}; use more recordings"
        )
    if is_sklearn_available():  # not at the top: answers need no scikit-learn, and the Hub's copies ask for none
        from sklearn.covariance import LedoitWolf
        from sklearn.linear_model import LogisticRegression
    else:
        raise ImportError('fitting needs scikit-learn, which is not installed; pip install "ecg-moe[train]"')
    # In units of their own spread, so that shrinking favours none of them; in float32 the smallest of the covariance's
    # eigenvalues would be lost.
    training = np.asarray(training, np.float64)
    swapped, reference, lead_i, lead_i_swapped = (np.asarray(values, np.float64) for values in others)
    spread = training.std(axis=0) + 1e-6
    shrunk = LedoitWolf().fit(training / spread)
    variances, axes = np.linalg.eigh(shrunk.covariance_)
    mean, whitening = shrunk.location_ * spread, (axes / np.sqrt(variances)).T / spread
    distances = np.linalg.norm((reference - mean) @ whitening.T, axis=1)
    probes = [
        LogisticRegression(C=0.1, max_iter=1000).fit(
            np.concatenate([right, wrong]) / spread, np.repeat([0, 1], [len(right), len(wrong)])
        )
        for right, wrong in ((training, swapped), (lead_i, lead_i_swapped))
    ]
    arrays = {
        "mean": mean,
        "whitening": whitening,
        "quantiles": np.quantile(distances, np.linspace(0, 1, NUM_QUANTILES)),
        "swap_weight": np.concatenate([probe.coef_ for probe in probes]) / spread,
        "swap_bias": np.concatenate([probe.intercept_ for probe in probes]),
    }
    return Typicality(base, **{name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()})
