import pickle

import pytest
import torch
from conftest import TINY_CONFIGS, save_encoder

import train_bert_hf
from finetuning import checkpoint, records
from finetuning.errors import UserError
from finetuning.plots import CURVES


class Killed(Exception):
    """Stands for the power cut."""


@pytest.fixture
def command(data_dir, tmp_path, monkeypatch):
    """Arguments of a small run with dropout on, saving a checkpoint after every update."""
    save_encoder(tmp_path / "model", TINY_CONFIGS["bert"])
    monkeypatch.setattr(checkpoint, "SECONDS_BETWEEN_CHECKPOINTS", 0)
    monkeypatch.setattr(checkpoint, "SECONDS_WORTH_SAVING", 0)
    return ["--model", str(tmp_path / "model"), "--data_dir", str(data_dir), "--num_epochs", "2", "--eval_freq", "2",
            "--learning_rate", "1e-3", "--context_length", "24", "--precision", "fp32"]


def kill_after(monkeypatch, step):
    save = checkpoint.CheckpointWriter.save

    def save_and_die(self, progress):
        save(self, progress)
        if progress.step == step:
            raise Killed
    monkeypatch.setattr(checkpoint.CheckpointWriter, "save", save_and_die)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("step", [1, 4, 6, 9, 12])  # 6 and 12 end an epoch of 48 reviews
def test_an_interrupted_run_ends_in_the_same_numbers(command, tmp_path, monkeypatch, step, optimizer):
    command += ["--optimizer", optimizer]
    train_bert_hf.main([*command, "--output_dir", str(tmp_path / "whole")])
    with monkeypatch.context() as patch:
        kill_after(patch, step)
        with pytest.raises(Killed):
            train_bert_hf.main([*command, "--output_dir", str(tmp_path / "cut")])
    assert not (tmp_path / "cut" / records.RECORD).exists()
    torch.manual_seed(99)  # whatever happened in between
    train_bert_hf.main([*command, "--output_dir", str(tmp_path / "cut"), "--resume"])
    whole, cut = (records.read_record(tmp_path / run) for run in ("whole", "cut"))
    for key in ("losses", "curve", "epochs", "accuracy"):
        assert whole[key] == cut[key]
    predictions = [(tmp_path / run / records.PREDICTIONS).read_bytes() for run in ("whole", "cut")]
    assert predictions[0] == predictions[1]
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == [CURVES, records.RECORD, records.PREDICTIONS]


@pytest.fixture
def interrupted(command, tmp_path, monkeypatch):
    """A run's folder that holds a checkpoint, and the command that goes on from it."""
    command += ["--output_dir", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        kill_after(patch, 3)
        with pytest.raises(Killed):
            train_bert_hf.main(command)
    return tmp_path / "run" / checkpoint.CHECKPOINT, [*command, "--resume"]


def test_resume_without_a_checkpoint(command, tmp_path):
    with pytest.raises(UserError, match="there is no checkpoint"):
        train_bert_hf.main([*command, "--output_dir", str(tmp_path / "empty"), "--resume"])


def test_a_checkpoint_of_another_run_is_refused(interrupted):
    _, command = interrupted
    with pytest.raises(UserError, match="a run with other learning_rate, seed"):
        train_bert_hf.main([*command, "--seed", "7", "--learning_rate", "2e-3"])


def test_other_data_is_refused(interrupted, data_dir):
    _, command = interrupted
    with (data_dir / "train.csv").open("a") as file:
        file.write("one more,1\n")
    with pytest.raises(UserError, match=r"a run with other train\.csv"):
        train_bert_hf.main(command)


@pytest.mark.parametrize("kept", [0, 10, 1000, -10])
def test_a_truncated_checkpoint_is_refused(interrupted, kept):
    path, command = interrupted
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match="damaged"):
        train_bert_hf.main(command)


def test_loading_runs_no_code_from_the_file(interrupted, tmp_path):
    path, command = interrupted

    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))
    with path.open("wb") as file:
        pickle.dump({"identity": Bomb()}, file)
    with pytest.raises(UserError, match="damaged"):
        train_bert_hf.main(command)
    assert not (tmp_path / "exploded").exists()
