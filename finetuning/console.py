"""What a run shows while it goes: the log on standard output, progress bars on standard error if that is a terminal."""

from contextlib import contextmanager

from tqdm import tqdm

INTERVAL = 0.1  # seconds between two changes of a bar
MOMENT = 2  # seconds that an evaluation may take without a bar
BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"


def log(line):
    """Print a line of the log, above the progress bars where there are any."""
    with tqdm.external_write_mode():
        print(line, flush=True)


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
