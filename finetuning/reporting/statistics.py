"""Statistics of test predictions: confidence intervals, paired comparison of two runs, calibration."""

import math
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pandas as pd
from scipy.stats import binomtest, norm
from sklearn.metrics import log_loss

Vector = TypeVar("Vector", np.ndarray, pd.Series)
Z_95 = norm.ppf(0.975)  # standard errors on each side of a 95% interval
CALIBRATION_BINS = 15
MIN_PROBABILITY = 1e-6  # limits the log loss of one prediction to 14 nats


def predicted_labels(probabilities: Vector) -> Vector:
    """Return the labels, 0 or 1, of an array of probabilities of a positive review."""
    return (probabilities > 0.5).astype(int)


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """Return the 95% confidence interval (low, high) of a proportion (Wilson, 1927)."""
    interval = binomtest(int(correct), int(total)).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


@dataclass(frozen=True)
class PairedComparison:
    """Numbers of test reviews that both, one or neither of two runs, A and B, classified correctly."""

    both: int
    only_a: int
    only_b: int
    neither: int

    @property
    def total(self) -> int:
        """Number of test reviews."""
        return self.both + self.only_a + self.only_b + self.neither

    @property
    def difference(self) -> float:
        """Accuracy of B minus accuracy of A."""
        return (self.only_b - self.only_a) / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """95% confidence interval (low, high) of the difference (Agresti & Min, 2005)."""
        # Their adjustment: half a review more in each of the four cells keeps the coverage at small counts.
        a, b, total = self.only_a + 0.5, self.only_b + 0.5, self.total + 2
        center = (b - a) / total
        margin = Z_95 * math.sqrt(a + b - (b - a) ** 2 / total) / total
        return center - margin, center + margin

    @property
    def p_value(self) -> float:
        """Two-sided p-value of the exact test of McNemar (1947)."""
        discordant = self.only_a + self.only_b
        return float(binomtest(self.only_a, discordant).pvalue) if discordant else 1.0


def mcnemar_test(correct_a: np.ndarray, correct_b: np.ndarray) -> PairedComparison:
    """Compare two runs by boolean arrays (reviews,) that say which predictions of A and of B are correct."""
    a, b = correct_a, correct_b
    return PairedComparison(
        both=int((a & b).sum()), only_a=int((a & ~b).sum()), only_b=int((~a & b).sum()), neither=int((~a & ~b).sum())
    )


def calibration(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    """Return {"log_loss", "expected_calibration_error"} of probabilities (reviews,) of a positive review.

    The log loss is the mean of -log(probability of the label), in nats. The expected calibration error is the mean
    distance between confidence and accuracy over CALIBRATION_BINS bins (Guo et al., 2017).
    """
    probabilities = np.asarray(probabilities, dtype=float)
    bins = reliability(labels, probabilities)
    error = sum(count * abs(confidence - accuracy) for count, confidence, accuracy in bins) / len(labels)
    clipped = probabilities.clip(MIN_PROBABILITY, 1 - MIN_PROBABILITY)
    return {"log_loss": float(log_loss(labels, clipped, labels=[0, 1])), "expected_calibration_error": float(error)}


def reliability(labels: np.ndarray, probabilities: np.ndarray) -> list[tuple[int, float, float]]:
    """Return (reviews, mean confidence, accuracy) of each bin of confidence that holds reviews.

    The confidence in one of two classes is at least 1/2: the bins have equal width between 1/2 and 1.
    """
    confidence = np.maximum(probabilities, 1 - probabilities)
    correct = predicted_labels(probabilities) == labels
    bins = np.minimum((confidence - 0.5) * 2 * CALIBRATION_BINS, CALIBRATION_BINS - 1).astype(int)
    return [(int((bins == b).sum()), confidence[bins == b].mean(), correct[bins == b].mean()) for b in np.unique(bins)]
