import errno
import hashlib
import pickle
from pathlib import Path

import pytest
import torch
from helpers import Killed, assert_same_results, kill_after_step

import train_bert_hf
from finetuning import checkpoint
from finetuning.reporting import records
from finetuning.reporting.plots import CURVES
from finetuning.system.errors import UserError


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("step", [1, 4, 6, 9, 12])  # 6 and 12 end an epoch of 48 reviews
def test_resumed_run_has_the_results_of_an_uninterrupted_run(resumable_command, tmp_path, monkeypatch, step, optimizer):
    resumable_command += ["--optimizer", optimizer]
    train_bert_hf.main([*resumable_command, "--output_dir", str(tmp_path / "uninterrupted")])
    with monkeypatch.context() as patch:
        kill_after_step(patch, step)
        with pytest.raises(Killed):
            train_bert_hf.main([*resumable_command, "--output_dir", str(tmp_path / "interrupted")])
    assert not (tmp_path / "interrupted" / records.RECORD).exists()
    torch.manual_seed(99)  # another random state
    train_bert_hf.main([*resumable_command, "--output_dir", str(tmp_path / "interrupted"), "--resume"])
    assert_same_results(tmp_path / "interrupted", tmp_path / "uninterrupted")
    assert sorted(path.name for path in (tmp_path / "interrupted").iterdir()) == [
        CURVES,
        records.RECORD,
        records.PREDICTIONS,
    ]


@pytest.mark.parametrize("minutes", ["1e-9", "60"])
def test_checkpoints_are_saved_at_the_interval_and_after_each_epoch(resumable_command, tmp_path, monkeypatch, minutes):
    steps = []
    save = checkpoint.Checkpointer.save
    monkeypatch.setattr(
        checkpoint.Checkpointer, "save", lambda self, state: (steps.append(state.step), save(self, state))
    )
    train_bert_hf.main([*resumable_command, "--checkpoint_minutes", minutes, "--output_dir", str(tmp_path / "run")])
    assert steps == ([6, 12] if minutes == "60" else list(range(1, 13)))


def test_checkpoint_holds_buffers_and_trainable_weights():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    model[0].requires_grad_(False)
    names = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    assert [*checkpoint.state_dict_without_frozen(model)] == [f"1.{name}" for name in names]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised by the imports of PyTorch's compiler
@pytest.mark.parametrize("changed", [["--micro_batch_size", "4"], ["--compile"], ["--device", "cpu"]])
def test_resume_may_change_arguments_that_do_not_change_the_results(
    changed, interrupted, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)
    *_, command = interrupted
    train_bert_hf.main([*command, *changed])
    assert len(records.read_record(tmp_path / "run")["losses"]) == 12
    assert "Precision: fp32 (that of the checkpoint)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:1000],
        lambda content: content[:-10],
        lambda content: content[:5000] + bytes([content[5000] ^ 1]) + content[5001:],
        lambda content: bytes([content[0] ^ 1]) + content[1:],  # in the digest
    ],
)
def test_resume_falls_back_to_previous_checkpoint_if_the_newest_is_damaged(interrupted, damage, capsys):
    newest, previous, resume = interrupted
    newest.write_bytes(damage(newest.read_bytes()))
    intact = previous.read_bytes()
    previous.write_bytes(damage(intact))
    with pytest.raises(UserError, match=r"checkpoint\.pt and .*checkpoint\.previous\.pt: damaged"):
        train_bert_hf.main(resume)
    previous.write_bytes(intact)
    train_bert_hf.main(resume)
    assert (
        f"{newest} is damaged or missing; resuming from the previous checkpoint, of step 2" in capsys.readouterr().err
    )


