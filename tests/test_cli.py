import errno
import re
import subprocess
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, TINY_CONFIGS, save_encoder
from torch._inductor import config as inductor

import download_prepare_dataset
import predict
import reproduce
import train_bert_hf
import train_gpt
import train_sklearn_logreg
from benchmarks import growth, precision
from benchmarks import run as speed
from finetuning import cli
from finetuning.errors import UserError
from finetuning.experiment import memory_advice, memory_remedies
from finetuning.records import read_record

TRAINERS = [train_gpt, train_bert_hf, train_sklearn_logreg]
SCRIPTS = [download_prepare_dataset, *TRAINERS, predict, reproduce]


@pytest.mark.parametrize("script", TRAINERS)
def test_a_missing_csv(script, tmp_path, failing):
    message = failing(script.main, "--data_dir", tmp_path)
    assert f"python download_prepare_dataset.py --data_dir {tmp_path}" in message


@pytest.mark.parametrize("script", TRAINERS)
def test_a_csv_without_labels(script, data_dir, failing):
    (data_dir / "validation.csv").write_text("text,sentiment\ngood,1\n")
    assert "validation.csv has no column label" in failing(script.main, "--data_dir", data_dir)


@pytest.mark.parametrize("script", TRAINERS)
def test_a_label_that_is_neither_0_nor_1(script, data_dir, failing):
    (data_dir / "test.csv").write_text("text,label\ngood,1\nbad,-1\n")
    assert "review 2: label '-1' is neither 0 (negative) nor 1 (positive)" in failing(
        script.main, "--data_dir", data_dir)


def test_an_unknown_model(data_dir, failing):
    message = failing(train_bert_hf.main, "--model", "nonsense", "--data_dir", data_dir)
    assert "cannot load --model nonsense" in message
    assert "it is none of distilbert, bert, roberta" in message


def test_no_network_and_an_empty_cache(data_dir, failing, byte_tokenizer):
    assert "cannot load --model roberta" in failing(train_bert_hf.main, "--model", "roberta", "--data_dir", data_dir)
    assert "cannot get config.json of openai-community/gpt2 from the Hugging Face Hub" in failing(
        train_gpt.main, "--data_dir", data_dir)


@pytest.mark.parametrize(("script", "arguments", "message"), [
    (train_gpt, ["--model_size", "gpt2-tiny"], "invalid choice: 'gpt2-tiny'"),
    (train_gpt, ["--num_epochs", "0"], "must be 1 or more, not 0"),
    (train_gpt, ["--learning_rate", "-1"], "must be a number above 0, not -1"),
    (train_gpt, ["--learning_rate", "nan"], "must be a number above 0, not nan"),
    (train_gpt, ["--batch_size", "two"], "invalid whole number value: 'two'"),
    (train_gpt, ["--context_length", "long"], "invalid context length"),
    (train_gpt, ["--context_length", "0"], "must be 1 or more"),
    (train_gpt, ["--seed", "-1"], "must be between 0 and 4294967295"),
    (train_gpt, ["--trainable_layers", "none"], "invalid choice: 'none'"),
    (train_gpt, ["--trainable", "all"], "unrecognized arguments: --trainable all"),
    (train_bert_hf, ["--use_attention_mask", "maybe"], "invalid choice: 'maybe'"),
    (train_sklearn_logreg, ["--model", "bert"], "unrecognized arguments: --model bert"),
    (download_prepare_dataset, ["--split", "half"], "invalid choice: 'half'"),
])
def test_mistyped_arguments(script, arguments, message, failing):
    assert message in failing(script.main, *arguments)


