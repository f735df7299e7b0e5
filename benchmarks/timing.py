"""Clocks of training steps and of function calls."""

import itertools
import statistics
import time
from collections.abc import Callable

import torch

from finetuning.performance.device import synchronize

NUM_INTERVALS = 6  # of a GPU's steps


class StepClock:
    """Callback that records the time after each training step; on a GPU, about NUM_INTERVALS times in all.

    Synchronizing with a GPU after each step would keep the CPU from preparing the next one.
    """

    def __init__(self, device: torch.device, num_steps: int):
        self.started = time.perf_counter()
        self.device = device
        self.num_steps = num_steps
        self.interval = 1 if device.type == "cpu" else max(1, num_steps // NUM_INTERVALS)
        self.steps_done = 0
        self.times: list[float] = []

    def __call__(self, *_):
        """Count a step."""
        self.steps_done += 1
        if self.steps_done % self.interval == 0:
            synchronize(self.device)
            self.times.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Return the mean seconds per step of each interval but the first, which warms up, within `num_steps`."""
        times = self.times[: self.num_steps // self.interval]
        return [(end - start) / self.interval for start, end in itertools.pairwise(times)]

    def warm_up(self) -> float:
        """Return the seconds of the first interval beyond those of a later one, such as those of a compilation."""
        return self.times[0] - self.started - self.interval * statistics.median(self.seconds())

    def means(self, values: list[float]) -> list[float]:
        """Return the means of the values, one per step, over each of the intervals of `seconds`."""
        starts = range(self.interval, self.num_steps - self.interval + 1, self.interval)
        return [statistics.fmean(values[start : start + self.interval]) for start in starts]


def timed(function: Callable, *arguments) -> float:
    """Return the seconds that a call takes."""
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started
