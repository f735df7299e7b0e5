import time

import numpy as np
import pytest
import torch

from benchmarks import timing


@pytest.mark.parametrize(("kind", "interval"), [("cpu", 1), ("cuda", 5)])
def test_step_clock_times_intervals_without_the_first(kind, interval, monkeypatch):
    synchronized = []
    monkeypatch.setattr(timing, "synchronize", synchronized.append)
    now = -1000
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    clock = timing.StepClock(torch.device(kind), num_steps=30)
    for step in range(1, 32):
        now = step**2
        clock("state")
    ends = np.arange(interval, 31, interval)
    assert len(synchronized) == 31 // interval
    assert clock.seconds() == pytest.approx(np.diff(ends**2) / interval)
    assert clock.warm_up() == 1000 + interval**2 - interval * np.median(clock.seconds())
    # The mean of 1, 3, 5, ... is what the steps took.
    assert clock.means([2 * i + 1 for i in range(30)]) == pytest.approx(clock.seconds())
