"""What a run shows: the published log's lines on standard output, progress bars if standard error is a terminal."""

from contextlib import contextmanager

from tqdm import tqdm

INTERVAL = 0.1  # seconds between two changes of a bar
MOMENT = 2  # seconds that an evaluation may take without a bar
BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"


def log(line, file=None):
    """Print a line of the log, or to another file, above the progress bars where there are any."""
    with tqdm.external_write_mode():
        print(line, file=file, flush=True)


def step_line(epoch, point):
    """The log line of a point of the curve; epochs count from 1."""
    return (f"Ep {epoch} (Step {point['step']:06d}): "
            f"Train loss {point['train_loss']:.3f}, Val loss {point['validation_loss']:.3f}")


def epoch_line(point):
    """The log line after an epoch, its accuracies those of the samples that the losses are taken over."""
    return (f"Training accuracy: {point['train_accuracy']:.2%} | "
            f"Validation accuracy: {point['validation_accuracy']:.2%}")


def end_of_training(seconds):
    """The log between training and the final accuracies."""
    return f"Training completed in {seconds / 60:.2f} minutes.\n\nEvaluating on the full datasets ...\n"


def accuracy_lines(accuracies, noun="accuracy"):
    """The final accuracies, `{"train", "validation", "test"}`; the scikit-learn scripts write the noun with an "A"."""
    return "\n".join(f"{name} {noun}: {accuracies[split]:.2%}" for name, split in
                     [("Training", "train"), ("Validation", "validation"), ("Test", "test")])


@contextmanager
def training_bar(progress, total_steps, batch_size):
    """Yield a function to call with the Progress after each update: a bar that counts reviews.

    The loss it shows is that of the last log line: asking a GPU for a newer one would make it wait.
    """
    with tqdm(desc="Training", total=total_steps * batch_size, initial=progress.step * batch_size, unit=" reviews",
              bar_format=BAR, mininterval=INTERVAL, disable=None, leave=False, dynamic_ncols=True) as bar:
        def show(progress):
            loss = f", loss {progress.curve[-1]['train_loss']:.3f}" if progress.curve else ""
            bar.set_postfix_str(f"step {progress.step}/{total_steps}{loss}", refresh=False)
            bar.update(progress.step * batch_size - bar.n)
        yield show


def evaluation_bar(batches):
    """Iterate over a list of batches, with a bar if that takes longer than a moment."""
    return tqdm(batches, desc="Evaluating", unit=" batches", bar_format=BAR, mininterval=INTERVAL, disable=None,
                leave=False, delay=MOMENT, dynamic_ncols=True)
