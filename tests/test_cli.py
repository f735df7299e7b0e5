import errno
import re
import subprocess
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from helpers import REPOSITORY, flags, tiny_gpt_flags
from tiny_models import TINY_CONFIGS, save_encoder
from torch._inductor import config as inductor

import download_prepare_dataset
import predict
import reproduce
import train_bert_hf
import train_gpt
import train_sklearn_logreg
from benchmarks import bf16_accuracy, scaling, speed
from finetuning import cli
from finetuning.hints import memory_remedies, out_of_memory_hint
from finetuning.reporting.records import read_record
from finetuning.system.errors import UserError

TRAINERS = [train_gpt, train_bert_hf, train_sklearn_logreg]
SCRIPTS = [download_prepare_dataset, *TRAINERS, predict, reproduce]


@pytest.mark.parametrize("script", TRAINERS)
def test_missing_csv_names_the_command_that_writes_it(script, tmp_path, failing):
    message = failing(script.main, "--data_dir", tmp_path)
    assert f"python download_prepare_dataset.py --data_dir {tmp_path}" in message


@pytest.mark.parametrize("script", TRAINERS)
def test_csv_without_label_column_is_reported(script, data_dir, failing):
    (data_dir / "validation.csv").write_text("text,sentiment\ngood,1\n")
    assert "validation.csv has no column label" in failing(script.main, "--data_dir", data_dir)


@pytest.mark.parametrize("script", TRAINERS)
def test_invalid_label_is_reported(script, data_dir, failing):
    (data_dir / "test.csv").write_text("text,label\ngood,1\nbad,-1\n")
    assert "review 2: label '-1' is neither 0 (negative) nor 1 (positive)" in failing(
        script.main, "--data_dir", data_dir
    )


def test_unknown_model_is_reported_with_the_known_ones(data_dir, failing):
    message = failing(train_bert_hf.main, "--model", "nonsense", "--data_dir", data_dir)
    assert "cannot load --model nonsense" in message
    assert "it is none of distilbert, bert, roberta" in message


def test_missing_cache_without_network_is_reported(data_dir, failing, byte_tokenizer):
    assert "cannot load --model roberta" in failing(train_bert_hf.main, "--model", "roberta", "--data_dir", data_dir)
    assert "cannot get config.json of openai-community/gpt2 from the Hugging Face Hub" in failing(
        train_gpt.main, "--data_dir", data_dir
    )


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (train_gpt, ["--model_size", "gpt2-tiny"], "invalid choice: 'gpt2-tiny'"),
        (train_gpt, ["--num_epochs", "0"], "argument --num_epochs: must be a whole number of 1 or more, not '0'"),
        (train_gpt, ["--learning_rate", "-1"], "argument --learning_rate: must be a number above 0, not '-1'"),
        (train_gpt, ["--learning_rate", "nan"], "must be a number above 0, not 'nan'"),
        (train_gpt, ["--batch_size", "two"], "must be a whole number of 1 or more, not 'two'"),
        (train_gpt, ["--context_length", "long"], "or model_context_length, not 'long'"),
        (train_gpt, ["--context_length", "0"], "argument --context_length: must be a whole number of 1 or more"),
        (train_gpt, ["--seed", "-1"], "must be a whole number between 0 and 4294967295, not '-1'"),
        (train_gpt, ["--trainable_layers", "none"], "invalid choice: 'none'"),
        (train_gpt, ["--trainable", "all"], "unrecognized arguments: --trainable all"),
        (train_bert_hf, ["--use_attention_mask", "maybe"], "invalid choice: 'maybe'"),
        (train_sklearn_logreg, ["--model", "bert"], "unrecognized arguments: --model bert"),
        (download_prepare_dataset, ["--split", "half"], "invalid choice: 'half'"),
    ],
)
def test_invalid_arguments_are_reported(script, arguments, message, failing):
    assert message in failing(script.main, *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cuda:99"], "--device cuda:99 is not on this machine"),
        (["--device", "gpu"], "--device gpu is not a device"),
        (["--batch_size", "49"], "--batch_size 49 is more than the 48 reviews"),
        (["--micro_batch_size", "0"], "argument --micro_batch_size: must be a whole number of 1 or more, not '0'"),
        (["--context_length", "41"], "--context_length 41 is more than the 40 tokens"),
        (["--resume"], "there is no checkpoint"),
    ],
)
def test_impossible_run_is_reported_before_it_starts(arguments, message, data_dir, tmp_path, capsys, monkeypatch):
    save_encoder(tmp_path / "model", TINY_CONFIGS["bert"])
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    command = [
        "train_bert_hf.py",
        *flags(model=tmp_path / "model", data_dir=data_dir, context_length=24),
        *arguments,
    ]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as exit_info:
        cli.run_main(train_bert_hf.main)
    assert exit_info.value.code == 2
    printed = capsys.readouterr()
    assert message in printed.err.splitlines()[-1]
    assert printed.out == ""
    assert not (tmp_path / "results").exists()


