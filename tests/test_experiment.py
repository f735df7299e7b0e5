import sys

import pytest
from helpers import Killed, flags, kill_after_step
from tiny_models import CPU, TINY_CONFIGS, save_encoder

import train_bert_hf
from finetuning import checkpoint, cli
from finetuning.experiment import check_batch_size, select_precision
from finetuning.performance import device, distributed
from finetuning.reporting import records
from finetuning.system.errors import UserError


def test_batch_size_is_at_least_the_processes_and_at_most_the_reviews(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    check_batch_size(4, num_reviews=4)
    with pytest.raises(UserError, match="--batch_size 5 is more than the 4 reviews of the training set"):
        check_batch_size(5, num_reviews=4)
    with pytest.raises(UserError, match="--batch_size 3 is less than the 4 processes"):
        check_batch_size(3, num_reviews=4)


def test_select_precision_compares_that_of_the_checkpoint(monkeypatch):
    monkeypatch.setattr(device, "cpu_flags", lambda: {"avx512_bf16"})
    checkpoint = {"precision": "fp32", "train_state": {"step": 7}}
    assert select_precision("auto", CPU, checkpoint) == ("fp32", "that of the checkpoint")
    assert select_precision("fp32", CPU, checkpoint) == ("fp32", "that of the checkpoint")
    assert select_precision("fp32", CPU, None) == ("fp32", "as requested")
    assert select_precision("bf16", CPU, checkpoint) == (
        "bf16",
        "as requested; fp32 up to step 7: the numbers differ from those of an uninterrupted run",
    )


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


def test_resume_with_another_precision_is_reported_and_recorded(interrupted, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(device, "cpu_flags", lambda: {"avx512_bf16"})
    *_, command = interrupted
    reason = "as requested; fp32 up to step 3: the numbers differ from those of an uninterrupted run"
    train_bert_hf.main([*command, "--precision", "bf16"])
    assert f"Precision: bf16 ({reason})" in capsys.readouterr().err
    assert records.read_record(tmp_path / "run")["precision"] == {"dtype": "bf16", "reason": reason}


def test_resume_with_auto_precision_keeps_that_of_the_checkpoint(interrupted, monkeypatch, capsys):
    newest, _, command = interrupted
    monkeypatch.setattr(device, "cpu_flags", lambda: {"avx2"})
    checkpoint.write_checkpoint(checkpoint.read_checkpoint(newest) | {"precision": "bf16"}, newest)
    train_bert_hf.main([*command, "--precision", "auto"])
    assert (
        "Precision: bf16 (that of the checkpoint; this CPU emulates bf16, which is slower than fp32"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("first", "resumed"),
    [([], ["--precision", "fp32"]), (["--precision", "fp32"], []), (["--precision", "bf16"], ["--precision", "fp32"])],
)
def test_resume_finds_the_folder_of_the_run_in_another_precision(
    first, resumed, resumable_command, tmp_path, monkeypatch
):
    """The name of the default folder contains the precision."""
    monkeypatch.chdir(tmp_path)
    resumable_command = [argument for argument in resumable_command if argument not in ("--precision", "fp32")]
    with monkeypatch.context() as patch:
        kill_after_step(patch, 3)
        with pytest.raises(Killed):
            train_bert_hf.main([*resumable_command, *first])
    (folder,) = (tmp_path / "results").iterdir()
    train_bert_hf.main([*resumable_command, *resumed, "--resume"])
    assert list((tmp_path / "results").iterdir()) == [folder]
    assert records.read_record(folder)["name"] == folder.name
