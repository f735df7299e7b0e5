import hashlib
import pickle
import shutil

import pytest
import torch
from conftest import TINY_CONFIGS, save_encoder

import train_bert_hf
from finetuning import checkpoint, records, runtime
from finetuning.errors import UserError
from finetuning.plots import CURVES


class Killed(Exception):
    """Stands for the power cut."""


@pytest.fixture
def command(data_dir, tmp_path):
    """Arguments of a small run with dropout on, saving a checkpoint after every update."""
    save_encoder(tmp_path / "model", TINY_CONFIGS["bert"])
    return ["--model", str(tmp_path / "model"), "--data_dir", str(data_dir), "--num_epochs", "2", "--eval_freq", "2",
            "--learning_rate", "1e-3", "--context_length", "24", "--precision", "fp32", "--checkpoint_minutes", "1e-9"]


def kill_after(monkeypatch, step):
    save = checkpoint.CheckpointWriter.save

    def save_and_die(self, progress):
        save(self, progress)
        if progress.step == step:
            raise Killed
    monkeypatch.setattr(checkpoint.CheckpointWriter, "save", save_and_die)


def same(folder, other):
    """Check that two runs ended in the same numbers."""
    read, expected = records.read_record(folder), records.read_record(other)
    for key in ("losses", "curve", "epochs", "accuracy"):
        assert read[key] == expected[key]
    assert (folder / records.PREDICTIONS).read_bytes() == (other / records.PREDICTIONS).read_bytes()


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
    same(tmp_path / "cut", tmp_path / "whole")
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == [CURVES, records.RECORD, records.PREDICTIONS]


@pytest.mark.parametrize("minutes", ["1e-9", "60"])
def test_checkpoints_come_in_time_and_at_the_end_of_each_epoch(command, tmp_path, monkeypatch, minutes):
    steps = []
    save = checkpoint.CheckpointWriter.save
    monkeypatch.setattr(checkpoint.CheckpointWriter, "save",
                        lambda self, progress: (steps.append(progress.step), save(self, progress)))
    train_bert_hf.main([*command, "--checkpoint_minutes", minutes, "--output_dir", str(tmp_path / "run")])
    assert steps == ([6, 12] if minutes == "60" else list(range(1, 13)))


