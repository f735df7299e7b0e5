"""Kill a small run at random moments with `kill -9`, then resume it.

The variables KILLS and SEED set the number of kills and their moments: `KILLS=20 python -m pytest tests/test_kill.py`.
"""

import os
import random
import shlex
import shutil
import signal
import sys
import time

import pytest
from helpers import assert_same_results
from processes import end, start
from tiny_models import TINY_CONFIGS, save_encoder

from finetuning.checkpoint import has_checkpoint
from finetuning.reporting import records
from finetuning.reporting.plots import CURVES

KILLS = int(os.environ.get("KILLS", "2"))
SEED = int(os.environ.get("SEED", "1"))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no kill -9")
def test_killed_and_resumed_run_equals_an_uninterrupted_one(data_dir, tmp_path):
    """A checkpoint follows each of the 30 steps, so that some kills interrupt its writing."""
    save_encoder(tmp_path / "model", TINY_CONFIGS["bert"])
    command = shlex.split(
        "--model model --num_epochs 5 --eval_freq 1 --learning_rate 1e-3 --context_length 24 --precision fp32 "
        "--device cpu --checkpoint_minutes 1e-9"
    )
    log = tmp_path / "log.out"

    def run(folder, *more):
        log.unlink(missing_ok=True)
        return start("train_bert_hf", [*command, "--output_dir", folder, *more], tmp_path / "log", tmp_path)

    assert end(run("expected")) == 0
    rng, outcomes = random.Random(SEED), []
    for _ in range(KILLS):
        shutil.rmtree(tmp_path / "killed", ignore_errors=True)
        process, num_lines = run("killed"), rng.randrange(1, 36)  # 30 steps and 5 ends of epochs
        while process.is_alive() and not (log.exists() and log.read_bytes().count(b"\n") >= num_lines):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        assert end(process) in (-signal.SIGKILL, 0)
        resume, finished = has_checkpoint(tmp_path / "killed"), (tmp_path / "killed" / CURVES).exists()
        outcomes.append("resumed" if resume else "already finished" if finished else "restarted")
        if resume or not finished:
            assert end(run("killed", *["--resume"] * resume)) == 0, (tmp_path / "log.err").read_text()
        assert_same_results(tmp_path / "killed", tmp_path / "expected")
        files = {path.name for path in (tmp_path / "killed").iterdir()} - {".lock"}
        assert files == {CURVES, records.RECORD, records.PREDICTIONS}
        print(
            f"\n{len(outcomes)} kills (SEED={SEED}), all with the expected results: "
            + ", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in sorted(set(outcomes))),
            flush=True,
        )
