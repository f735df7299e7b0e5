"""Cases of invalid inputs of the train scripts, and the command lines that read them."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

import train_bert_hf
import train_gpt
import train_sklearn_logreg

SCRIPTS = {"gpt": train_gpt, "bert": train_bert_hf, "logreg": train_sklearn_logreg}
VALID_ARGUMENTS = {
    "gpt": ["--model_size", "gpt2-tiny (0M)", "--models_dir", "models", "--weights", "random"],
    "bert": ["--model", "model"],
    "logreg": [],
}
PRETRAINED = "--weights", "pretrained"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d" * 32 + b"\nsize 440449768\n"
TWO_REVIEWS = b"text,label\ngood,1\nbad,0\n"


class BadInput(NamedTuple):
    """An invalid input, prepared in a folder of valid ones, with the scripts to run and the expected message."""

    name: str
    message: str
    prepare: Callable[[Path], object] | None = None
    arguments: tuple = ()
    scripts: str = "bert"


def bad_csv(name, content, message, split="train", scripts="bert logreg"):
    """Return a case with an invalid CSV file, or without it if `content` is None."""

    def prepare(folder):
        path = folder / "data" / f"{split}.csv"
        path.unlink()
        if content is not None:
            path.write_bytes(content)

    return BadInput(name, message, prepare, scripts=scripts)


def bad_arguments(*arguments, message, scripts="gpt bert"):
    """Return a case with invalid arguments."""
    return BadInput(" ".join(arguments)[:40], message, arguments=arguments, scripts=scripts)


def bad_file(name, path, content, message, *arguments, scripts="bert", instead_of=None):
    """Return a case with an invalid file, or without it if `content` is None; `instead_of` is removed."""

    def prepare(folder):
        (folder / (instead_of or path)).unlink()
        if content is not None:
            (folder / path).write_bytes(content)

    return BadInput(name, message, prepare, arguments, scripts)


class Bomb:
    """Object that runs code when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("exploded",)


def parameters(cases):
    """Return the parameters (bad, script) of a test that runs each case with each of its scripts."""
    return [pytest.param(bad, script, id=f"{script}: {bad.name}") for bad in cases for script in bad.scripts.split()]


def command(script, arguments):
    """Return the arguments of a short run of a script on the valid inputs, with `arguments` last."""
    short = [] if script == "logreg" else ["--context_length", "24", "--max_steps", "2"]
    return [*VALID_ARGUMENTS[script], "--data_dir", "data", "--output_dir", "run", *short, *arguments]
