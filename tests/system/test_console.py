import errno
import io
import os
import re
import subprocess
import sys

import pytest
from helpers import REPOSITORY, tiny_gpt_flags

from finetuning.callbacks import training_bar
from finetuning.system.console import evaluation_bar, log, print_status
from finetuning.training import TrainState


def test_output_to_a_closed_terminal_is_discarded(monkeypatch):
    class ClosedTerminal(io.StringIO):
        def flush(self):
            raise OSError(self.number, "an error")

    for stream, function in (("stdout", log), ("stderr", print_status)):
        terminal = ClosedTerminal()
        monkeypatch.setattr(sys, stream, terminal)
        terminal.number = errno.EIO
        function("a line")
        terminal.number = errno.ENOSPC
        with pytest.raises(OSError, match="an error"):
            function("a line")
        monkeypatch.undo()


class Terminal(io.StringIO):
    """Stream that claims to be a terminal."""

    def isatty(self):
        return True


def run_in_terminal(monkeypatch, function, *arguments):
    """Call a function with standard output and error in one terminal; return what was written to it."""
    with monkeypatch.context() as patch:
        terminal = Terminal()
        patch.setattr(sys, "stdout", terminal)
        patch.setattr(sys, "stderr", terminal)
        patch.setattr("finetuning.system.console.REFRESH_SECONDS", 0)
        function(*arguments)
    return terminal.getvalue()


def visible_lines(written):
    """Return the lines that a terminal finally shows: text after a carriage return overwrites the line."""
    lines = [""]
    for part in re.split(r"(\r|\n)", written):
        if part == "\n":
            lines.append("")
        elif part not in ("\r", ""):
            lines[-1] = part + lines[-1][len(part) :]
    return [line.rstrip() for line in lines]


def run_three_steps():
    state = TrainState(step=1)  # of a resumed run
    with training_bar(state, total_steps=4, batch_size=8) as show:
        for step in (2, 3):
            state.step = step
            if step == 3:
                state.eval_history.append({"step": 2, "train_loss": 0.6931, "validation_loss": 0.7})
                log("Ep 1 (Step 000002): Train loss 0.693, Val loss 0.700")
            show(state)


def test_training_bar_shows_reviews_remaining_time_step_and_last_loss(monkeypatch):
    written = run_in_terminal(monkeypatch, run_three_steps)
    assert re.search(r"Training:  50%\|.*\| 16/32 \[\d\d:\d\d<.*, +\d+\.\d\d reviews/s, step 2/4\]", written), written
    assert re.search(r"Training:  75%\|.*\| 24/32 \[.* reviews/s, step 3/4, loss 0\.693\]", written), written


def test_training_bar_does_not_overwrite_the_log(monkeypatch):
    written = run_in_terminal(monkeypatch, run_three_steps)
    assert visible_lines(written) == ["Ep 1 (Step 000002): Train loss 0.693, Val loss 0.700", ""]


def test_bars_are_hidden_without_a_terminal(capsys):
    run_three_steps()
    assert list(evaluation_bar([1, 2])) == [1, 2]
    printed = capsys.readouterr()
    assert printed.out == "Ep 1 (Step 000002): Train loss 0.693, Val loss 0.700\n"
    assert printed.err == ""


def test_evaluation_bar_is_shown_only_after_a_delay(monkeypatch):
    def evaluate():
        assert list(evaluation_bar([1, 2])) == [1, 2]

    assert run_in_terminal(monkeypatch, evaluate) == ""
    monkeypatch.setattr("finetuning.system.console.EVALUATION_BAR_DELAY", 0)
    assert re.search(r"Evaluating: 100%\|.*\| 2/2 \[.* batches/s\]", run_in_terminal(monkeypatch, evaluate))


def test_run_writes_bars_to_terminal_and_log_to_pipe(tiny_gpt, data_dir, tmp_path):
    """Standard error is a terminal, standard output a pipe."""
    pty, termios = (pytest.importorskip(name) for name in ("pty", "termios"))
    controller, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    process = subprocess.Popen(
        [
            sys.executable,
            str(REPOSITORY / "tests" / "tiny_gpt.py"),
            *tiny_gpt_flags(tiny_gpt, data_dir, tmp_path / "run"),
        ],
        stdout=subprocess.PIPE,
        stderr=terminal,
        text=True,
    )
    os.close(terminal)
    written = b""
    try:
        while chunk := os.read(controller, 4096):
            written += chunk
    except OSError:  # Linux: the process has closed its side
        pass
    printed = process.communicate()[0].splitlines()
    os.close(controller)
    assert process.returncode == 0
    assert re.fullmatch(r"Ep 1 \(Step 000000\): Train loss \d\.\d{3}, Val loss \d\.\d{3}", printed[0])
    assert len(printed) == 9
    assert b"Training:" in written
    assert b"Train loss" not in written
