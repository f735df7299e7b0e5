import numpy as np
import pytest

from finetuning.reporting.statistics import PairedComparison, calibration, mcnemar_test, reliability, wilson_interval


def test_wilson_interval_by_hand():
    # p = 1/2, n = 100: center 1/2, half-width z / (2 sqrt(n + z^2)) = 1.959964 / (2 * sqrt(103.84146))
    assert wilson_interval(50, 100) == pytest.approx((0.4038315, 0.5961685), abs=1e-6)
    assert wilson_interval(10_000, 10_000) == pytest.approx((0.9996160, 1.0), abs=1e-6)


def test_mcnemar_test_counts_the_four_cells():
    a, b = np.array([1, 1, 1, 0, 0, 0], dtype=bool), np.array([1, 1, 0, 1, 1, 0], dtype=bool)
    assert mcnemar_test(a, b) == PairedComparison(both=2, only_a=1, only_b=2, neither=1)
    assert mcnemar_test(a, b).difference == pytest.approx(1 / 6)


def test_p_value_by_hand():
    # 1 against 5: of 2^6 = 64 ways, 1 + 6 on this side are as extreme, and as many on the other.
    assert PairedComparison(90, 1, 5, 4).p_value == pytest.approx(14 / 64)
    assert PairedComparison(90, 5, 1, 4).p_value == pytest.approx(14 / 64)
    assert PairedComparison(96, 0, 0, 4).p_value == 1


def test_difference_interval_by_hand():
    # (5.5 - 1.5) / 102 +- 1.959964 sqrt(7 - 16 / 102) / 102
    assert PairedComparison(90, 1, 5, 4).interval == pytest.approx(
        (0.0392157 - 0.0502657, 0.0392157 + 0.0502657), abs=1e-6
    )


def test_difference_interval_covers_the_true_difference():
    # A is correct in 85% of the cases, B in 90%, on 400 reviews; of 1,000 intervals about 950 should cover 5 points.
    draws = np.random.default_rng(0).multinomial(400, [0.80, 0.05, 0.10, 0.05], size=1000)
    covered = sum(low <= 0.05 <= high for low, high in (PairedComparison(*draw).interval for draw in draws))
    assert 930 <= covered <= 970


def test_calibration_by_hand():
    # Correct with 0.9 and with 0.75, incorrect with 0.9 and with 0.6; -log of 0.9, 0.75, 0.1 and 0.4, averaged:
    # (0.105361 + 0.287682 + 2.302585 + 0.916291) / 4
    labels, probabilities = np.array([1, 0, 0, 1]), np.array([0.9, 0.25, 0.9, 0.4])
    found = calibration(labels, probabilities)
    assert found["log_loss"] == pytest.approx(0.902980, abs=1e-6)
    # The two of 0.9 are in one bin: |1 correct - 1.8|; 0.75: |1 - 0.75|; 0.6: |0 - 0.6|; over 4 reviews.
    assert found["expected_calibration_error"] == pytest.approx((0.8 + 0.25 + 0.6) / 4)
    assert np.array(reliability(labels, probabilities)) == pytest.approx(
        np.array([[1, 0.6, 0], [1, 0.75, 1], [2, 0.9, 0.5]])
    )


def test_log_loss_of_a_certain_but_incorrect_prediction_is_finite():
    found = calibration(np.array([1, 0]), np.array([1.0, 1.0]))
    assert found == {"log_loss": pytest.approx(6 * np.log(10) / 2, abs=1e-5), "expected_calibration_error": 0.5}
