"""Ctrl-C and SIGTERM, sent to real processes."""

import os
import shlex
import signal
import sys

import pytest
from conftest import TINY_CONFIGS, save_encoder
from processes import end, start, wait_for
from test_checkpoint import same

from finetuning import records
from finetuning.checkpoint import checkpoints, read
from finetuning.interrupts import PUT_OFF, Terminated, exit_status, put_off

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")


@pytest.fixture
def command(data_dir, tmp_path):
    """A run of 120 updates that saves no checkpoint on its own before its first epoch ends."""
    save_encoder(tmp_path / "model", TINY_CONFIGS["bert"])
    return ["--model", "model", "--num_epochs", "5", "--batch_size", "2", "--eval_freq", "5", "--eval_iter", "1",
            "--learning_rate", "1e-3", "--context_length", "24", "--precision", "fp32", "--device", "cpu"]


def printed(path):
    """What a process has printed so far."""
    return path.read_text() if path.exists() else ""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_says_how_to_go_on_and_does(command, tmp_path, number, status):
    command += ["--output_dir", "a run"]
    process = start("train_bert_hf", command, tmp_path / "first", tmp_path)
    wait_for(lambda: "Step 000015" in printed(tmp_path / "first.out"), process)
    os.kill(process.pid, number)
    assert end(process) == status
    *_, put_off_line, last = (tmp_path / "first.err").read_text().splitlines()
    assert put_off_line.encode() + b"\n" == PUT_OFF
    assert last.startswith("Interrupted; to go on: python train_bert_hf.py --model model ")
    assert last.endswith(" --output_dir 'a run' --resume")
    assert {path.name for path in (tmp_path / "a run").iterdir()} <= {"checkpoint.pt", "checkpoint.previous.pt"}

    arguments = shlex.split(last.removeprefix("Interrupted; to go on: python train_bert_hf.py "))
    assert end(start("train_bert_hf", arguments, tmp_path / "second", tmp_path)) == 0
    assert end(start("train_bert_hf", [*command[:-1], "whole"], tmp_path / "whole", tmp_path)) == 0
    same(tmp_path / "a run", tmp_path / "whole")
    # Without the update in which it stopped, the two logs are the one of the run that never did.
    logs = [[line for line in (tmp_path / f"{name}.out").read_text().splitlines() if "minutes" not in line]
            for name in ("first", "second", "whole")]
    assert logs[0] + logs[1] == logs[2]


def test_a_second_one_does_not_wait():
    with pytest.raises(KeyboardInterrupt), put_off() as came:
        signal.raise_signal(signal.SIGINT)
        assert len(came) == 1
        signal.raise_signal(signal.SIGINT)
        pytest.fail("went on after the second")
    with pytest.raises(Terminated), put_off():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)


def test_what_was_put_off_is_raised_at_the_end():
    done = []
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated), put_off():
        signal.raise_signal(signal.SIGTERM)
        done.append(1)
    assert done
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    with put_off() as came:
        pass
    assert came == []


def test_an_error_is_not_hidden_by_an_interrupt():
    with pytest.raises(ZeroDivisionError), put_off():
        signal.raise_signal(signal.SIGINT)
        raise ZeroDivisionError


def test_exit_statuses():
    assert (exit_status(KeyboardInterrupt()), exit_status(Terminated())) == (130, 143)


def test_during_the_final_evaluation_too(command, tmp_path):
    """Training is over and saved; the line still says how to go on."""
    test = (tmp_path / "test.csv").read_text()
    (tmp_path / "test.csv").write_text(test + test.partition("\n")[2] * 2000)  # so that it takes a while
    process = start("train_bert_hf", [*command, "--max_steps", "3", "--output_dir", "run"], tmp_path / "log", tmp_path)
    wait_for(lambda: "full datasets" in printed(tmp_path / "log.out"), process)
    os.kill(process.pid, signal.SIGTERM)
    assert end(process) == 143
    assert "Interrupted; to go on: python train_bert_hf.py" in (tmp_path / "log.err").read_text().splitlines()[-1]
    assert not (tmp_path / "run" / records.RECORD).exists()
    assert read(checkpoints(tmp_path / "run")[0])["progress"]["step"] == 3
