"""Runs that --resume refuses."""

import shutil

import pytest
from bad_inputs import POINTER, BadInput, Bomb, parameters
from helpers import Killed, kill_after_step
from safetensors.torch import load_file, save_file
from tiny_models import TINY_CONFIGS, save_encoder

import train_bert_hf
from finetuning import checkpoint
from finetuning.system.errors import UserError


def test_resume_without_checkpoint_raises(resumable_command, tmp_path):
    with pytest.raises(UserError, match="there is no checkpoint"):
        train_bert_hf.main([*resumable_command, "--output_dir", str(tmp_path / "empty"), "--resume"])
    assert not (tmp_path / "empty").exists()


def test_run_without_resume_does_not_overwrite_a_checkpoint(interrupted):
    newest, _, command = interrupted
    before = newest.read_bytes()
    with pytest.raises(UserError, match="add --resume, or delete it to start again"):
        train_bert_hf.main(command[:-1])
    assert newest.read_bytes() == before


def test_resume_with_other_arguments_raises(interrupted):
    *_, command = interrupted
    with pytest.raises(UserError, match="a run with other learning_rate, seed"):
        train_bert_hf.main([*command, "--seed", "7", "--learning_rate", "2e-3"])


def test_resume_with_other_data_raises(interrupted, data_dir):
    *_, command = interrupted
    with (data_dir / "train.csv").open("a") as file:
        file.write("one more,1\n")
    with pytest.raises(UserError, match=r"a run with other train\.csv"):
        train_bert_hf.main(command)


def test_resume_with_another_model_of_the_same_name_raises(interrupted, tmp_path):
    *_, command = interrupted
    shutil.rmtree(tmp_path / "model")
    save_encoder(tmp_path / "model", TINY_CONFIGS["distilbert"])
    with pytest.raises(UserError, match="the checkpoint belongs to another model"):
        train_bert_hf.main(command)


@pytest.mark.parametrize("trainable_layers", ["last_block", "last_layer"])
def test_resume_with_other_frozen_weights_raises(resumable_command, tmp_path, monkeypatch, trainable_layers):
    resumable_command += ["--trainable_layers", trainable_layers, "--output_dir", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        kill_after_step(patch, 3)
        with pytest.raises(Killed):
            train_bert_hf.main(resumable_command)
    weights = tmp_path / "model" / "model.safetensors"
    tensors = load_file(weights)
    tensors["bert.encoder.layer.0.output.dense.bias"] += 0.01
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match="the checkpoint belongs to a run with other frozen weights"):
        train_bert_hf.main([*resumable_command, "--resume"])


def test_resume_on_another_type_of_device_raises(interrupted):
    newest, _, command = interrupted
    content = checkpoint.read_checkpoint(newest)
    checkpoint.write_checkpoint(content | {"device": "cuda"}, newest)
    with pytest.raises(UserError, match="the run started on cuda"):
        train_bert_hf.main(command)


def leftover_checkpoint(name, message, content, *arguments):
    """Return a case with a checkpoint of an earlier run in the output folder."""

    def prepare(folder):
        (folder / "run").mkdir()
        if callable(content):
            checkpoint.write_checkpoint(content(), folder / "run" / checkpoint.CHECKPOINT)
        else:
            (folder / "run" / checkpoint.CHECKPOINT).write_bytes(content)

    return BadInput(name, message, prepare, arguments or ("--resume",))


def other_run():
    """Return the content of a checkpoint of another run."""
    return {key: {} for key in checkpoint.KEYS} | {"fingerprint": {"seed": 7}}


CASES = [
    leftover_checkpoint("a Git LFS pointer for a checkpoint", "run/checkpoint.pt is a Git LFS pointer", POINTER),
    leftover_checkpoint("an empty checkpoint", "run/checkpoint.pt: damaged, or not a checkpoint of this version", b""),
    leftover_checkpoint("a checkpoint of random bytes", "run/checkpoint.pt: damaged", bytes(range(256)) * 100),
    leftover_checkpoint("a checkpoint of another program", "run/checkpoint.pt: damaged", lambda: {"model": {}}),
    leftover_checkpoint(
        "a checkpoint that runs code", "run/checkpoint.pt: damaged", lambda: other_run() | {"state": Bomb()}
    ),
    leftover_checkpoint("a checkpoint of another run", "run/checkpoint.pt belongs to a run with other", other_run),
    leftover_checkpoint(
        "an interrupted run", "run holds the checkpoint of an interrupted run: add --resume", other_run, "--seed", "7"
    ),
]


@pytest.mark.parametrize(("bad", "script"), parameters(CASES))
def test_bad_checkpoint_ends_in_one_line_and_changes_no_file(bad, script, assert_refused):
    assert_refused(bad, script)
