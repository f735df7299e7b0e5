"""Command lines: the flags that scripts share, and `run_main`, which ends errors in one line."""

import argparse
import io
import logging
import math
import os
import shlex
import signal
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, NoReturn, TypeVar

from finetuning.system.console import print_status
from finetuning.system.environment import under_torchrun
from finetuning.system.errors import UserError, is_out_of_memory
from finetuning.system.files import DISK_ERRNOS
from finetuning.system.signals import raise_on_signals, signal_number

T = TypeVar("T", int, float)
CONTEXT_LENGTHS = ("longest_training_example", "model_context_length")
# Arguments that do not change what is trained, or that are in the run's name anyway.
EXCLUDED_FROM_RUN_NAME = {"model", "model_size", "trainable_layers", "seed", "command", "data_dir", "output_dir",
                          "models_dir", "device", "compile", "resume", "checkpoint_minutes", "eval_freq", "eval_iter",
                          "micro_batch_size", "tensorboard", "save_model"}  # fmt: skip


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Formatter that appends each default to its help line, except None."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """Argument parser that shows every default and reports a mistake in one line."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, **kwargs)

    def parse_args(self, args=None, namespace=None):
        """Parse the arguments; add `command`, the command line as typed, and `overrides`, the parts of a run's name."""
        namespace = super().parse_args(args, namespace)
        launcher = ["torchrun", "--nproc_per_node", os.environ["LOCAL_WORLD_SIZE"]] if under_torchrun() else ["python"]
        namespace.command = shlex.join([*launcher, self.prog, *(sys.argv[1:] if args is None else args)])
        namespace.overrides = [
            key if value is True else f"{key}_{value}".replace("/", "-")
            for key, value in vars(namespace).items()
            if key not in EXCLUDED_FROM_RUN_NAME and value != self.get_default(key)
        ]
        return namespace

    def error(self, message: str) -> NoReturn:
        """Raise UserError."""
        raise UserError(f"{message} (see --help)")


def user_path(text: str) -> str:
    """Expand "~" to the home folder, which a shell does in `--flag ~/a` but not in `--flag=~/a`."""
    return os.path.expanduser(text)


def number(text: str, kind: type[T], condition: Callable[[T], bool], description: str) -> T:
    """Parse a number; raise ArgumentTypeError if it is malformed or does not meet the condition."""
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not condition(value):
        raise argparse.ArgumentTypeError(f"must be {description}, not {text!r}")
    return value


def positive_int(text: str) -> int:
    """Parse an integer of at least 1."""
    return number(text, int, lambda value: value >= 1, "a whole number of 1 or more")


def positive_float(text: str) -> float:
    """Parse a finite number above 0."""
    return number(text, float, lambda value: 0 < value < math.inf, "a number above 0")


def seed_int(text: str) -> int:
    """Parse a seed that PyTorch and NumPy both accept."""
    return number(text, int, lambda value: 0 <= value < 2**32, f"a whole number between 0 and {2**32 - 1}")


def context_length(text: str) -> int | str:
    """Parse a number of tokens, or one of CONTEXT_LENGTHS."""
    description = f"a whole number of 1 or more, {' or '.join(CONTEXT_LENGTHS)}"
    return text if text in CONTEXT_LENGTHS else number(text, int, lambda value: value >= 1, description)


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of all train scripts: where to read and write, and the seed."""
    add = parser.add_argument_group("run").add_argument
    add("--data_dir", type=user_path, default=".", help="folder of train.csv, validation.csv and test.csv")
    add("--output_dir", type=user_path, help="folder of this run's record (default: results/ and the run's name)")
    add("--seed", type=seed_int, default=123, help="random seed")
    add(
        "--save_model", action="store_true", help="save the trained model to model/ in the run's folder, for predict.py"
    )


def add_model_arguments(parser: argparse.ArgumentParser, *, trainable_layers: str) -> argparse._ArgumentGroup:
    """Add a group with the model flags of both neural train scripts; return it for a script's own flags."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--trainable_layers",
        choices=["all", "last_block", "last_layer"],
        default=trainable_layers,
        help="layers to train, the others are frozen; last_block: the last transformer block and the layers after it; "
        "last_layer: the output layer",
    )
    group.add_argument(
        "--context_length",
        type=context_length,
        default=256,
        metavar="TOKENS",
        help=f"truncate reviews to this many tokens: a number, {' or '.join(CONTEXT_LENGTHS)}",
    )
    return group


