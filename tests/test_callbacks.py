import importlib.util
import sys

import pytest
from helpers import flags, tiny_gpt_flags

import train_gpt
from finetuning.callbacks import TensorBoard
from finetuning.reporting.records import read_record
from finetuning.training import TrainState

installed = pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="TensorBoard is not installed")
# Raised by TensorBoard's imports.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


def test_missing_tensorboard_package_is_reported_before_the_run(tiny_gpt, data_dir, tmp_path, monkeypatch, failing):
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    message = failing(
        train_gpt.main,
        *tiny_gpt_flags(tiny_gpt, data_dir, tmp_path / "run"),
        "--tensorboard",
    )
    assert message.endswith("--tensorboard needs the package tensorboard: pip install tensorboard")
    assert not (tmp_path / "run").exists()


def read_events(folder):
    """Return {tag: [(step, value), ...]} of a run's folder, as read by TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@installed
def test_tensorboard_events_equal_the_record(tiny_gpt, data_dir, tmp_path):
    train_gpt.main([*tiny_gpt_flags(tiny_gpt, data_dir, tmp_path), *flags(num_epochs=2, eval_freq=4, tensorboard=True)])
    record, events = read_record(tmp_path), read_events(tmp_path)
    assert events.keys() == {"loss/train", "loss/validation", "accuracy/train", "accuracy/validation"}
    for kind, rows in (("loss", record["eval_history"]), ("accuracy", record["epoch_metrics"])):
        for split in ("train", "validation"):
            steps, values = zip(*events[f"{kind}/{split}"], strict=True)
            assert list(steps) == [row["step"] for row in rows]
            assert list(values) == pytest.approx([row[f"{split}_{kind}"] for row in rows], abs=1e-5)
    assert [row["step"] for row in record["eval_history"]] == [0, 4, 8]
    assert [row["step"] for row in record["epoch_metrics"]] == [6, 12]


@installed
def test_tensorboard_of_resumed_run_replaces_earlier_events(tmp_path):
    """The interrupted run wrote steps 0 and 2; its checkpoint has step 0 only."""

    def row(step, loss):
        return {"step": step, "train_loss": loss, "validation_loss": loss}

    first, second = TensorBoard(tmp_path), TensorBoard(tmp_path)
    first(TrainState(eval_history=[row(0, 4.0)]))
    first(TrainState(eval_history=[row(0, 4.0), row(2, 3.0)]))
    second(TrainState(eval_history=[row(0, 4.0), row(2, 2.5)]))
    assert read_events(tmp_path)["loss/train"] == [(0, 4.0), (2, 2.5)]


@installed
def test_tensorboard_writes_no_file_without_values(tmp_path):
    TensorBoard(tmp_path / "run")(TrainState())
    assert not (tmp_path / "run").exists()


def test_run_without_the_flag_does_not_import_tensorboard(tiny_gpt, data_dir, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    train_gpt.main([*tiny_gpt_flags(tiny_gpt, data_dir, tmp_path / "run"), "--max_steps", "1"])
    assert not list((tmp_path / "run").glob("events*"))


@installed
def test_tensorboard_on_a_full_disk_warns_once_and_lets_training_continue(tmp_path, monkeypatch, capsys):
    tensorboard = TensorBoard(tmp_path)

    def fail(step, **values):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensorboard, "write", fail)
    row = {"step": 0, "train_loss": 1.0, "validation_loss": 1.0}
    for _ in range(2):
        tensorboard(TrainState(eval_history=[row]))
    assert capsys.readouterr().err.count("training continues without it") == 1
