"""Command lines: the flags both train scripts share, and how a script ends when something is wrong."""

import argparse
import io
import logging
import os
import shlex
import signal
import sys
from contextlib import nullcontext

from finetuning.errors import UserError, is_out_of_memory
from finetuning.files import DISK_TROUBLE
from finetuning.interrupts import exit_status, raise_terminated

# The variables of the environment that torchrun sets and this project reads.
TORCHRUN = {"TORCHELASTIC_RUN_ID", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
CONTEXT_LENGTHS = ("longest_training_example", "model_context_length")
# Flags that do not change what is learned, or that a run's name shows anyway.
NOT_IN_NAMES = {"model", "model_size", "trainable_layers", "seed", "command", "data_dir", "output_dir", "models_dir",
                "device", "compile", "resume", "checkpoint_minutes", "eval_freq", "eval_iter", "accumulate",
                "tensorboard", "save_model"}


def variant(key, value):
    """A flag's value as part of a folder's name."""
    return key if value is True else f"{key}_{value}".replace("/", "-")


def launcher():
    """What was typed before the script's name."""
    if under_torchrun():
        return ["torchrun", "--nproc_per_node", os.environ["LOCAL_WORLD_SIZE"]]
    return ["python"]


def under_torchrun():
    """Whether torchrun has started this process, perhaps one of several; some of its variables may be left over."""
    return os.environ.keys() >= TORCHRUN


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Append each default to its help line, except None, whose meaning the line itself tells."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """An argument parser that shows every default and reports a mistake in one line."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, **kwargs)

    def parse_args(self, args=None, namespace=None):
        """Parse; also keep what was typed as `command`, and as `variants` what a run's name should tell."""
        namespace = super().parse_args(args, namespace)
        namespace.command = shlex.join([*launcher(), self.prog, *(sys.argv[1:] if args is None else args)])
        namespace.variants = [variant(key, value) for key, value in vars(namespace).items()
                              if key not in NOT_IN_NAMES and value != self.get_default(key)]
        return namespace

    def error(self, message):
        raise UserError(f"{message} (see --help)")


def user_path(text):
    """Parse a path: a "~" stands for the home folder, which the shell sees to in "--flag ~/a" but not in "--flag=~/a".
    """
    return os.path.expanduser(text)


def positive_int(text):
    """Parse a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {text}")
    return number


def positive_float(text):
    """Parse a finite number above 0."""
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text}")
    return number


def seed_number(text):
    """Parse a seed that PyTorch and NumPy both accept: 0 to 2**32 - 1."""
    number = int(text)
    if not 0 <= number < 2**32:
        raise argparse.ArgumentTypeError(f"must be between 0 and {2**32 - 1}, not {text}")
    return number


def context_length(text):
    """Parse a number of tokens, or one of the names in CONTEXT_LENGTHS."""
    return text if text in CONTEXT_LENGTHS else positive_int(text)


# argparse names a failing type function in its message; these read better than the functions' names.
positive_int.__name__ = seed_number.__name__ = "whole number"
positive_float.__name__ = "number"
context_length.__name__ = f"context length (a whole number, {' or '.join(CONTEXT_LENGTHS)})"


def add_run_arguments(parser):
    """Add the flags that all three train scripts share: where to read and write, and the seed."""
    group = parser.add_argument_group("run")
    group.add_argument("--data_dir", type=user_path, default=".",
                       help="folder of train.csv, validation.csv and test.csv")
    group.add_argument("--output_dir", type=user_path,
                       help="folder of this run's record (default: results/ and the run's name)")
    group.add_argument("--seed", type=seed_number, default=123, help="random seed")
    group.add_argument("--save_model", action="store_true",
                       help="keep the trained model, in model/ in the run's folder, for predict.py")
    return group


def add_model_arguments(parser, *, trainable_layers):
    """Start the group of flags about the model with those that both train scripts share; return it."""
    group = parser.add_argument_group("model")
    group.add_argument("--trainable_layers", choices=["all", "last_block", "last_layer"], default=trainable_layers,
                       help="which layers learn; the others keep their weights")
    group.add_argument("--context_length", type=context_length, default=256, metavar="TOKENS",
                       help=f"tokens kept of each review: a number, {' or '.join(CONTEXT_LENGTHS)}")
    return group


def add_training_arguments(parser, *, learning_rate):
    """Add the flags about training, its log and the machine that both train scripts share."""
    group = parser.add_argument_group("training")
    group.add_argument("--num_epochs", type=positive_int, default=1, metavar="N", help="passes over the training set")
    group.add_argument("--max_steps", type=positive_int, metavar="N",
                       help="stop after exactly this many updates (default: no limit)")
    group.add_argument("--batch_size", type=positive_int, default=8, metavar="N", help="reviews per update")
    group.add_argument("--learning_rate", type=positive_float, default=learning_rate, metavar="X", help="constant")
    group.add_argument("--optimizer", choices=["adamw", "muon"], default="adamw",
                       help="muon: Muon for matrices other than embeddings, AdamW for the rest")
    group.add_argument("--muon_learning_rate", type=positive_float, default=1e-4, metavar="X",
                       help="constant, of Muon; AdamW keeps --learning_rate")
    group.add_argument("--group_by_length", action="store_true",
                       help="batches of similar length: less padding, other batches than published")
    log = parser.add_argument_group("log")
    log.add_argument("--eval_freq", type=positive_int, default=50, metavar="N", help="updates between two log lines")
    log.add_argument("--eval_iter", type=positive_int, default=20, metavar="N",
                     help="batches of each set that a log line looks at")
    log.add_argument("--tensorboard", action="store_true", help="write the curve for TensorBoard, too")
    group = parser.add_argument_group("machine")
    group.add_argument("--accumulate", type=positive_int, default=1, metavar="N",
                       help="work through each batch in this many parts: less memory, the same update")
    group.add_argument("--device", default="auto", help="auto (CUDA, else MPS, else CPU), cpu, mps, cuda or cuda:1")
    group.add_argument("--precision", choices=["auto", "fp32", "tf32", "bf16"], default="auto",
                       help="of the arithmetic; auto: bf16 where the hardware has it natively, else fp32; "
                            "tf32: on CUDA only")
    group.add_argument("--compile", action="store_true", help="compile the model with torch.compile")
    group.add_argument("--checkpoint_minutes", type=positive_float, default=10, metavar="X",
                       help="minutes of training between two checkpoints; each epoch ends with one, too")
    group.add_argument("--resume", action="store_true", help="go on from the checkpoint in the run's folder")


def note(message):
    """Tell the reader something that is not part of the published log: on standard error."""
    print(message, file=sys.stderr, flush=True)


def voice():
    """The context of a script's work: one in which only one of several processes reports a failure."""
    if not under_torchrun():
        return nullcontext()
    from finetuning.distributed import one_voice  # imports torch, which not every script does
    return one_voice()


def run(main):
    """Run a script's `main()`; a user's error, a full disk or Ctrl-C ends in one line instead of a traceback."""
    signal.signal(signal.SIGTERM, raise_terminated)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for characters that a console's encoding lacks
    # The Hub's client reports every retry; how it ended is one line.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        with voice():
            main()
    except UserError as error:
        note(f"{sys.argv[0]}: {' '.join(str(error).split())}")
        sys.exit(2)
    except BrokenPipeError:
        # Whoever read the output, `head` for one, has seen enough; Python would complain again on flushing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + 13)
    except OSError as error:
        if error.errno not in DISK_TROUBLE:
            raise
        note(f"{sys.argv[0]}: {error.strerror}: {error.filename or 'while writing'}")
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        note(f"{sys.argv[0]}: out of memory")
        sys.exit(2)
    except KeyboardInterrupt as error:
        note(str(error) or "Interrupted.")
        sys.exit(exit_status(error))
