import errno
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from helpers import tiny_gpt_flags

import train_gpt
from finetuning import cli
from finetuning.checkpoint import CHECKPOINT, PREVIOUS
from finetuning.hints import memory_remedies, out_of_memory_hint, resume_command, resume_hint
from finetuning.system.errors import UserError


@pytest.mark.parametrize("name", [CHECKPOINT, PREVIOUS])
@pytest.mark.parametrize("command", ["python train.py --seed 7", "python train.py --seed 7 --resume"])
def test_resume_hint_adds_the_command_if_there_is_a_checkpoint(name, command, tmp_path):
    (tmp_path / name).touch()
    with (
        pytest.raises(KeyboardInterrupt, match=r"^Interrupted; to resume: python train\.py --seed 7 --resume$"),
        resume_hint(tmp_path, command),
    ):
        raise KeyboardInterrupt


def test_resume_command_names_the_script_as_it_was_started(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scripts/train.py", "--seed", "7"])
    assert resume_command("python train.py --seed 7") == "python scripts/train.py --seed 7 --resume"


def test_resume_command_quotes_as_the_systems_shell_needs_it(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    command = "python train.py --model_size 'gpt2-medium (355M)'"
    assert resume_command(command) == f"{command} --resume"
    monkeypatch.setattr("finetuning.hints.WINDOWS", True)
    assert resume_command(command) == 'python train.py --model_size "gpt2-medium (355M)" --resume'


def test_resume_command_of_several_nodes_names_the_users_own_command(monkeypatch):
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    assert resume_command("torchrun --nproc_per_node 4 train.py") == (
        "start the same torchrun command on every node, with --resume added"
    )


def test_resume_hint_adds_nothing_without_a_checkpoint(tmp_path):
    with pytest.raises(KeyboardInterrupt) as raised, resume_hint(tmp_path, "python train.py"):
        raise KeyboardInterrupt
    assert raised.value.args == ()


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("Tried to allocate 2.00 GiB"),
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    np._core._exceptions._ArrayMemoryError((2**40,), np.dtype("float32")),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    RuntimeError("MPS backend out of memory (MPS allocated: 8.02 GB, max allowed: 9.07 GB)"),
    RuntimeError("Invalid buffer size: 24.00 GB"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4294967296 bytes"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4294967296 bytes"),
    RuntimeError("std::bad_alloc"),
    RuntimeError("could not create a primitive"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=repr)
def test_out_of_memory_error_ends_in_advice(error, tiny_gpt, data_dir, tmp_path, capsys, monkeypatch):
    def train(*args, **kwargs):
        raise error

    monkeypatch.setattr("finetuning.experiment.train_classifier", train)
    monkeypatch.setattr(
        sys,
        "argv",
        ["train_gpt.py", *tiny_gpt_flags(tiny_gpt, data_dir, tmp_path / "run")],
    )
    with pytest.raises(SystemExit) as exit_info:
        cli.run_main(train_gpt.main)
    assert exit_info.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "train_gpt.py: out of memory in training; try --micro_batch_size 4 or a shorter --context_length"
    )


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("could not create a primitive descriptor for a matmul primitive"),
        torch.AcceleratorError("CUDA error: device-side assert triggered"),
        OSError(errno.ENOENT, "No such file"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"),
        UserError("out of memory"),
    ],
    ids=repr,
)
def test_out_of_memory_hint_passes_other_errors_through(error):
    with pytest.raises(type(error)) as raised, out_of_memory_hint():
        raise error
    assert raised.value is error


@pytest.mark.parametrize(
    ("batch_size", "micro_batch_size", "layers", "resume", "processes", "advice"),
    [
        (
            8,
            None,
            "all",
            False,
            1,
            ["--micro_batch_size 4", "a shorter --context_length", "--trainable_layers last_block"],
        ),
        (8, 4, "last_block", False, 1, ["--micro_batch_size 2", "a shorter --context_length"]),
        (8, 3, "last_block", False, 1, ["--micro_batch_size 1", "a shorter --context_length"]),
        (8, 99, "last_block", False, 1, ["--micro_batch_size 4", "a shorter --context_length"]),
        (8, None, "last_block", False, 2, ["--micro_batch_size 2", "a shorter --context_length"]),
        (8, 1, "last_block", False, 1, ["a shorter --context_length", "a smaller model"]),
        (8, None, "last_block", False, 8, ["a shorter --context_length", "a smaller model"]),
        (8, None, "all", True, 1, ["--micro_batch_size 4"]),
        (1, None, "all", True, 1, ["a device with more memory"]),
    ],
)
def test_memory_remedies_are_those_still_possible(
    batch_size, micro_batch_size, layers, resume, processes, advice, monkeypatch
):
    monkeypatch.setattr("finetuning.performance.distributed.world_size", lambda: processes)
    args = Namespace(batch_size=batch_size, micro_batch_size=micro_batch_size, trainable_layers=layers, resume=resume)
    assert memory_remedies(args) == advice


def test_model_that_does_not_fit_is_told_apart_from_a_batch(failing, tiny_gpt, data_dir, monkeypatch):
    def too_large(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train_gpt.GPTClassifier, "to", too_large)
    monkeypatch.setattr("finetuning.experiment.print_status", lambda message: None)
    assert failing(train_gpt.main, *tiny_gpt_flags(tiny_gpt, data_dir, data_dir / "run")) == (
        "script.py: out of memory before training; try a smaller model or a device with more memory"
    )
