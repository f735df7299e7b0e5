"""Advice added to errors: how to resume an interrupted run, what saves memory."""

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetuning.checkpoint import has_checkpoint
from finetuning.performance import distributed
from finetuning.system.errors import UserError, is_out_of_memory

WINDOWS = os.name == "nt"


@contextmanager
def resume_hint(folder: Path, command: str) -> Iterator[None]:
    """Add the resume command to a KeyboardInterrupt if a checkpoint exists."""
    try:
        yield
    except KeyboardInterrupt as error:
        if has_checkpoint(folder):
            error.args = (f"Interrupted; to resume: {resume_command(command)}",)
        raise


def resume_command(command: str) -> str:
    """Return what to type to resume a run of a recorded command, in the syntax of the system's shell."""
    if int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1:  # torchrun does not tell the flags of several nodes
        return "start the same torchrun command on every node, with --resume added"
    script = Path(sys.argv[0])
    words = [str(script) if word == script.name else word for word in shlex.split(command) if word != "--resume"]
    return (subprocess.list2cmdline if WINDOWS else shlex.join)([*words, "--resume"])


@contextmanager
def out_of_memory_hint(args: argparse.Namespace | None = None) -> Iterator[None]:
    """Turn an out-of-memory error into a UserError with advice; without `args`, the model alone did not fit."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        when = "before training" if args is None else "in training"
        raise UserError(f"out of memory {when}; try {' or '.join(memory_remedies(args))}") from error


def memory_remedies(args: argparse.Namespace | None = None) -> list[str]:
    """Return what saves memory and is still possible."""
    if args is None:
        return ["a smaller model", "a device with more memory"]
    shard_size = -(-args.batch_size // distributed.world_size())
    micro_batch_size = min(args.micro_batch_size or shard_size, shard_size)
    smaller = [f"--micro_batch_size {micro_batch_size // 2}"] if micro_batch_size > 1 else []
    if args.resume:  # a resumed run may change nothing else
        return smaller or ["a device with more memory"]
    layers = ["--trainable_layers last_block"] if args.trainable_layers == "all" else []
    return [*smaller, "a shorter --context_length", *layers, *([] if smaller else ["a smaller model"])]