def test_resume_falls_back_to_previous_checkpoint_if_the_newest_cannot_be_read(interrupted, monkeypatch, capsys):
    """A bad sector makes reading fail."""
    newest, _, resume = interrupted
    load = torch.load

    def load_from_failing_disk(file, **settings):
        if Path(file.name) == newest:
            raise OSError(errno.EIO, "Input/output error")
        return load(file, **settings)

    monkeypatch.setattr(torch, "load", load_from_failing_disk)
    train_bert_hf.main(resume)
    assert "resuming from the previous checkpoint, of step 2" in capsys.readouterr().err


def test_resume_from_previous_checkpoint_does_not_overwrite_it(interrupted, tmp_path, monkeypatch):
    """Killed again while the next checkpoint is renamed into place, the run still has one."""
    newest, previous, command = interrupted
    newest.write_bytes(b"damaged")
    intact = previous.read_bytes()
    replace = checkpoint.os.replace

    def die_after_moving_the_old_one(source, target):
        replace(source, target)
        if target == previous:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "replace", die_after_moving_the_old_one)
        with pytest.raises(Killed):
            train_bert_hf.main(command)
    assert previous.read_bytes() == intact
    train_bert_hf.main(command)
    train_bert_hf.main([*command[:-2], str(tmp_path / "uninterrupted")])
    assert_same_results(tmp_path / "run", tmp_path / "uninterrupted")


def test_resume_executes_no_code_from_the_checkpoint(interrupted, tmp_path):
    newest, previous, command = interrupted

    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    content = checkpoint.read_checkpoint(newest)
    for path in (newest, previous):
        checkpoint.write_checkpoint(content | {"fingerprint": Bomb()}, path)
    with pytest.raises(UserError, match="damaged"):
        train_bert_hf.main(command)
    assert not (tmp_path / "exploded").exists()
    with newest.open("rb") as file, pytest.raises(pickle.UnpicklingError):  # the reason is the code, not the digest
        file.seek(checkpoint.DIGEST_BYTES)
        torch.load(file, weights_only=True)
    assert hashlib.sha256(newest.read_bytes()[32:]).digest() == newest.read_bytes()[:32]


def test_nan_loss_stops_the_run_and_keeps_the_checkpoint(resumable_command, tmp_path):
    """The first step is far too large: the loss before it is finite, the next one is not."""
    resumable_command += ["--learning_rate", "1e30", "--output_dir", str(tmp_path / "run")]
    with pytest.raises(UserError, match="the training loss is nan at step 1; start again with a lower"):
        train_bert_hf.main(resumable_command)
    newest, previous = checkpoint.checkpoint_paths(tmp_path / "run")
    assert checkpoint.read_checkpoint(newest)["train_state"]["step"] == 1
    assert not previous.exists()


def test_run_continues_if_a_checkpoint_is_too_large_for_the_file_system(
    resumable_command, tmp_path, monkeypatch, capsys
):
    def refuse(content, path):
        raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr(checkpoint, "write_checkpoint", refuse)
    train_bert_hf.main([*resumable_command, "--output_dir", str(tmp_path / "run")])
    assert len(records.read_record(tmp_path / "run")["losses"]) == 12
    message = f"Could not save a checkpoint after step 12: cannot write to {tmp_path / 'run'}: File too large"
    assert message in capsys.readouterr().err


def test_non_finite_weights_are_not_saved(resumable_command, tmp_path, monkeypatch):
    """The loss of the fifth step is finite; the weights after it are not."""
    calls = []
    step = torch.optim.AdamW.step

    def break_weights(self, *args, **kwargs):
        step(self, *args, **kwargs)
        calls.append(1)
        if len(calls) == 5:
            self.param_groups[0]["params"][0].data[0] = float("nan")

    monkeypatch.setattr(torch.optim.AdamW, "step", break_weights)
    with pytest.raises(UserError, match="non-finite weights after step 5"):
        train_bert_hf.main([*resumable_command, "--output_dir", str(tmp_path / "run")])
    assert checkpoint.read_checkpoint(tmp_path / "run" / checkpoint.CHECKPOINT)["train_state"]["step"] == 4
