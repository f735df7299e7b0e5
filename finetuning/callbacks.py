"""Callbacks of the training loop; each is called with the TrainState after a step."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetuning.system.console import print_status, progress_bar
from finetuning.system.errors import UserError
from finetuning.training import TrainState


@contextmanager
def training_bar(state: TrainState, total_steps: int, batch_size: int) -> Iterator[Callable[[TrainState], None]]:
    """Yield a callback that shows a progress bar, counted in reviews.

    The loss shown is that of the last log line: reading a newer one would synchronize with the GPU.
    """
    bar = progress_bar(
        desc="Training", total=total_steps * batch_size, initial=state.step * batch_size, unit=" reviews"
    )

    def update(state: TrainState) -> None:
        loss = f", loss {state.eval_history[-1]['train_loss']:.3f}" if state.eval_history else ""
        bar.set_postfix_str(f"step {state.step}/{total_steps}{loss}", refresh=False)
        bar.update(state.step * batch_size - bar.n)

    with bar:
        yield update


class TensorBoard:
    """Callback that writes new losses and accuracies to an event file in the run's folder.

    Raises UserError if the package tensorboard, which is not in the requirements, is not installed.
    """

    def __init__(self, folder: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError("--tensorboard needs the package tensorboard: pip install tensorboard") from error
        # A resumed run writes its whole history again; purge_step hides what earlier event files hold.
        self.open = lambda: SummaryWriter(folder, purge_step=0)
        self.writer: Any = None  # opened with the first values, so that a run that fails early leaves no file
        self.num_written = {"eval_history": 0, "epoch_metrics": 0}

    def __call__(self, state: TrainState) -> None:
        """Write what is new in the state; if the disk is full or fails, warn and write nothing more."""
        try:
            self.write_new(state)
        except OSError as error:
            print_status(f"Could not write for TensorBoard: {error}; training continues without it")
            self.num_written = {}

    def write_new(self, state: TrainState) -> None:
        """Write the log lines that are not written yet."""
        for name, count in self.num_written.items():
            new = getattr(state, name)[count:]
            self.num_written[name] += len(new)
            for row in new:
                self.write(**row)

    def write(self, step: int, **values: float) -> None:
        """Write values such as `train_loss` at a step."""
        self.writer = self.writer or self.open()
        for key, value in values.items():
            split, metric = key.split("_")
            self.writer.add_scalar(f"{metric}/{split}", value, step)
        self.writer.flush()
