"""How sure a measured number is: intervals, the comparison of two runs, calibration."""

import math
from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest

Z_95 = 1.959964  # a normal variable lies within so many standard deviations with a chance of 95%
CALIBRATION_BINS = 15
LEAST_PROBABILITY = 1e-6  # of the right label, as the log loss counts it: no answer costs more than 14 nats


def answers(probabilities):
    """The labels, 0 or 1, that an array of probabilities of a positive review stands for."""
    return (probabilities > 0.5).astype(int)


def wilson_interval(correct, total):
    """The 95% confidence interval of a proportion (Wilson, 1927), as (low, high)."""
    p, z = correct / total, Z_95
    center = p + z * z / (2 * total)
    spread = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return (center - spread) / scale, (center + spread) / scale


class Comparison(NamedTuple):
    """Two runs on the same reviews, A and B, by how many of these each classified correctly."""

    both: int
    only_a: int
    only_b: int
    neither: int

    @property
    def difference(self):
        """Accuracy of B minus that of A."""
        return (self.only_b - self.only_a) / sum(self)

    @property
    def interval(self):
        """The 95% confidence interval of the difference (Agresti & Min, 2005), as (low, high)."""
        # Half a review more in each of the four cells keeps the interval honest where counts are small.
        a, b, total = self.only_a + 0.5, self.only_b + 0.5, sum(self) + 2
        center = (b - a) / total
        spread = Z_95 * math.sqrt(a + b - (b - a) ** 2 / total) / total
        return center - spread, center + spread

    @property
    def p_value(self):
        """How likely at least this difference is if the two are equally good: the exact test of McNemar (1947)."""
        discordant = self.only_a + self.only_b
        return binomtest(self.only_a, discordant).pvalue if discordant else 1.0


def compare(right_a, right_b):
    """A Comparison from two bool arrays, one entry for each review: whether A, and whether B, is right."""
    return Comparison(*(int((a & b).sum()) for a, b in
                        [(right_a, right_b), (right_a, ~right_b), (~right_a, right_b), (~right_a, ~right_b)]))


def calibration(labels, probabilities):
    """How far the probabilities of a positive review can be believed.

    Both arguments are arrays with one entry for each review. Returns a dictionary of `log_loss`,
    the mean of -log(probability of the right label) in nats, and `expected_calibration_error`, over
    CALIBRATION_BINS bins the mean distance between confidence and accuracy (Guo et al., 2017).
    """
    of_label = np.where(labels == 1, probabilities, 1 - probabilities)
    log_loss = -np.log(of_label.clip(LEAST_PROBABILITY)).mean()
    distances = [count * abs(confidence - accuracy)
                 for count, confidence, accuracy in reliability(labels, probabilities)]
    return {"log_loss": float(log_loss), "expected_calibration_error": float(sum(distances) / len(labels))}


def reliability(labels, probabilities):
    """[(reviews, mean confidence, accuracy)] for each bin of confidence that holds reviews.

    Confidence in one of two answers is at least 1/2: the bins are of equal width from there to 1.
    """
    confidence = np.maximum(probabilities, 1 - probabilities)
    right = answers(probabilities) == labels
    bins = np.minimum((confidence - 0.5) * 2 * CALIBRATION_BINS, CALIBRATION_BINS - 1).astype(int)
    return [(int((bins == b).sum()), confidence[bins == b].mean(), right[bins == b].mean()) for b in np.unique(bins)]
