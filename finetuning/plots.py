"""Pictures: how one run went, and how accurate every experiment is for the time it takes."""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from finetuning.files import written_whole
from finetuning.records import read_predictions, read_record
from finetuning.uncertainty import reliability

CURVES = "curves.svg"
POINTS = 100  # of a training curve: each the mean of as many updates as it takes
BLUE, ORANGE, GREY = "#0b5394", "#c55a11", "#777777"


def draw_run(folder):
    """Draw a recorded run's losses, if it has any, and what its probabilities are worth, to `curves.svg`."""
    record = read_record(folder)
    predictions = read_predictions(folder, record)
    panels = [draw_losses] * bool(record["losses"]) + [draw_reliability]
    figure = Figure(figsize=(5.2 * len(panels), 3.8), layout="constrained")
    for axes, draw in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw(axes, record, predictions)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{record['name']}: {record['accuracy']['test']:.2%} of the test reviews")
    save(figure, Path(folder) / CURVES)


def draw_losses(axes, record, predictions):
    """The loss of the updates, averaged, and that of the evaluation in between."""
    losses = np.array(record["losses"])
    pieces = np.array_split(losses, min(POINTS, len(losses)))
    ends = np.cumsum([len(piece) for piece in pieces])
    axes.plot(ends, [piece.mean() for piece in pieces], color=GREY, linewidth=0.8, label="training, as it went")
    steps = [point["step"] for point in record["curve"]]
    for key, color, label in [("train_loss", BLUE, "training, evaluated"),
                              ("validation_loss", ORANGE, "validation, evaluated")]:
        axes.plot(steps, [point[key] for point in record["curve"]], color=color, linewidth=1.2, label=label)
    axes.set(xlabel="updates", ylabel="loss (nats)", ylim=(0, None))
    axes.legend(frameon=False)


def draw_reliability(axes, record, predictions):
    """How often the answer is right, for each confidence; on the diagonal, probabilities are what they say."""
    counts, confidence, accuracy = np.array(reliability(predictions["label"].to_numpy(),
                                                        predictions["probability"].to_numpy())).T
    axes.plot([0.5, 1], [0.5, 1], color=GREY, linewidth=0.8, linestyle="--")
    axes.scatter(confidence, accuracy, s=4 + 150 * counts / counts.max(), color=BLUE, alpha=0.8)
    axes.set(xlabel="confidence of the answer (area: reviews)", ylabel="right answers")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0))
    error = record["calibration"]["expected_calibration_error"]
    axes.text(0.52, 0.97, f"expected calibration error {error:.3f}", verticalalignment="top")


def draw_rows(points, footnote, path):
    """Draw test accuracy against training minutes.

    `points` are (label, minutes, accuracy from 0 to 1, interval or None): a point with an interval
    was measured, one without is as published.
    """
    figure = Figure(figsize=(8.5, 5.2), layout="constrained")
    axes = figure.subplots()
    for label, minutes, accuracy, interval in points:
        if interval:
            below, above = accuracy - interval[0], interval[1] - accuracy
            axes.errorbar(minutes, accuracy, yerr=[[below], [above]], fmt="o", color=BLUE, capsize=3)
        else:
            axes.plot(minutes, accuracy, "o", color=ORANGE, markerfacecolor="none")
        axes.annotate(label, (minutes, accuracy), xytext=(7, 0), textcoords="offset points", fontsize=9,
                      verticalalignment="center")
    axes.plot([], [], "o", color=BLUE, label="measured, with its 95% interval")
    axes.plot([], [], "o", color=ORANGE, markerfacecolor="none", label="as published")
    axes.legend(frameon=False, loc="lower right")
    axes.set_xscale("log")
    axes.margins(x=0.25)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda minutes, _: f"{minutes:g}"))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel(f"training time (minutes)\n{footnote}")
    axes.set_ylabel("test accuracy")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def save(figure, path):
    """Write an SVG file that is the same, byte for byte, whenever the same picture is drawn."""
    with matplotlib.rc_context({"svg.hashsalt": path.name}), written_whole(path) as (temporary,):
        figure.savefig(temporary, format="svg", metadata={"Date": None, "Creator": None})
