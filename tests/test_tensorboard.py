import importlib.util
import sys

import pytest

import train_gpt
from finetuning.loop import Progress
from finetuning.records import read_record
from finetuning.tensorboard import TensorBoard

installed = pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="TensorBoard is not installed")
# TensorBoard's own imports.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


def test_without_tensorboard_one_line_says_how_to_install_it(tiny_gpt, data_dir, tmp_path, monkeypatch, failing):
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    message = failing(train_gpt.main, "--model_size", tiny_gpt, "--weights", "random", "--data_dir", data_dir,
                      "--context_length", "16", "--output_dir", tmp_path / "run", "--tensorboard")
    assert message.endswith("--tensorboard needs the package tensorboard: pip install tensorboard")
    assert not (tmp_path / "run").exists()  # said before the work


def read_events(folder):
    """{tag: [(step, value), ...]} as TensorBoard reads a run's folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@installed
def test_the_curve_of_a_run_is_read_back(tiny_gpt, data_dir, tmp_path):
    train_gpt.main(["--model_size", tiny_gpt, "--weights", "random", "--data_dir", str(data_dir), "--num_epochs", "2",
                    "--context_length", "16", "--eval_freq", "4", "--output_dir", str(tmp_path), "--tensorboard"])
    record, events = read_record(tmp_path), read_events(tmp_path)
    assert events.keys() == {"loss/train", "loss/validation", "accuracy/train", "accuracy/validation"}
    for kind, rows in (("loss", record["curve"]), ("accuracy", record["epochs"])):
        for split in ("train", "validation"):
            steps, values = zip(*events[f"{kind}/{split}"], strict=True)
            assert list(steps) == [row["step"] for row in rows]
            assert list(values) == pytest.approx([row[f"{split}_{kind}"] for row in rows], abs=1e-5)
    assert [row["step"] for row in record["curve"]] == [0, 4, 8]
    assert [row["step"] for row in record["epochs"]] == [6, 12]


@installed
def test_a_run_that_goes_on_replaces_what_it_wrote_before(tmp_path):
    """Steps 0 and 2 were written, but the checkpoint that the second run goes on from knows of step 0 only."""
    def row(step, loss):
        return {"step": step, "train_loss": loss, "validation_loss": loss}
    first, second = TensorBoard(tmp_path), TensorBoard(tmp_path)
    first(Progress(curve=[row(0, 4.0)]))
    first(Progress(curve=[row(0, 4.0), row(2, 3.0)]))
    second(Progress(curve=[row(0, 4.0), row(2, 2.5)]))
    assert read_events(tmp_path)["loss/train"] == [(0, 4.0), (2, 2.5)]


@installed
def test_nothing_is_written_before_there_is_something_to_write(tmp_path):
    TensorBoard(tmp_path / "run")(Progress())
    assert not (tmp_path / "run").exists()


def test_a_run_without_the_flag_needs_no_tensorboard(tiny_gpt, data_dir, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    train_gpt.main(["--model_size", tiny_gpt, "--weights", "random", "--data_dir", str(data_dir), "--max_steps", "1",
                    "--context_length", "16", "--output_dir", str(tmp_path / "run")])
    assert not list((tmp_path / "run").glob("events*"))