def add_training_arguments(parser: argparse.ArgumentParser, *, learning_rate: float) -> None:
    """Add the flags of both neural train scripts about training, logging and hardware."""
    count: dict[str, Any] = {"type": positive_int, "metavar": "N"}
    real: dict[str, Any] = {"type": positive_float, "metavar": "X"}
    add = parser.add_argument_group("training").add_argument
    add("--num_epochs", **count, default=1, help="passes over the training set")
    add("--max_steps", **count, help="stop after exactly this many steps (default: no limit)")
    add("--batch_size", **count, default=8, help="reviews per step, over all processes")
    add("--learning_rate", **real, default=learning_rate, help="learning rate; there is no schedule")
    add("--optimizer", choices=["adamw", "muon"], default="adamw",
        help="muon: Muon for matrices other than embeddings, AdamW for the rest")  # fmt: skip
    add("--muon_learning_rate", **real, default=1e-4, help="learning rate of Muon; AdamW keeps --learning_rate")
    add("--group_by_length", action="store_true",
        help="batches of reviews of similar length: less padding, but not the published batches")  # fmt: skip
    add = parser.add_argument_group("logging").add_argument
    add("--eval_freq", **count, default=50, help="log the losses every N steps")
    add(
        "--eval_iter", **count, default=20, help="batches of each set used to estimate the logged losses and accuracies"
    )
    add("--tensorboard", action="store_true", help="also write losses and accuracies for TensorBoard")
    add = parser.add_argument_group("hardware").add_argument
    add("--micro_batch_size", **count, help="reviews per forward and backward pass of a process; saves memory, "
        "takes the same steps up to rounding and dropout (default: all reviews of a step)")  # fmt: skip
    add("--device", default="auto", help="auto (CUDA, else MPS, else CPU), cpu, mps, cuda or cuda:1")
    add("--precision", choices=["auto", "fp32", "tf32", "bf16"], default="auto",
        help="compute precision (weights stay float32); auto: bf16 if it is faster here, else fp32; "
        "tf32: CUDA only")  # fmt: skip
    add("--compile", action="store_true", help="compile the model with torch.compile")
    add("--checkpoint_minutes", **real, default=10,
        help="minutes between checkpoints; each epoch also ends with one")  # fmt: skip
    add("--resume", action="store_true", help="resume from the checkpoint in the run's folder")


def run_main(main: Callable[[], None]) -> None:
    """Run a script's `main`; print user errors, external errors and interrupts as one line and exit."""
    raise_on_signals()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for characters that the console cannot encode
    # The Hub's client logs every retry; the final error is enough.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        with single_report():
            main()
    except UserError as error:
        fail(" ".join(str(error).split()))
    except BrokenPipeError:
        # The reader of the output, such as `head`, has closed it; flushing at exit would raise again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE if hasattr(signal, "SIGPIPE") else 1)
    except (OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno in DISK_ERRNOS:
            fail(f"{error.strerror}: {error.filename or 'while writing'}")
        if is_out_of_memory(error):
            fail("out of memory")
        raise
    except KeyboardInterrupt as error:
        with suppress(OSError):  # a pipe to a `tee` that the same Ctrl-C has ended
            print_status(str(error) or "Interrupted.")
        sys.exit(128 + signal_number(error))  # as a shell reports a signal


def fail(message: str) -> None:
    """Print an error and exit with status 2."""
    print_status(f"{sys.argv[0]}: {message}")
    sys.exit(2)


def single_report() -> AbstractContextManager:
    """Return a context in which only one of torchrun's processes reports a failure."""
    if not under_torchrun():
        return nullcontext()
    from finetuning.performance.distributed import report_first_failure  # imports torch, which not every script does

    return report_first_failure()
