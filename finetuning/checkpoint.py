"""Checkpoints, from which an interrupted run resumes with the results of an uninterrupted one.

A run's folder holds `checkpoint.pt` and, from the second checkpoint on, `checkpoint.previous.pt`. Each is the
SHA-256 digest of the rest of the file (32 bytes) followed by what `torch.save` writes.
"""

import errno
import hashlib
import os
import pickle
import re
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from finetuning.performance.device import get_rng_state, set_rng_state
from finetuning.performance.inference import Classifier
from finetuning.system.console import print_status
from finetuning.system.errors import UserError
from finetuning.system.files import atomic_write
from finetuning.system.filetypes import refuse_lfs_pointer
from finetuning.training import TrainState, check_finite

CHECKPOINT, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"
DIGEST_BYTES = 32
KEYS = {"fingerprint", "device", "precision", "model", "optimizers", "rng_state", "train_state"}
# Arguments that a resumed run may change; `restore` checks that the type of the device stays the same.
IGNORED_ON_RESUME = {"resume", "checkpoint_minutes", "output_dir", "data_dir", "models_dir", "micro_batch_size",
                     "tensorboard", "save_model", "compile", "precision", "device"}  # fmt: skip


class Checkpointer:
    """Callback that saves a checkpoint every few minutes and at the end of an epoch."""

    def __init__(
        self,
        folder: Path,
        classifier: Classifier,
        optimizers: list[torch.optim.Optimizer],
        fingerprint: dict,
        minutes: float,
    ):
        self.path, self.previous = checkpoint_paths(folder)
        self.classifier = classifier
        self.optimizers = optimizers
        self.fingerprint = fingerprint
        self.interval = 60 * minutes
        self.last_saved = time.monotonic()

    def __call__(self, state: TrainState) -> None:
        """Save a checkpoint if one is due."""
        if state.batches is None or time.monotonic() - self.last_saved >= self.interval:
            self.save(state)
            self.last_saved = time.monotonic()

    def save(self, state: TrainState) -> None:
        """Save the model's state dict without frozen parameters and everything else that resuming needs.

        If the disk is full or fails, warn and return. Raises UserError if losses or weights are not finite.
        """
        check_finite(state, num_steps=len(state.losses))
        if not all(p.isfinite().all() for p in self.classifier.model.parameters() if p.requires_grad):
            raise UserError(
                f"non-finite weights after step {state.step}; start again with a lower --learning_rate, or with "
                "--precision fp32"
            )
        content = {
            "fingerprint": self.fingerprint,
            "device": self.classifier.device.type,
            "precision": self.classifier.precision,
            "model": state_dict_without_frozen(self.classifier.model),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "rng_state": get_rng_state(self.classifier.device),
            "train_state": {**asdict(state), "losses": [float(loss) for loss in state.losses]},
        }
        try:
            with atomic_write(self.path) as (temporary,):
                write_checkpoint(content, temporary)
                if self.path.exists():
                    os.replace(self.path, self.previous)
        except (UserError, OSError) as error:  # such as a file size limit
            print_status(f"Could not save a checkpoint after step {state.step}: {error}")


def state_dict_without_frozen(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a model's state dict without frozen parameters; it keeps buffers, which training may change."""
    frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}


