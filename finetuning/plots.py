"""Pictures: how one run went, and how accurate every experiment is for the time it takes."""

import contextlib
import logging
import os
import textwrap
import unicodedata
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from finetuning.files import written_whole
from finetuning.records import read_predictions, read_record
from finetuning.uncertainty import reliability


@contextlib.contextmanager
def default_settings():
    """Let Matplotlib, if it is imported for the first time, read its own settings instead of the user's.

    A backend of a notebook that is not installed here stops the import, and so does a damaged matplotlibrc. This folder
    holds the default one, and the current folder's comes first.
    """
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns where its cache has to be a temporary one
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        with contextlib.chdir(Path(find_spec("matplotlib").origin).parent / "mpl-data"):
            yield
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend


with default_settings():
    import matplotlib
from matplotlib import font_manager  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import FuncFormatter, PercentFormatter  # noqa: E402

CURVES = "curves.svg"
NOT_FOR_TEXT = ("last resort", "color emoji")  # fonts of placeholders and of pixels
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
    title, style = drawable(f"{record['name']}: {record['accuracy']['test']:.2%} of the test reviews")
    wide = any(unicodedata.east_asian_width(character) in "WF" for character in title)
    figure.suptitle(textwrap.fill(title, 55 * len(panels) // (1 + wide)), **style)
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
        label, style = drawable(label)
        axes.annotate(label, (minutes, accuracy), xytext=(7, 0), textcoords="offset points", fontsize=9,
                      verticalalignment="center", **style)
    axes.plot([], [], "o", color=BLUE, label="measured, with its 95% interval")
    axes.plot([], [], "o", color=ORANGE, markerfacecolor="none", label="as published")
    axes.legend(frameon=False, loc="lower right")
    axes.set_xscale("log")
    axes.margins(x=0.25)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda minutes, _: f"{minutes:g}"))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    footnote, style = drawable(footnote)
    axes.set_xlabel(f"training time (minutes, on different hardware: see docs/hardware.md)\n{footnote}", **style)
    axes.set_ylabel("test accuracy")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def draw_demo(records, path):
    """Draw what the runs of the DEMO, {name: record}, learned: losses on the left, test accuracies on the right."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    for color, (name, record) in zip((GREY, BLUE, ORANGE), records.items(), strict=True):
        if record["curve"]:
            seen = [point["step"] * record["arguments"]["batch_size"] for point in record["curve"]]
            losses.plot(seen, [point["validation_loss"] for point in record["curve"]], color=color, label=name)
        accuracy, (low, high) = record["accuracy"]["test"], record["test_interval_95"]
        accuracies.errorbar(name, accuracy, yerr=[[accuracy - low], [high - accuracy]], fmt="o", color=color, capsize=3)
        accuracies.annotate(f"{accuracy:.1%}", (name, accuracy), xytext=(9, 0), textcoords="offset points",
                            verticalalignment="center")
    losses.set(xlabel="reviews trained on", ylabel="validation loss (nats)", ylim=(0, 1))
    losses.legend(frameon=False)
    losses.xaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{count:,.0f}"))
    for axes, chance in ((losses, np.log(2)), (accuracies, 0.5)):
        axes.axhline(chance, color=GREY, linewidth=0.8, linestyle="--")
        axes.annotate("chance", (1, chance), xytext=(-3, 3), textcoords="offset points", color=GREY, fontsize=9,
                      horizontalalignment="right", xycoords=axes.get_yaxis_transform())
    accuracies.set(ylabel="test accuracy, with its 95% interval", ylim=(0.45, 1))
    accuracies.margins(x=0.2)
    accuracies.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    for axes in (losses, accuracies):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("DEMO: synthetic reviews, small models from random weights")
    save(figure, path)


def drawable(text):
    """Return a text in one line that Matplotlib can draw, and the keyword arguments to draw it with.

    Characters that no installed font has become ASCII: their plain form or, if they have none, their code.
    """
    text = " ".join(text.split())
    families, missing = choose_fonts(text)
    text = "".join(transcribe(character) if character in missing else character for character in text)
    return text, {"fontfamily": families, "parse_math": False}


def choose_fonts(text):
    """Return the font families that are needed to draw a text, and its characters that no installed font has."""
    families = list(matplotlib.rcParams["font.family"])
    missing = set(text) - characters_of(families)
    # Other fonts may hold anything in place of control characters.
    candidates = {name: missing & set(filter(str.isprintable, characters_of(name)))
                  for name in sorted({font.name for font in font_manager.fontManager.ttflist})
                  if missing and not any(unfit in name.lower() for unfit in NOT_FOR_TEXT)}
    while candidates:
        best = max(candidates, key=lambda name: len(candidates[name] & missing))
        found = candidates.pop(best) & missing
        if not found:
            break
        families.append(best)
        missing -= found
    return families, missing


def characters_of(family):
    """Return the characters that the font of a family has, as a set."""
    try:
        font = font_manager.get_font(font_manager.findfont(font_manager.FontProperties(family=family)))
    except (OSError, RuntimeError):  # damaged, or of a kind that cannot be drawn
        return set()
    return set(map(chr, font.get_charmap())) if font.scalable else set()


def transcribe(character):
    """Return a character in ASCII: "A" for a full-width A, "\\u5317" for a Chinese one."""
    plain = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    return plain if plain and plain.isprintable() else character.encode("unicode_escape").decode()


def save(figure, path):
    """Write an SVG file that is the same, byte for byte, whenever the same picture is drawn."""
    with matplotlib.rc_context({"svg.hashsalt": path.name}), written_whole(path) as (temporary,):
        figure.savefig(temporary, format="svg", metadata={"Date": None, "Creator": None})