@pytest.mark.parametrize(("arguments", "message"), [
    (["--device", "cuda:99"], "--device cuda:99 is not on this machine"),
    (["--device", "gpu"], "--device gpu is no device"),
    (["--batch_size", "49"], "--batch_size 49 is more than the 48 reviews"),
    (["--accumulate", "9"], "--batch_size 8 is too small for --accumulate 9: each part needs a review"),
    (["--context_length", "41"], "--context_length 41 is more than the 40 tokens"),
    (["--resume"], "there is no checkpoint"),
])
def test_impossible_runs(arguments, message, data_dir, tmp_path, capsys, monkeypatch):
    save_encoder(tmp_path / "model", TINY_CONFIGS["bert"])
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    command = ["train_bert_hf.py", "--model", str(tmp_path / "model"), "--data_dir", str(data_dir),
               "--context_length", "24", *arguments]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stopped:
        cli.run(train_bert_hf.main)
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert message in printed.err.splitlines()[-1]
    assert printed.out == ""
    assert not (tmp_path / "results").exists()


def test_an_output_folder_that_cannot_be_written(data_dir, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(sys, "argv", ["train_sklearn_logreg.py", "--data_dir", str(data_dir), "--output_dir",
                                      str(tmp_path / "file")])
    with pytest.raises(SystemExit) as stopped:
        cli.run(train_sklearn_logreg.main)
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.err.splitlines() == [
        f"train_sklearn_logreg.py: cannot write to --output_dir {tmp_path / 'file'}: File exists"]
    assert printed.out == ""  # said before the work, not after


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("Tried to allocate 2.00 GiB"), MemoryError(),
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
    RuntimeError("std::bad_alloc"), RuntimeError("could not create a primitive")]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=repr)
def test_running_out_of_memory_ends_in_advice(error, tiny_gpt, data_dir, tmp_path, capsys, monkeypatch):
    def train(*args, **kwargs):
        raise error
    monkeypatch.setattr("finetuning.experiment.train_classifier_simple", train)
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", "--model_size", tiny_gpt, "--weights", "random", "--data_dir",
                                      str(data_dir), "--output_dir", str(tmp_path / "run"), "--context_length", "16"])
    with pytest.raises(SystemExit) as stopped:
        cli.run(train_gpt.main)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "train_gpt.py: out of memory in training; try --accumulate 2 or a shorter --context_length")


