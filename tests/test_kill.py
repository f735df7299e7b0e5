"""`kill -9` at random moments of a small run, which is then resumed.

KILLS says how many, SEED which: `KILLS=20 python -m pytest tests/test_kill.py`.
"""

import os
import random
import shutil
import signal
import sys
import time

import pytest
from conftest import TINY_CONFIGS, save_encoder
from processes import end, start
from test_checkpoint import same

from finetuning import records
from finetuning.checkpoint import is_unfinished
from finetuning.plots import CURVES

KILLS = int(os.environ.get("KILLS", "2"))
SEED = int(os.environ.get("SEED", "1"))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no kill -9")
def test_a_killed_run_ends_in_the_same_numbers(data_dir, tmp_path):
    """A checkpoint after each of 30 updates, so that kills come while one is written, too."""
    save_encoder(tmp_path / "model", TINY_CONFIGS["bert"])
    command = ["--model", "model", "--num_epochs", "5", "--eval_freq", "1", "--learning_rate", "1e-3",
               "--context_length", "24", "--precision", "fp32", "--device", "cpu", "--checkpoint_minutes", "1e-9"]
    log = tmp_path / "log.out"

    def run(folder, *more):
        log.unlink(missing_ok=True)
        return start("train_bert_hf", [*command, "--output_dir", folder, *more], tmp_path / "log", tmp_path)
    assert end(run("whole")) == 0
    chance, outcomes = random.Random(SEED), []
    for _ in range(KILLS):
        shutil.rmtree(tmp_path / "cut", ignore_errors=True)
        process, line = run("cut"), chance.randrange(1, 36)  # one of 30 updates, or of 5 epochs' ends
        while process.is_alive() and not (log.exists() and log.read_bytes().count(b"\n") >= line):
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.05))
        process.kill()
        assert end(process) in (-signal.SIGKILL, 0)
        resume, finished = is_unfinished(tmp_path / "cut"), (tmp_path / "cut" / CURVES).exists()
        outcomes.append("resumed" if resume else "finished already" if finished else "started again")
        if resume or not finished:
            assert end(run("cut", *["--resume"] * resume)) == 0, (tmp_path / "log.err").read_text()
        same(tmp_path / "cut", tmp_path / "whole")
        assert {path.name for path in (tmp_path / "cut").iterdir()} - {".lock"} == {
            CURVES, records.RECORD, records.PREDICTIONS}
        print(f"\n{len(outcomes)} kills (SEED={SEED}), the same numbers each time: "
              + ", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in sorted(set(outcomes))), flush=True)