@pytest.fixture
def interrupted(command, tmp_path, monkeypatch):
    """The checkpoint that a run left, the one before it, and the command that goes on."""
    command += ["--output_dir", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        kill_after(patch, 3)
        with pytest.raises(Killed):
            train_bert_hf.main(command)
    return *checkpoint.checkpoints(tmp_path / "run"), [*command, "--resume"]


def test_resume_without_a_checkpoint(command, tmp_path):
    with pytest.raises(UserError, match="there is no checkpoint"):
        train_bert_hf.main([*command, "--output_dir", str(tmp_path / "empty"), "--resume"])
    assert not (tmp_path / "empty").exists()


def test_an_unfinished_run_is_not_begun_anew_by_mistake(interrupted):
    newest, _, command = interrupted
    before = newest.read_bytes()
    with pytest.raises(UserError, match="add --resume to go on with it, or delete it"):
        train_bert_hf.main(command[:-1])
    assert newest.read_bytes() == before


def test_a_checkpoint_of_another_run_is_refused(interrupted):
    *_, command = interrupted
    with pytest.raises(UserError, match="a run with other learning_rate, seed"):
        train_bert_hf.main([*command, "--seed", "7", "--learning_rate", "2e-3"])


def test_other_data_is_refused(interrupted, data_dir):
    *_, command = interrupted
    with (data_dir / "train.csv").open("a") as file:
        file.write("one more,1\n")
    with pytest.raises(UserError, match=r"a run with other train\.csv"):
        train_bert_hf.main(command)


def test_another_model_of_the_same_name_is_refused(interrupted, tmp_path):
    *_, command = interrupted
    shutil.rmtree(tmp_path / "model")
    save_encoder(tmp_path / "model", TINY_CONFIGS["distilbert"])
    with pytest.raises(UserError, match="the model is not the one"):
        train_bert_hf.main(command)


@pytest.mark.parametrize("flags", [["--accumulate", "2"], ["--compile"], ["--device", "cpu"]])
def test_what_makes_no_difference_may_change(flags, interrupted, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)
    *_, command = interrupted
    train_bert_hf.main([*command, *flags])
    assert len(records.read_record(tmp_path / "run")["losses"]) == 12
    assert "Precision: fp32 (as the run began)" in capsys.readouterr().err


def test_another_precision_may_be_asked_for_and_is_told(interrupted, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runtime, "cpu_flags", lambda: {"avx512_bf16"})
    *_, command = interrupted
    told = ("as asked; fp32 up to step 3, so that the numbers will differ from those of an uninterrupted run")
    train_bert_hf.main([*command, "--precision", "bf16"])
    assert f"Precision: bf16 ({told})" in capsys.readouterr().err
    assert records.read_record(tmp_path / "run")["precision"] == {"used": "bf16", "why": told}


def test_without_a_precision_the_run_keeps_its_own_and_tells_where_it_is_emulated(interrupted, monkeypatch, capsys):
    newest, _, command = interrupted
    monkeypatch.setattr(runtime, "cpu_flags", lambda: {"avx2"})
    checkpoint.write(checkpoint.read(newest) | {"precision": "bf16"}, newest)
    train_bert_hf.main([*command, "--precision", "auto"])
    assert ("Precision: bf16 (as the run began; this CPU emulates bf16, which is slower than fp32"
            in capsys.readouterr().err)


@pytest.mark.parametrize(("began", "resumed"), [([], ["--precision", "fp32"]), (["--precision", "fp32"], []),
                                                (["--precision", "bf16"], ["--precision", "fp32"])])
def test_a_run_in_another_precision_is_found_by_its_name(began, resumed, command, tmp_path, monkeypatch):
    """The default folder's name tells the precision."""
    monkeypatch.chdir(tmp_path)
    command = [argument for argument in command if argument not in ("--precision", "fp32")]
    with monkeypatch.context() as patch:
        kill_after(patch, 3)
        with pytest.raises(Killed):
            train_bert_hf.main([*command, *began])
    folder, = (tmp_path / "results").iterdir()
    train_bert_hf.main([*command, *resumed, "--resume"])
    assert list((tmp_path / "results").iterdir()) == [folder]
    assert records.read_record(folder)["name"] == folder.name


def test_another_kind_of_device_is_refused(interrupted):
    newest, _, command = interrupted
    state = checkpoint.read(newest)
    checkpoint.write(state | {"device": "cuda"}, newest)
    with pytest.raises(UserError, match="the run began on cuda"):
        train_bert_hf.main(command)


@pytest.mark.parametrize("damage", [
    lambda content: b"", lambda content: content[:1000], lambda content: content[:-10],
    lambda content: content[:5000] + bytes([content[5000] ^ 1]) + content[5001:],
    lambda content: bytes([content[0] ^ 1]) + content[1:]])  # the digest: what follows is whole, and not what was meant
def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(interrupted, damage, capsys):
    newest, previous, resume = interrupted
    newest.write_bytes(damage(newest.read_bytes()))
    kept = previous.read_bytes()
    previous.write_bytes(damage(kept))
    with pytest.raises(UserError, match=r"checkpoint\.pt and .*checkpoint\.previous\.pt damaged"):
        train_bert_hf.main(resume)
    previous.write_bytes(kept)
    train_bert_hf.main(resume)
    assert f"{newest} is damaged or missing; going on from the one before it, of update 2" in capsys.readouterr().err


def test_going_on_from_the_older_checkpoint_keeps_it(interrupted, tmp_path, monkeypatch):
    """Killed again while the next one is put in place, the run still has one."""
    newest, previous, command = interrupted
    newest.write_bytes(b"rotten")
    kept = previous.read_bytes()
    replace = checkpoint.os.replace

    def die_once_the_old_one_is_aside(source, target):
        replace(source, target)
        if target == previous:
            raise Killed
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "replace", die_once_the_old_one_is_aside)
        with pytest.raises(Killed):
            train_bert_hf.main(command)
    assert previous.read_bytes() == kept
    train_bert_hf.main(command)
    train_bert_hf.main([*command[:-2], str(tmp_path / "whole")])
    same(tmp_path / "run", tmp_path / "whole")


def test_loading_runs_no_code_from_the_file(interrupted, tmp_path):
    newest, previous, command = interrupted

    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))
    state = checkpoint.read(newest)
    for path in (newest, previous):
        checkpoint.write(state | {"identity": Bomb()}, path)
    with pytest.raises(UserError, match="damaged"):
        train_bert_hf.main(command)
    assert not (tmp_path / "exploded").exists()
    with newest.open("rb") as file, pytest.raises(pickle.UnpicklingError):  # it was the bomb, not the digest
        file.seek(checkpoint.DIGEST_BYTES)
        torch.load(file, weights_only=True)
    assert hashlib.sha256(newest.read_bytes()[32:]).digest() == newest.read_bytes()[:32]


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_checkpoint(command, tmp_path):
    """A step that is far too large: the first loss is still good, the next one is not."""
    command += ["--learning_rate", "1e30", "--output_dir", str(tmp_path / "run")]
    with pytest.raises(UserError, match="the training loss is nan at step 1; try a smaller --learning_rate"):
        train_bert_hf.main(command)
    newest, previous = checkpoint.checkpoints(tmp_path / "run")
    assert checkpoint.read(newest)["progress"]["step"] == 1
    assert not previous.exists()


def test_weights_that_are_no_numbers_are_not_saved(command, tmp_path, monkeypatch):
    """The loss of the fifth update is good; the update itself is not."""
    calls = []
    step = torch.optim.AdamW.step

    def break_weights(self, *args, **kwargs):
        step(self, *args, **kwargs)
        calls.append(1)
        if len(calls) == 5:
            self.param_groups[0]["params"][0].data[0] = float("nan")
    monkeypatch.setattr(torch.optim.AdamW, "step", break_weights)
    with pytest.raises(UserError, match="weights are no finite numbers any more after update 5"):
        train_bert_hf.main([*command, "--output_dir", str(tmp_path / "run")])
    assert checkpoint.read(tmp_path / "run" / checkpoint.CHECKPOINT)["progress"]["step"] == 4
