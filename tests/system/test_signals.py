"""Ctrl-C, SIGTERM and SIGHUP in real processes."""

import os
import shlex
import signal
import subprocess
import sys
from functools import partial

import pytest
from helpers import assert_same_results
from processes import end, start, wait_for
from tiny_models import TINY_CONFIGS, save_encoder

import train_bert_hf
from finetuning.checkpoint import checkpoint_paths, has_checkpoint, read_checkpoint
from finetuning.reporting import records
from finetuning.system.signals import (
    DEFERRED_MESSAGE,
    Hangup,
    Terminated,
    defer_interrupts,
    raise_exception,
    raise_pending_interrupt,
    signal_number,
)
from finetuning.training import forward_backward

if sys.platform == "win32":
    pytest.skip("Windows has no such signals", allow_module_level=True)


@pytest.fixture
def command(data_dir, tmp_path):
    """Arguments of a run of 120 steps that saves no checkpoint before its first epoch ends unless interrupted."""
    save_encoder(tmp_path / "model", TINY_CONFIGS["bert"])
    return shlex.split(
        "--model model --num_epochs 5 --batch_size 2 --eval_freq 5 --eval_iter 1 --learning_rate 1e-3 "
        "--context_length 24 --precision fp32 --device cpu"
    )


def read_output(path):
    """Return what a process has printed so far."""
    return path.read_text() if path.exists() else ""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_interrupted_run_prints_the_resume_command_which_gives_the_same_run(command, tmp_path, number, status):
    command += ["--output_dir", "a run"]
    process = start("train_bert_hf", command, tmp_path / "first", tmp_path)
    wait_for(lambda: "Step 000015" in read_output(tmp_path / "first.out"), process)
    os.kill(process.pid, number)
    assert end(process) == status
    *_, deferred, last = (tmp_path / "first.err").read_text().splitlines()
    assert deferred.encode() + b"\n" == DEFERRED_MESSAGE
    assert last.startswith("Interrupted; to resume: python train_bert_hf.py --model model ")
    assert last.endswith(" --output_dir 'a run' --resume")
    assert {path.name for path in (tmp_path / "a run").iterdir()} <= {"checkpoint.pt", "checkpoint.previous.pt"}

    arguments = shlex.split(last.removeprefix("Interrupted; to resume: python train_bert_hf.py "))
    assert end(start("train_bert_hf", arguments, tmp_path / "second", tmp_path)) == 0
    assert end(start("train_bert_hf", [*command[:-1], "expected"], tmp_path / "expected", tmp_path)) == 0
    assert_same_results(tmp_path / "a run", tmp_path / "expected")
    # The logs of both parts add up to that of the uninterrupted run.
    logs = [
        [line for line in (tmp_path / f"{name}.out").read_text().splitlines() if "minutes" not in line]
        for name in ("first", "second", "expected")
    ]
    assert logs[0] + logs[1] == logs[2]


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_after_an_interrupt_is_raised_at_once(first):
    with pytest.raises(KeyboardInterrupt), defer_interrupts() as pending:
        signal.raise_signal(first)
        assert len(pending) == 1
        signal.raise_signal(signal.SIGINT)
        pytest.fail("Ctrl-C was deferred")


def test_deferred_interrupt_is_raised_at_the_end_of_the_block():
    reached = []
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated), defer_interrupts():
        signal.raise_signal(signal.SIGTERM)
        reached.append("end")
    assert reached == ["end"]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    raise_pending_interrupt()  # it is raised once
    with defer_interrupts() as pending:
        pass
    assert pending == []


def test_deferred_interrupt_does_not_replace_an_error():
    with pytest.raises(ZeroDivisionError), defer_interrupts():
        signal.raise_signal(signal.SIGINT)
        raise ZeroDivisionError


def test_signal_number_is_that_of_the_exception():
    assert [signal_number(kind()) for kind in (KeyboardInterrupt, Terminated, Hangup)] == [2, 15, 1]


@pytest.mark.parametrize("numbers", [(signal.SIGHUP, signal.SIGHUP), (signal.SIGTERM, signal.SIGHUP),
                                     (signal.SIGHUP, signal.SIGTERM), (signal.SIGTERM, signal.SIGTERM)])  # fmt: skip
def test_signals_of_a_shutdown_do_not_end_the_step(numbers):
    """A shell and the system may send the same signal, systemd sends two different ones."""
    before = {number: signal.signal(number, raise_exception) for number in numbers}
    reached = []
    try:
        with pytest.raises((Hangup, Terminated)), defer_interrupts():
            for number in numbers:
                signal.raise_signal(number)
            reached.append("end")
        if signal.SIGHUP in numbers:
            signal.raise_signal(signal.SIGHUP)  # ignored while temporary files are removed
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert reached == ["end"]