def test_unwritable_output_folder_is_reported_before_the_run(data_dir, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("a file")
    monkeypatch.setattr(
        sys, "argv", ["train_sklearn_logreg.py", "--data_dir", str(data_dir), "--output_dir", str(tmp_path / "file")]
    )
    with pytest.raises(SystemExit) as exit_info:
        cli.run_main(train_sklearn_logreg.main)
    assert exit_info.value.code == 2
    printed = capsys.readouterr()
    assert printed.err.splitlines() == [
        f"train_sklearn_logreg.py: cannot write to --output_dir {tmp_path / 'file'}: File exists"
    ]
    assert printed.out == ""


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


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised by the imports of PyTorch's compiler
def test_missing_compiler_is_reported_before_anything_is_downloaded(data_dir, tmp_path, failing, monkeypatch):
    monkeypatch.setattr(train_gpt, "load_config", lambda size: pytest.fail("too late"))
    torch._dynamo.reset()  # forgets what other tests have compiled
    with inductor.patch({"cpp.cxx": (None, str(tmp_path / "no-compiler")), "force_disable_caches": True}):
        message = failing(
            train_gpt.main, "--compile", "--device", "cpu", "--data_dir", data_dir, "--output_dir", tmp_path / "run"
        )
    assert "--compile does not work on this machine: InvalidCxxCompiler: No working C++ compiler found" in message
    assert message.endswith("; install a C++ compiler (or set CXX), or leave out --compile")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", [*SCRIPTS, reproduce])
def test_help_fits_two_screens_and_shows_every_default(script, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as exit_info:
        script.main(["--help"])
    assert exit_info.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 100
    assert max(map(len, lines)) <= 80
    flags = re.split(r"\n  (?=-)", "\n".join(lines))[1:]
    without_default = [flag.split()[0] for flag in flags if "default: " not in " ".join(flag.split())]
    # These three choose what to do and act on the named files: without them, nothing is done by default.
    without_default.remove("-h,")
    assert without_default == (["--compare", "--csv", "--verify"] if script is reproduce else [])


@pytest.mark.parametrize("script", [train_gpt, train_bert_hf])
def test_help_is_grouped(script, capsys):
    with pytest.raises(SystemExit):
        script.main(["--help"])
    headings = re.findall(r"^(\w+):$", capsys.readouterr().out, re.MULTILINE)
    assert headings == ["options", "model", "training", "logging", "hardware", "run"]


def test_process_ends_with_one_line_and_status_2(tmp_path):
    process = subprocess.run(
        [sys.executable, "train_sklearn_logreg.py", "--data_dir", str(tmp_path)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 2
    assert process.stdout == ""
    assert len(process.stderr.splitlines()) == 1
    assert process.stderr.startswith("train_sklearn_logreg.py: cannot find ")


def test_run_main_keeps_the_traceback_of_a_bug():
    def broken():
        raise KeyError("bug")

    with pytest.raises(KeyError):
        cli.run_main(broken)


def test_run_main_reports_ctrl_c_in_one_line(capsys):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as exit_info:
        cli.run_main(interrupted)
    assert exit_info.value.code == 130
    assert capsys.readouterr().err == "Interrupted.\n"


def test_parse_args_stores_the_quoted_command(monkeypatch):
    args = train_gpt.parse_args(["--model_size", "gpt2-xl (1558M)"])
    assert args.command.endswith(" --model_size 'gpt2-xl (1558M)'")


def actions_of(script, monkeypatch):
    """Return {dest: argparse action} of a script."""

    class Parsed(Exception):
        """Carries the parser's actions out of the script."""

    def stop(parser, *_, **__):
        raise Parsed(parser._actions)

    for method in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(cli.ArgumentParser, method, stop)
    with pytest.raises(Parsed) as parsed:
        script.parse_args([])
    return {action.dest: action for action in parsed.value.args[0]}


@pytest.mark.parametrize("script", [*SCRIPTS, scaling, bf16_accuracy, speed])
def test_every_path_argument_expands_the_home_folder(script, monkeypatch):
    """In `--data_dir=~/reviews` the shell does not expand the "~"."""
    monkeypatch.setenv("HOME", "/home/user")
    monkeypatch.setenv("USERPROFILE", "/home/user")
    path_actions = [
        action
        for action in actions_of(script, monkeypatch).values()
        if action.nargs != 0
        and action.choices is None
        and re.search(r"folder|file|archive", f"{action.dest} {action.help}")
    ]
    assert path_actions
    for action in path_actions:
        if action.dest != "model_size":  # its type also checks the value
            assert action.type("~/a b") == "/home/user/a b", action.dest
            assert action.type("https://host/~someone/a.tar.gz") == "https://host/~someone/a.tar.gz"


def test_home_folder_is_expanded_but_the_recorded_command_is_as_typed(data_dir, tmp_path, monkeypatch, tiny_gpt):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(data_dir)
    train_sklearn_logreg.main(["--data_dir=~", "--output_dir=~/runs/a"])
    record = read_record(tmp_path / "runs" / "a")
    assert record["arguments"]["output_dir"] == str(tmp_path / "runs" / "a")
    assert record["command"].endswith(" '--data_dir=~' '--output_dir=~/runs/a'")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    assert train_gpt.parse_args(["--model_size=~/model"]).model_size == str(tmp_path / "model")