def digest_frozen_weights(model: nn.Module) -> str:
    """Return the SHA-256 of a model's frozen weights, which a checkpoint does not hold."""
    digest = hashlib.sha256()
    for p in model.parameters():
        if not p.requires_grad:
            digest.update(p.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def remove_checkpoints(folder: str | Path) -> None:
    """Delete the checkpoints of a finished run."""
    for path in reversed(checkpoint_paths(folder)):
        path.unlink(missing_ok=True)


def checkpoint_paths(folder: str | Path) -> tuple[Path, Path]:
    """Return the paths of a run's checkpoints, the newer one first."""
    return Path(folder) / CHECKPOINT, Path(folder) / PREVIOUS


def has_checkpoint(folder: str | Path) -> bool:
    """Return whether a folder holds a checkpoint."""
    return any(path.is_file() for path in checkpoint_paths(folder))


def find_interrupted_run(folder: Path) -> Path:
    """Return `folder`, or that of the same run in another precision if only that one holds a checkpoint."""

    def without_precision(path):
        return re.sub("-precision_[a-z0-9]+", "", path.name)

    others = (path for path in sorted(folder.parent.glob("*")) if without_precision(path) == without_precision(folder))
    return folder if has_checkpoint(folder) else next(filter(has_checkpoint, others), folder)


def run_fingerprint(metadata: dict) -> dict:
    """Return the arguments and data digests that must be the same in a run and its checkpoint."""
    arguments = {key: value for key, value in metadata["arguments"].items() if key not in IGNORED_ON_RESUME}
    return {**arguments, **metadata["data"]}


def check_fingerprint(content: dict, fingerprint: dict, name: str | Path) -> None:
    """Raise UserError if the checkpoint called `name` belongs to a run with another fingerprint."""
    if differing := [key for key, value in fingerprint.items() if content["fingerprint"].get(key) != value]:
        raise UserError(
            f"--resume: {name} belongs to a run with other {', '.join(differing)}; use its flags, data and model, or "
            "choose another --output_dir"
        )


def write_checkpoint(content: dict, path: Path) -> None:
    """Write a checkpoint file and wait until it is on the disk."""
    with open(path, "wb+") as file:
        file.write(bytes(DIGEST_BYTES))
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch wraps a full disk or a second Ctrl-C
            if isinstance(error.__context__, (OSError, KeyboardInterrupt)):
                raise error.__context__ from None
            raise
        file.seek(DIGEST_BYTES)
        digest = hashlib.file_digest(file, "sha256").digest()
        file.seek(0)
        file.write(digest)
        file.flush()
        os.fsync(file.fileno())


def read_checkpoint(path: Path) -> dict | None:
    """Return the content of a checkpoint file, or None if it is damaged; executes no code from it."""
    try:
        with open(path, "rb") as file, warnings.catch_warnings(action="ignore"):
            digest = file.read(DIGEST_BYTES)
            if hashlib.file_digest(file, "sha256").digest() != digest:
                return None
            file.seek(DIGEST_BYTES)
            content = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError):
        return None
    except OSError as error:
        if error.errno != errno.EIO:  # a bad sector
            raise
        return None
    return content if isinstance(content, dict) and content.keys() == KEYS else None


def load_checkpoint(folder: str | Path, fingerprint: dict) -> dict:
    """Return the content of the newest undamaged checkpoint in a run's folder.

    Raises UserError if there is none, or if it belongs to a run with another fingerprint.
    """
    newest, previous = checkpoint_paths(folder)
    found = [path for path in (newest, previous) if path.is_file()]
    if not found:
        raise UserError(f"--resume: there is no checkpoint at {newest}; start without --resume")
    for path in found:
        if content := read_checkpoint(path):
            break
    else:
        for path in found:
            refuse_lfs_pointer(path)
        raise UserError(
            f"--resume: {' and '.join(map(str, found))}: damaged, or not a checkpoint of this version; "
            "delete the file and start again without --resume"
        )
    check_fingerprint(content, fingerprint, path)
    if path == previous:
        step = content["train_state"]["step"]
        print_status(f"{newest} is damaged or missing; resuming from the previous checkpoint, of step {step}")
        os.replace(previous, newest)  # so that the next checkpoint does not overwrite it
    return content


def restore(
    content: dict, fingerprint: dict, classifier: Classifier, optimizers: list[torch.optim.Optimizer]
) -> TrainState:
    """Load a checkpoint into the model, the optimizers and the random state; return its TrainState.

    Raises UserError if the run started on another type of device, with another model or with another fingerprint.
    """
    if content["device"] != classifier.device.type:
        raise UserError(
            f"--resume: the run started on {content['device']}; its numbers would change on "
            f"{classifier.device.type}; use --device {content['device']}"
        )
    state_dict = state_dict_without_frozen(classifier.model)
    if {name: x.shape for name, x in state_dict.items()} != {name: x.shape for name, x in content["model"].items()}:
        raise UserError("--resume: the checkpoint belongs to another model; names or shapes of its tensors differ")
    check_fingerprint(content, fingerprint, "the checkpoint")
    for name, tensor in content["model"].items():
        state_dict[name].copy_(tensor)
    for optimizer, state in zip(optimizers, content["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    set_rng_state(content["rng_state"], classifier.device)
    return TrainState(**content["train_state"])
