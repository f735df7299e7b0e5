"""Published and recorded logs of the experiments, as Markdown code blocks."""

from pathlib import Path

from finetuning.data.reviews import SPLITS
from finetuning.reporting.experiments import Experiment, PublishedLog
from finetuning.reporting.published_log import accuracy_lines, end_of_training, epoch_line, step_line
from finetuning.reporting.tables import STRINGS, load_records

PUBLISHED_STEPS = (0, 50, 4300, 4350)  # of the published log lines, out of 4,375 steps in one epoch


def log_section(experiment: Experiment, results: Path, language: str = "en") -> str:
    """Return an experiment's published log and the log of its first record, if they exist."""
    blocks = []
    if experiment.log and experiment.published:
        blocks.append(code_block(published_log(experiment.log, experiment.published)))
    for path, record in list(load_records(experiment, results).items())[:1]:
        blocks += [
            str(STRINGS[language]["measured log"]).format(record["hardware"], record["arguments"]["seed"], path),
            code_block(recorded_log(record)),
        ]
    return "\n".join(blocks)


def code_block(log: str) -> str:
    """Return a log as a Markdown code block, without blank lines and the title of the final accuracies."""
    title = end_of_training(0).split("\n")[2]
    return "\n".join(["```", *(line for line in log.splitlines() if line not in ("", title)), "```"])


def recorded_log(record: dict) -> str:
    """Return the log that a run printed, with its first and last two step lines."""
    if record["precision"] is None:  # scikit-learn; the dummy classifier is not recorded
        return f"...\n{accuracy_lines(record['accuracy'], 'Accuracy')}"
    steps_per_epoch = record["reviews"]["train"] // record["arguments"]["batch_size"]
    lines = [step_line(point["step"] // steps_per_epoch + 1, point) for point in record["eval_history"]]
    if len(lines) > 4:
        lines[2:-2] = ["..."]
    return "\n".join(
        [
            *lines,
            *map(epoch_line, record["epoch_metrics"][-1:]),
            end_of_training(record["seconds"]["training"]),
            accuracy_lines(record["accuracy"]),
        ]
    )


def published_log(log: PublishedLog, test_accuracy: float) -> str:
    """Return a published log, with "..." in place of unknown lines; the test accuracy is in percent."""
    accuracies = by_split(log.train, log.validation, test_accuracy)
    if log.dummy:
        return (
            f"Dummy classifier:\n{accuracy_lines(by_split(*log.dummy), 'Accuracy')}\n\n\n"
            f"Logistic regression classifier:\n{accuracy_lines(accuracies, 'Accuracy')}"
        )
    lines = [
        step_line(1, {"step": step, "train_loss": train, "validation_loss": validation})
        for step, train, validation in zip(PUBLISHED_STEPS, log.losses[::2], log.losses[1::2], strict=False)
    ]
    lines[2:2] = ["..."]
    if log.epoch:
        train, validation = log.epoch
        lines.append(epoch_line({"train_accuracy": train / 100, "validation_accuracy": validation / 100}))
    if log.minutes:
        lines.append(end_of_training(60 * log.minutes))
    return "\n".join([*lines, accuracy_lines(accuracies)])


def by_split(*percent: float) -> dict[str, float]:
    """Return {split: accuracy between 0 and 1} of three accuracies in percent."""
    return {split: value / 100 for split, value in zip(SPLITS, percent, strict=True)}
