"""Saving an unfinished run, and going on with it as if it had never stopped.

A run's folder holds `checkpoint.pt` and, from its second one on, `checkpoint.previous.pt`. Each is
the SHA-256 of what follows (32 bytes) and then what `torch.save` writes, so that damage is noticed.
"""

import hashlib
import os
import pickle
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import torch

from finetuning.cli import note
from finetuning.errors import UserError
from finetuning.files import written_whole
from finetuning.filetypes import refuse_lfs_pointer
from finetuning.loop import Progress, check_losses
from finetuning.runtime import random_state, set_random_state

CHECKPOINT, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"
DIGEST_BYTES = 32
STATE = {"identity", "device", "precision", "trainable", "optimizer", "random_state", "progress"}
# What may differ between the run that saved a checkpoint and the one that goes on with it.
FREE_TO_CHANGE = {"resume", "checkpoint_minutes", "output_dir", "data_dir", "models_dir", "accumulate",
                  "tensorboard", "save_model", "compile", "precision", "device"}  # the device's type may not


class CheckpointWriter:
    """Called after each update, it saves a checkpoint where one is due: every so many minutes, and after an epoch."""

    def __init__(self, folder, classifier, optimizer, identity, minutes):
        self.path, self.previous = checkpoints(folder)
        self.classifier = classifier
        self.optimizer = optimizer
        self.identity = identity
        self.seconds = 60 * minutes
        self.last = time.monotonic()

    def __call__(self, progress, now=False):
        if now or progress.order is None or time.monotonic() - self.last >= self.seconds:
            self.save(progress)
            self.last = time.monotonic()

    def save(self, progress):
        """Write all that the run needs to go on. Frozen weights are not saved: they never change.

        A disk that is full costs the run its checkpoint and not what it has learned: it goes on,
        with a note. Raises UserError where losses or weights are no numbers any more.
        """
        trainable = {name: p.detach() for name, p in self.classifier.model.named_parameters() if p.requires_grad}
        check_losses(progress, updates=len(progress.losses))
        if not all(tensor.isfinite().all() for tensor in trainable.values()):
            raise UserError(f"weights are no finite numbers any more after update {progress.step}; "
                            "try a smaller --learning_rate; any checkpoint is from before that")
        state = {
            "identity": self.identity, "device": self.classifier.device.type, "precision": self.classifier.precision,
            "trainable": trainable, "optimizer": self.optimizer.state_dict(),
            "random_state": random_state(self.classifier.device),
            "progress": {**asdict(progress), "losses": [float(loss) for loss in progress.losses]},
        }
        try:
            with written_whole(self.path) as (temporary,):
                write(state, temporary)
                if self.path.exists():
                    os.replace(self.path, self.previous)
        except UserError as error:
            note(f"No checkpoint after update {progress.step}: {error}; training goes on")

    def remove(self):
        """Delete the checkpoints: a finished run needs none."""
        self.previous.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)


def checkpoints(folder):
    """The paths of a run's checkpoints, the newer first."""
    return Path(folder) / CHECKPOINT, Path(folder) / PREVIOUS


def is_unfinished(folder):
    """Whether a folder holds a checkpoint to go on from."""
    return any(path.is_file() for path in checkpoints(folder))


def run_identity(facts):
    """What makes a run the same run: its arguments and its data."""
    return {**{key: value for key, value in facts["arguments"].items() if key not in FREE_TO_CHANGE}, **facts["data"]}


def write(state, path):
    """Write a checkpoint's file, digest first, and wait until the disk has it."""
    with open(path, "wb+") as file:
        file.write(bytes(DIGEST_BYTES))
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch's report of what stopped it: a full disk, or a second Ctrl-C
            stopped = isinstance(error.__context__, (OSError, KeyboardInterrupt))
            raise error.__context__ if stopped else error from None
        file.seek(DIGEST_BYTES)
        digest = hashlib.file_digest(file, "sha256").digest()
        file.seek(0)
        file.write(digest)
        file.flush()
        os.fsync(file.fileno())


def read(path):
    """What `write` wrote, or None where the file is damaged or something else; executes no code from it."""
    try:
        with open(path, "rb") as file, warnings.catch_warnings(action="ignore"):
            digest = file.read(DIGEST_BYTES)
            if hashlib.file_digest(file, "sha256").digest() != digest:
                return None
            file.seek(DIGEST_BYTES)
            state = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError):
        return None
    return state if isinstance(state, dict) and state.keys() == STATE else None


def find_checkpoint(folder, identity):
    """What the newest whole checkpoint in a run's folder holds.

    Raises UserError where there is none, or it belongs to another run than one of this `identity`.
    """
    newest, previous = checkpoints(folder)
    found = [path for path in (newest, previous) if path.is_file()]
    if not found:
        raise UserError(f"--resume: there is no checkpoint at {newest}; start without --resume")
    for path in found:
        if state := read(path):
            break
    else:
        for path in found:
            refuse_lfs_pointer(path)
        raise UserError(f"--resume: {' and '.join(map(str, found))} damaged, or no checkpoint of this program; "
                        "delete what is there and start again without --resume")
    if differing := [key for key, value in identity.items() if state["identity"].get(key) != value]:
        raise UserError(f"--resume: {path} belongs to a run with other {', '.join(differing)}")
    if path == previous:
        note(f"{newest} is damaged or missing; going on from the one before it, "
             f"of update {state['progress']['step']}")
        os.replace(previous, newest)  # as the older of two it would be the next to go
    return state


def restore(state, classifier, optimizer):
    """Put a checkpoint's model, optimizer and random state back; return its Progress.

    Raises UserError where the run began on another kind of device, or the model is another one.
    """
    if state["device"] != classifier.device.type:
        raise UserError(f"--resume: the run began on {state['device']} and would go on with other numbers "
                        f"on {classifier.device.type}")
    parameters = {name: p for name, p in classifier.model.named_parameters() if p.requires_grad}
    if ({name: p.shape for name, p in parameters.items()}
            != {name: tensor.shape for name, tensor in state["trainable"].items()}):
        raise UserError("--resume: the model is not the one the checkpoint was made of; its parameters are others")
    with torch.no_grad():
        for name, tensor in state["trainable"].items():
            parameters[name].copy_(tensor)
    optimizer.load_state_dict(state["optimizer"])
    set_random_state(state["random_state"], classifier.device)
    return Progress(**state["progress"])
