"""Saving an unfinished run, and going on with it as if it had never stopped."""

import pickle
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import torch

from finetuning.errors import UserError
from finetuning.files import written_whole
from finetuning.loop import Progress
from finetuning.runtime import random_state, set_random_state

CHECKPOINT = "checkpoint.pt"
SECONDS_BETWEEN_CHECKPOINTS = 600
# An epoch's end is worth a checkpoint too, unless repeating the work costs less than writing gigabytes.
SECONDS_WORTH_SAVING = 60
# What may differ between the run that saved a checkpoint and the one that goes on with it.
FREE_TO_CHANGE = {"resume", "output_dir", "data_dir", "models_dir", "save_model"}


class CheckpointWriter:
    """Called after each update, it saves a checkpoint every ten minutes and at the end of an epoch."""

    def __init__(self, folder, classifier, optimizer, facts):
        self.path = Path(folder) / CHECKPOINT
        self.classifier = classifier
        self.optimizer = optimizer
        self.identity = identity(facts, classifier.precision)
        self.last = time.monotonic()

    def __call__(self, progress):
        due = SECONDS_WORTH_SAVING if progress.order is None else SECONDS_BETWEEN_CHECKPOINTS
        if time.monotonic() - self.last >= due:
            self.save(progress)
            self.last = time.monotonic()

    def save(self, progress):
        """Write all that the run needs to go on. Frozen weights are not saved: they never change."""
        state = {
            "identity": self.identity,
            "trainable": {name: p.detach() for name, p in self.classifier.model.named_parameters() if p.requires_grad},
            "optimizer": self.optimizer.state_dict(),
            "random_state": random_state(self.classifier.device),
            "progress": {**asdict(progress), "losses": [float(loss) for loss in progress.losses]},
        }
        with written_whole(self.path) as (temporary,):
            torch.save(state, temporary)

    def remove(self):
        """Delete the checkpoint: a finished run needs none."""
        self.path.unlink(missing_ok=True)


def identity(facts, precision):
    """What makes a run the same run: its arguments, the precision chosen, and its data."""
    arguments = {key: value for key, value in facts["arguments"].items() if key not in FREE_TO_CHANGE}
    return {**arguments, "precision": precision, **facts["data"]}


def load_checkpoint(folder, classifier, optimizer, facts):
    """Restore model, optimizer and random state from a run's folder; return its Progress.

    Loading executes no code from the file. Raises UserError where there is no checkpoint, it is
    damaged, or it belongs to another run.
    """
    path = Path(folder) / CHECKPOINT
    if not path.is_file():
        raise UserError(f"--resume: there is no checkpoint at {path}")
    try:
        with warnings.catch_warnings(action="ignore"):  # the line below says it all
            state = torch.load(path, map_location="cpu", weights_only=True)
        saved = state["identity"]
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError) as error:
        raise UserError(f"--resume: {path} is damaged; delete it and start again without --resume") from error
    differing = [key for key, value in identity(facts, classifier.precision).items() if saved.get(key) != value]
    if differing:
        raise UserError(f"--resume: {path} belongs to a run with other {', '.join(differing)}")
    parameters = dict(classifier.model.named_parameters())
    with torch.no_grad():
        for name, tensor in state["trainable"].items():
            parameters[name].copy_(tensor)
    optimizer.load_state_dict(state["optimizer"])
    set_random_state(state["random_state"])
    return Progress(**state["progress"])
