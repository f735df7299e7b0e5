import io
import os
import re
import subprocess
import sys

import pytest
from conftest import REPOSITORY

from finetuning.console import evaluation_bar, log, training_bar
from finetuning.loop import Progress


class Terminal(io.StringIO):
    """Standard output and error of a program in a terminal."""

    def isatty(self):
        return True


def in_terminal(monkeypatch, function, *arguments):
    """Call a function in a terminal; return all that was written to it."""
    with monkeypatch.context() as patch:
        screen = Terminal()
        patch.setattr(sys, "stdout", screen)
        patch.setattr(sys, "stderr", screen)
        patch.setattr("finetuning.console.INTERVAL", 0)
        function(*arguments)
    return screen.getvalue()


def shown(written):
    """The lines that a terminal shows in the end: what follows a carriage return overwrites what stands there."""
    lines = [""]
    for part in re.split(r"(\r|\n)", written):
        if part == "\n":
            lines.append("")
        elif part not in ("\r", ""):
            lines[-1] = part + lines[-1][len(part):]
    return [line.rstrip() for line in lines]


def run_three_steps():
    progress = Progress(step=1)  # of a run that goes on
    with training_bar(progress, total_steps=4, batch_size=8) as show:
        for step in (2, 3):
            progress.step = step
            if step == 3:
                progress.curve.append({"step": 2, "train_loss": 0.6931, "validation_loss": 0.7})
                log("Ep 1 (Step 000002): Train loss 0.693, Val loss 0.700")
            show(progress)


def test_a_bar_shows_reviews_time_left_step_and_the_last_logged_loss(monkeypatch):
    written = in_terminal(monkeypatch, run_three_steps)
    assert re.search(r"Training:  50%\|.*\| 16/32 \[\d\d:\d\d<.*, +\d+\.\d\d reviews/s, step 2/4\]", written), written
    assert re.search(r"Training:  75%\|.*\| 24/32 \[.* reviews/s, step 3/4, loss 0\.693\]", written), written


def test_a_bar_leaves_the_log_as_it_is(monkeypatch):
    written = in_terminal(monkeypatch, run_three_steps)
    assert shown(written) == ["Ep 1 (Step 000002): Train loss 0.693, Val loss 0.700", ""]


def test_nothing_but_the_log_where_there_is_no_terminal(capsys):
    run_three_steps()
    assert list(evaluation_bar([1, 2])) == [1, 2]
    printed = capsys.readouterr()
    assert printed.out == "Ep 1 (Step 000002): Train loss 0.693, Val loss 0.700\n"
    assert printed.err == ""


def test_only_a_long_evaluation_has_a_bar(monkeypatch):
    def evaluate():
        assert list(evaluation_bar([1, 2])) == [1, 2]
    assert in_terminal(monkeypatch, evaluate) == ""
    monkeypatch.setattr("finetuning.console.MOMENT", 0)
    assert re.search(r"Evaluating: 100%\|.*\| 2/2 \[.* batches/s\]", in_terminal(monkeypatch, evaluate))


def test_a_real_run_in_a_terminal_prints_the_log_alone_to_a_pipe(tiny_gpt, data_dir, tmp_path):
    """Standard error is a terminal, standard output a pipe."""
    pty, termios = (pytest.importorskip(name) for name in ("pty", "termios"))
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    done = subprocess.Popen([sys.executable, str(REPOSITORY / "tests" / "tiny_gpt.py"), "--model_size", tiny_gpt,
                             "--weights", "random", "--data_dir", str(data_dir), "--context_length", "16",
                             "--output_dir", str(tmp_path / "run")], stdout=subprocess.PIPE, stderr=theirs, text=True)
    os.close(theirs)
    written = b""
    try:
        while piece := os.read(ours, 4096):
            written += piece
    except OSError:  # Linux: the other side is closed
        pass
    printed = done.communicate()[0].splitlines()
    os.close(ours)
    assert done.returncode == 0
    assert re.fullmatch(r"Ep 1 \(Step 000000\): Train loss \d\.\d{3}, Val loss \d\.\d{3}", printed[0])
    assert len(printed) == 9
    assert b"Training:" in written
    assert b"Train loss" not in written
