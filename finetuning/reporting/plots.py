"""Figures: losses and calibration of one run, accuracy against training time of all experiments."""

import contextlib
import logging
import os
import textwrap
import unicodedata
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from finetuning.reporting.records import read_predictions, read_record
from finetuning.reporting.statistics import reliability
from finetuning.system.files import atomic_write


@contextlib.contextmanager
def default_settings() -> Iterator[None]:
    """Import Matplotlib in this block with its default settings instead of the user's.

    A notebook's backend that is not installed here makes the import fail, and so does a damaged matplotlibrc.
    """
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns if it has to use a temporary cache
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        # A matplotlibrc in the current folder takes precedence; this folder holds the default one.
        spec: Any = find_spec("matplotlib")
        with contextlib.chdir(Path(spec.origin).parent / "mpl-data"):
            yield
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend


with default_settings():
    import matplotlib
from matplotlib import font_manager  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

CURVES = "curves.svg"
EXCLUDED_FONTS = ("last resort", "color emoji")  # placeholders and bitmaps
MAX_LOSS_POINTS = 100  # of a training curve; each is the mean loss of a number of steps
BLUE, ORANGE, GREY = "#0b5394", "#c55a11", "#777777"
BESIDE: dict[str, Any] = {"textcoords": "offset points", "verticalalignment": "center"}  # of a point's label


class Point(NamedTuple):
    """A test accuracy (0 to 1) against training time: measured if there is an interval, else published."""

    label: str
    minutes: float
    accuracy: float
    interval: tuple[float, float] | None = None


def plot_run(folder: str | Path) -> None:
    """Plot a recorded run's losses, if it has any, and its calibration to `curves.svg`."""
    record = read_record(folder)
    predictions = read_predictions(folder, record)
    panels = [plot_losses] * bool(record["losses"]) + [plot_reliability]
    figure = Figure(figsize=(5.2 * len(panels), 3.8), layout="constrained")
    for axes, plot_panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        plot_panel(axes, record, predictions)
    title, style = drawable(f"{record['name']}: {record['accuracy']['test']:.2%} of the test reviews")
    wide = any(unicodedata.east_asian_width(character) in "WF" for character in title)
    figure.suptitle(textwrap.fill(title, 55 * len(panels) // (1 + wide)), **style)
    save_figure(figure, Path(folder) / CURVES)


def plot_losses(axes: Axes, record: dict, predictions: pd.DataFrame) -> None:
    """Plot the smoothed loss of the training batches and the losses of the log lines."""
    losses = np.array(record["losses"])
    windows = np.array_split(losses, min(MAX_LOSS_POINTS, len(losses)))
    ends = np.cumsum([len(window) for window in windows])
    axes.plot(ends, [window.mean() for window in windows], color=GREY, linewidth=0.8, label="training batches")
    history = pd.DataFrame(record["eval_history"], columns=["step", "train_loss", "validation_loss"])
    axes.plot(history["step"], history["train_loss"], color=BLUE, linewidth=1.2, label="training, evaluated")
    axes.plot(history["step"], history["validation_loss"], color=ORANGE, linewidth=1.2, label="validation, evaluated")
    axes.set(xlabel="steps", ylabel="loss (nats)", ylim=(0, None))
    axes.legend(frameon=False)


def plot_reliability(axes: Axes, record: dict, predictions: pd.DataFrame) -> None:
    """Plot a reliability diagram: accuracy against confidence, equal on the diagonal if calibrated."""
    counts, confidence, accuracy = np.array(
        reliability(predictions["label"].to_numpy(), predictions["probability"].to_numpy())
    ).T
    axes.plot([0.5, 1], [0.5, 1], color=GREY, linewidth=0.8, linestyle="--")
    axes.scatter(confidence, accuracy, s=4 + 150 * counts / counts.max(), color=BLUE, alpha=0.8)
    axes.set(xlabel="confidence (area: number of reviews)", ylabel="accuracy")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:.0%}")
    error = record["calibration"]["expected_calibration_error"]
    axes.text(0.52, 0.97, f"expected calibration error {error:.3f}", verticalalignment="top")


def plot_experiments(points: Iterable[Point], footnote: str, path: Path) -> None:
    """Plot test accuracy against training time."""
    figure = Figure(figsize=(9.5, 5.2), layout="constrained")
    axes = figure.subplots()
    for point in points:
        if point.interval:
            low, high = point.interval
            errors = [[point.accuracy - low], [high - point.accuracy]]
            axes.errorbar(point.minutes, point.accuracy, yerr=errors, fmt="o", color=BLUE, capsize=3)
        else:
            axes.plot(point.minutes, point.accuracy, "o", color=ORANGE, markerfacecolor="none")
        label, style = drawable(point.label)
        axes.annotate(label, (point.minutes, point.accuracy), xytext=(7, 0), fontsize=9, **BESIDE, **style)
    axes.plot([], [], "o", color=BLUE, label="measured, with 95% interval")
    axes.plot([], [], "o", color=ORANGE, markerfacecolor="none", label="published")
    axes.legend(frameon=False, loc="lower right")
    axes.set_xscale("log")
    axes.margins(x=0.25)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:.0%}")
    footnote, style = drawable(footnote)
    axes.set_xlabel(f"training time (minutes, on different hardware: see docs/hardware.md)\n{footnote}", **style)
    axes.set_ylabel("test accuracy")
    axes.grid(alpha=0.25)
    save_figure(figure, path)