def test_hangup_is_raised_once():
    before = signal.signal(signal.SIGHUP, raise_exception)
    try:
        with pytest.raises(Hangup):
            signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)  # while temporary files are removed
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_ignored_signals_stay_ignored(number):
    """`nohup` ignores SIGHUP, a shell script SIGINT for its background processes."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with defer_interrupts() as pending:
            signal.raise_signal(number)
        assert pending == []
    finally:
        signal.signal(number, before)


def test_closed_terminal_does_not_end_the_run_before_its_checkpoint(command, tmp_path):
    terminal, child_terminal = os.openpty()
    arguments = [sys.executable, train_bert_hf.__file__, *command, "--output_dir", "run"]
    run = partial(subprocess.Popen, stdin=child_terminal, stdout=child_terminal, stderr=child_terminal)
    with run(arguments, cwd=tmp_path, process_group=0) as process:
        os.close(child_terminal)
        output = b""
        while b"Step 000015" not in output:
            output += os.read(terminal, 1000)
        os.close(terminal)
        process.send_signal(signal.SIGHUP)
    assert process.returncode == 129
    assert read_checkpoint(checkpoint_paths(tmp_path / "run")[0])["train_state"]["step"] > 15


# Evaluations 1 and 2 are those of step 0, on training and validation reviews; 7 and 8 end the first epoch, 16 the last.
# Each is a single batch, before and after which `predict_logits` looks for an interrupt.
@pytest.mark.parametrize(
    ("evaluation", "look", "step", "logged"),
    [(1, 1, 1, []), (4, 2, 3, [0]), (7, 1, 6, [0, 2, 4]), (9, 1, 7, [0, 2, 4]), (16, 2, 12, [0, 2, 4, 6, 8, 10])],
)
def test_run_interrupted_in_a_log_line_resumes_with_that_line(
    evaluation, look, step, logged, resumable_command, tmp_path, monkeypatch, capsys
):
    def train(name, *arguments):
        train_bert_hf.main([*resumable_command, "--output_dir", str(tmp_path / name), *arguments])

    def interrupt():
        calls.append(1)
        if len(calls) == 2 * (evaluation - 1) + look:
            signal.raise_signal(signal.SIGTERM)
        raise_pending_interrupt()

    train("expected")
    log = capsys.readouterr().out.splitlines()
    calls = []
    with monkeypatch.context() as patch, pytest.raises(Terminated):
        patch.setattr("finetuning.performance.inference.raise_pending_interrupt", interrupt)
        train("run")
    state = read_checkpoint(checkpoint_paths(tmp_path / "run")[0])["train_state"]
    assert (state["step"], len(state["losses"]), [row["step"] for row in state["eval_history"]]) == (step, step, logged)
    train("run", "--resume")
    assert_same_results(tmp_path / "run", tmp_path / "expected")
    resumed = capsys.readouterr().out.splitlines()
    assert [line for line in resumed if "minutes" not in line] == [line for line in log if "minutes" not in line]


def test_interrupt_in_a_step_is_raised_after_that_step(resumable_command, tmp_path, monkeypatch):
    calls = []

    def interrupt(*arguments):
        calls.append(1)
        if len(calls) == 4:  # has no log line
            signal.raise_signal(signal.SIGINT)
        return forward_backward(*arguments)

    monkeypatch.setattr("finetuning.training.forward_backward", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train_bert_hf.main([*resumable_command, "--output_dir", str(tmp_path / "run")])
    assert read_checkpoint(checkpoint_paths(tmp_path / "run")[0])["train_state"]["step"] == 4


def test_second_ctrl_c_saves_no_checkpoint_of_an_unfinished_step(resumable_command, tmp_path, monkeypatch):
    def interrupt_twice(reviews, indices, classifier, micro_batch_size):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("finetuning.training.forward_backward", interrupt_twice)
    with pytest.raises(KeyboardInterrupt):
        train_bert_hf.main([*resumable_command, "--output_dir", str(tmp_path / "run")])
    assert not has_checkpoint(tmp_path / "run")


def test_interrupt_in_the_final_evaluation_prints_the_resume_command(command, tmp_path):
    """The last checkpoint holds the trained model."""
    test = (tmp_path / "test.csv").read_text()
    (tmp_path / "test.csv").write_text(test + test.partition("\n")[2] * 2000)  # a longer evaluation
    process = start("train_bert_hf", [*command, "--max_steps", "3", "--output_dir", "run"], tmp_path / "log", tmp_path)
    wait_for(lambda: "full datasets" in read_output(tmp_path / "log.out"), process)
    os.kill(process.pid, signal.SIGTERM)
    assert end(process) == 143
    assert "Interrupted; to resume: python train_bert_hf.py" in (tmp_path / "log.err").read_text().splitlines()[-1]
    assert not (tmp_path / "run" / records.RECORD).exists()
    assert read_checkpoint(checkpoint_paths(tmp_path / "run")[0])["train_state"]["step"] == 3


def test_interrupt_is_deferred_although_stderr_is_a_broken_pipe(monkeypatch):
    """Ctrl-C also ends the `tee` that the output is piped to."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "w") as broken, pytest.raises(KeyboardInterrupt), defer_interrupts() as pending:
        monkeypatch.setattr(sys, "__stderr__", broken)
        signal.raise_signal(signal.SIGINT)
        assert len(pending) == 1