@pytest.mark.parametrize("error", [
    RuntimeError("could not create a primitive descriptor for a matmul primitive"),
    torch.AcceleratorError("CUDA error: device-side assert triggered"), OSError(errno.ENOENT, "No such file"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"), UserError("out of memory")], ids=repr)
def test_other_errors_stay_what_they_are(error):
    with pytest.raises(type(error)) as raised, memory_advice():
        raise error
    assert raised.value is error


@pytest.mark.parametrize(("batch_size", "accumulate", "layers", "resume", "processes", "advice"), [
    (8, 1, "all", False, 1, ["--accumulate 2", "a shorter --context_length", "--trainable_layers last_block"]),
    (8, 3, "last_block", False, 1, ["--accumulate 6", "a shorter --context_length"]),
    (8, 6, "last_block", False, 1, ["--accumulate 8", "a shorter --context_length"]),  # 16 would be refused
    (8, 8, "last_block", False, 1, ["a shorter --context_length", "a smaller model"]),  # there is nothing to cut
    (8, 1, "last_block", False, 8, ["a shorter --context_length", "a smaller model"]),
    (8, 1, "all", True, 1, ["--accumulate 2"]), (1, 1, "all", True, 1, ["a device with more memory"])])
def test_advice_about_memory_is_advice_that_can_help(batch_size, accumulate, layers, resume, processes, advice,
                                                     monkeypatch):
    monkeypatch.setattr("finetuning.distributed.size", lambda: processes)
    assert memory_remedies(Namespace(batch_size=batch_size, accumulate=accumulate, trainable_layers=layers,
                                     resume=resume)) == advice


def test_a_model_that_does_not_fit_is_told_from_a_batch_that_does_not(failing, tiny_gpt, data_dir, monkeypatch):
    def too_large(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(train_gpt.GPTClassifier, "to", too_large)
    monkeypatch.setattr("finetuning.experiment.note", lambda message: None)
    assert failing(train_gpt.main, "--model_size", tiny_gpt, "--weights", "random", "--data_dir", data_dir,
                   "--context_length", "16", "--output_dir", data_dir / "run") == (
        "script.py: out of memory before training; try a smaller model or a device with more memory")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, when it imports its compiler
def test_a_missing_compiler_is_noticed_before_anything_is_downloaded(data_dir, tmp_path, failing, monkeypatch):
    monkeypatch.setattr(train_gpt, "load_config", lambda size: pytest.fail("too late"))
    with inductor.patch({"cpp.cxx": (None, str(tmp_path / "no-compiler"))}):
        message = failing(train_gpt.main, "--compile", "--device", "cpu", "--data_dir", data_dir,
                          "--output_dir", tmp_path / "run")
    assert "--compile does not work on this machine: InvalidCxxCompiler: No working C++ compiler found" in message
    assert message.endswith("; install a C++ compiler, which CXX may name, or leave out --compile")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", [*SCRIPTS, reproduce])
def test_help_fits_two_screens_and_shows_every_default(script, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stopped:
        script.main(["--help"])
    assert stopped.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 100
    assert max(map(len, lines)) <= 80
    flags = re.split(r"\n  (?=-)", "\n".join(lines))[1:]
    without = [flag.split()[0] for flag in flags if "default: " not in " ".join(flag.split())]
    assert without == (["-h,", "--compare"] if script is reproduce else ["-h,"])  # comparing is what it does, or not


@pytest.mark.parametrize("script", [train_gpt, train_bert_hf])
def test_help_comes_in_groups(script, capsys):
    with pytest.raises(SystemExit):
        script.main(["--help"])
    headings = re.findall(r"^(\w+):$", capsys.readouterr().out, re.MULTILINE)
    assert headings == ["options", "model", "training", "log", "machine", "run"]


def test_a_real_process_ends_in_one_line_and_status_2(tmp_path):
    done = subprocess.run([sys.executable, "train_sklearn_logreg.py", "--data_dir", str(tmp_path)], cwd=REPOSITORY,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("train_sklearn_logreg.py: cannot find ")


def test_a_bug_keeps_its_traceback():
    def broken():
        raise KeyError("bug")
    with pytest.raises(KeyError):
        cli.run(broken)


def test_ctrl_c_is_one_line(capsys):
    def interrupted():
        raise KeyboardInterrupt
    with pytest.raises(SystemExit) as stopped:
        cli.run(interrupted)
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "Interrupted.\n"


def test_the_command_is_kept_for_the_record(monkeypatch):
    args = train_gpt.parse_args(["--model_size", "gpt2-xl (1558M)"])
    assert args.command.endswith(" --model_size 'gpt2-xl (1558M)'")


def flags_of(script, monkeypatch):
    """The flags and other arguments of a script, as argparse knows them."""
    class Parsed(Exception):
        pass

    def stop(parser, *_, **__):
        raise Parsed(parser._actions)
    for method in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(cli.ArgumentParser, method, stop)
    with pytest.raises(Parsed) as parsed:
        script.parse_args([])
    return {action.dest: action for action in parsed.value.args[0]}


@pytest.mark.parametrize("script", [*SCRIPTS, growth, precision, speed])
def test_the_home_folder_is_found_in_every_path(script, monkeypatch):
    """In `--data_dir=~/reviews` the shell leaves the "~" as it is."""
    monkeypatch.setenv("HOME", "/home/of/mine")
    monkeypatch.setenv("USERPROFILE", "/home/of/mine")
    paths = [action for action in flags_of(script, monkeypatch).values()
             if action.nargs != 0 and action.choices is None
             and re.search(r"folder|file|archive", f"{action.dest} {action.help}")]
    assert paths
    for action in paths:
        if action.dest != "model_size":  # which is checked at once
            assert action.type("~/a b") == "/home/of/mine/a b", action.dest
            assert action.type("https://host/~someone/a.tar.gz") == "https://host/~someone/a.tar.gz"


def test_the_home_folder_is_found_and_the_command_stays_as_typed(data_dir, tmp_path, monkeypatch, tiny_gpt):
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
