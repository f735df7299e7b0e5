"""The lines of the published log, so that logs can be compared line by line."""


def step_line(epoch: int, point: dict) -> str:
    """Return the log line of an entry of the evaluation history; epochs count from 1."""
    return (
        f"Ep {epoch} (Step {point['step']:06d}): "
        f"Train loss {point['train_loss']:.3f}, Val loss {point['validation_loss']:.3f}"
    )


def epoch_line(metrics: dict) -> str:
    """Return the log line after an epoch."""
    return (
        f"Training accuracy: {metrics['train_accuracy']:.2%} | "
        f"Validation accuracy: {metrics['validation_accuracy']:.2%}"
    )


def end_of_training(seconds: float) -> str:
    """Return the lines between training and the final accuracies."""
    return f"Training completed in {seconds / 60:.2f} minutes.\n\nEvaluating on the full datasets ...\n"


def accuracy_lines(accuracies: dict[str, float], noun: str = "accuracy") -> str:
    """Return the final accuracies; the scikit-learn script capitalizes the noun."""
    names = {"train": "Training", "validation": "Validation", "test": "Test"}
    return "\n".join(f"{name} {noun}: {accuracies[split]:.2%}" for split, name in names.items())
