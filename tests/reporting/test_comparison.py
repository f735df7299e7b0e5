import re

import pytest
from helpers import write_example_record

from finetuning.reporting.comparison import compare_runs
from finetuning.system.errors import UserError


def test_compare_runs_by_hand(tmp_path):
    """The labels are 1, 0, 1, 0: A is incorrect on the third review, B on the second and fourth."""
    write_example_record(tmp_path / "a", (0.9, 0.25, 0.4, 0.1), name="A-run")
    write_example_record(tmp_path / "b", (0.9, 0.75, 0.6, 0.8), name="longer-run")
    summary, differing = compare_runs(tmp_path / "a", tmp_path / "b")
    # Half a review more in each cell: (1.5 - 2.5) / 6 +- 1.959964 sqrt(4 - 1 / 6) / 6; 2 of 3 is no evidence.
    assert summary.splitlines() == [
        "A: A-run       75.00% of 4 test reviews; only A is correct on 2",
        "B: longer-run  50.00% of 4 test reviews; only B is correct on 1",
        "B - A: -25.00 points (95% interval -80.62 to +47.29), p = 1 (exact McNemar test)",
    ]
    assert differing.index.tolist() == [1, 2, 3]
    assert differing["label"].tolist() == [0, 1, 0]
    assert differing["probability_a"].tolist() == pytest.approx([0.25, 0.4, 0.1])
    assert differing["probability_b"].tolist() == pytest.approx([0.75, 0.6, 0.8])


def test_compare_runs_refuses_other_test_reviews(tmp_path):
    write_example_record(tmp_path / "a")
    write_example_record(tmp_path / "b", data={"train.csv": "train", "validation.csv": "validation", "test.csv": "new"})
    expected = re.escape(f"{tmp_path / 'a'} and {tmp_path / 'b'} were tested on different reviews")
    with pytest.raises(UserError, match=expected):
        compare_runs(tmp_path / "a", tmp_path / "b")


def test_compare_runs_accepts_other_training_reviews(tmp_path):
    write_example_record(tmp_path / "a")
    write_example_record(tmp_path / "b", data={"train.csv": "new", "validation.csv": "new", "test.csv": "test"})
    summary, differing = compare_runs(tmp_path / "a", tmp_path / "b")
    assert "B - A: +0.00 points" in summary
    assert len(differing) == 0