def plot_demo(records: dict[str, dict], path: Path) -> None:
    """Plot validation losses and test accuracies of the demo's runs, {name: record}."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    for color, (name, record) in zip((GREY, BLUE, ORANGE), records.items(), strict=True):
        if record["eval_history"]:
            history = pd.DataFrame(record["eval_history"])
            reviews = history["step"] * record["arguments"]["batch_size"]
            losses.plot(reviews, history["validation_loss"], color=color, label=name)
        accuracy, (low, high) = record["accuracy"]["test"], record["test_interval_95"]
        accuracies.errorbar(name, accuracy, yerr=[[accuracy - low], [high - accuracy]], fmt="o", color=color, capsize=3)
        accuracies.annotate(f"{accuracy:.1%}", (name, accuracy), xytext=(9, 0), **BESIDE)
    losses.set(xlabel="reviews trained on", ylabel="validation loss (nats)", ylim=(0, 1))
    losses.legend(frameon=False)
    losses.xaxis.set_major_formatter("{x:,.0f}")
    for axes, chance in ((losses, np.log(2)), (accuracies, 0.5)):
        axes.axhline(chance, color=GREY, linewidth=0.8, linestyle="--")
        axes.annotate(
            "chance",
            (1, chance),
            xytext=(-3, 3),
            textcoords="offset points",
            color=GREY,
            fontsize=9,
            horizontalalignment="right",
            xycoords=axes.get_yaxis_transform(),
        )
    accuracies.set(ylabel="test accuracy, with 95% interval", ylim=(0.45, 1))
    accuracies.margins(x=0.2)
    accuracies.yaxis.set_major_formatter("{x:.0%}")
    figure.suptitle("DEMO: synthetic reviews, small models from random weights")
    save_figure(figure, path)


def drawable(text: str) -> tuple[str, dict]:
    """Return a text in one line that Matplotlib can draw, and the keyword arguments to draw it with.

    Characters that are in no installed font are written in ASCII.
    """
    text = " ".join(text.split())
    families, missing = choose_fonts(text)
    text = "".join(to_ascii(character) if character in missing else character for character in text)
    return text, {"fontfamily": families, "parse_math": False}


def choose_fonts(text: str) -> tuple[list[str], set[str]]:
    """Return the font families needed to draw a text, and its characters that are in no installed font."""
    families = list(matplotlib.rcParams["font.family"])
    missing = set(text) - characters_of(families)
    # A font may map control characters to arbitrary glyphs.
    candidates = {
        name: missing & {character for character in characters_of(name) if character.isprintable()}
        for name in sorted({font.name for font in font_manager.fontManager.ttflist})
        if missing and not any(excluded in name.lower() for excluded in EXCLUDED_FONTS)
    }
    while candidates:
        best = max(candidates, key=lambda name: len(candidates[name] & missing))
        found = candidates.pop(best) & missing
        if not found:
            break
        families.append(best)
        missing -= found
    return families, missing


def characters_of(family: str | list[str]) -> set[str]:
    """Return the characters in the font of a family, or of the first installed one of several."""
    try:
        font = font_manager.get_font(font_manager.findfont(font_manager.FontProperties(family=family)))
    except (OSError, RuntimeError):  # damaged, or of an unsupported format
        return set()
    return set(map(chr, font.get_charmap())) if font.scalable else set()


def to_ascii(character: str) -> str:
    r"""Return a character in ASCII: "A" for a full-width A, "\\u5317" for a Chinese one."""
    plain = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    return plain if plain and plain.isprintable() else character.encode("unicode_escape").decode()


def save_figure(figure: Figure, path: Path) -> None:
    """Write an SVG file without frames on top and right; equal figures give identical bytes."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    with matplotlib.rc_context({"svg.hashsalt": path.name}), atomic_write(path) as (temporary,):
        figure.savefig(temporary, format="svg", metadata={"Date": None, "Creator": None})
