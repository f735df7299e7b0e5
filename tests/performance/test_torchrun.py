"""Runs of two processes that torchrun starts on the CPU."""

import copy
import shlex
import subprocess
import sys

import pytest
from helpers import REPOSITORY, make_reviews
from tiny_models import TINY_CONFIGS, save_encoder

import train_bert_hf
import train_gpt
from finetuning.checkpoint import CHECKPOINT, read_checkpoint
from finetuning.reporting.plots import CURVES
from finetuning.reporting.records import PREDICTIONS, RECORD, read_predictions, read_record

TINY_GPT = REPOSITORY / "tests" / "tiny_gpt.py"


def torchrun(script, *arguments):
    """Run a script in two processes; return the CompletedProcess."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script]
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, timeout=240)


@pytest.fixture
def settings(tmp_path):
    """Arguments of a run whose datasets and batches are not divisible by the number of processes."""
    for seed, (split, count) in enumerate({"train": 47, "validation": 17, "test": 23}.items()):
        make_reviews(count, seed).to_csv(tmp_path / f"{split}.csv", index=False)
    arguments = shlex.split(
        "--trainable_layers all --num_epochs 2 --batch_size 7 --eval_freq 2 --learning_rate 1e-3 --context_length 24 "
        "--precision fp32"
    )
    return ["--data_dir", str(tmp_path), *arguments]


@pytest.fixture
def gpt(settings, tiny_gpt):
    return ["--model_size", tiny_gpt, "--weights", "random", *settings]


def assert_same_run(one, several):
    """Assert that two runs' folders hold the same losses, accuracies and predictions, within 1e-4, and nothing else."""
    expected, record = read_record(one), read_record(several)
    assert record["losses"] == pytest.approx(expected["losses"], abs=1e-4)
    assert len(set(record["losses"])) == 12
    for key in ("eval_history", "epoch_metrics"):
        for row, expected_row in zip(record[key], expected[key], strict=True):
            assert row == pytest.approx(expected_row, abs=1e-4)
    assert record["accuracy"] == expected["accuracy"]
    assert record["reviews"] == expected["reviews"] == {"train": 47, "validation": 17, "test": 23}
    predictions, expected = read_predictions(several, record), read_predictions(one, expected)
    assert predictions["label"].tolist() == expected["label"].tolist()
    assert predictions["probability"].tolist() == pytest.approx(expected["probability"].tolist(), abs=1e-4)
    assert sorted(path.name for path in several.iterdir()) == [CURVES, RECORD, PREDICTIONS]


def test_two_processes_give_the_same_run_as_one(gpt, tmp_path, capsys):
    done = torchrun(TINY_GPT, *gpt, "--output_dir", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "token_cache").iterdir())) == 3
    train_gpt.main([*gpt, "--output_dir", str(tmp_path / "one")])
    printed = capsys.readouterr().out
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert [line for line in done.stdout.splitlines() if "minutes" not in line] == [
        line for line in printed.splitlines() if "minutes" not in line
    ]
    assert done.stderr.count("Record: ") == 1
    record = read_record(tmp_path / "two")
    assert record["hardware"].startswith("2 processes, each on ")
    assert record["command"].startswith("torchrun --nproc_per_node 2 tiny_gpt.py --model_size ")


# Some models of the Hub have a trainable parameter that the forward pass does not use.
UNUSED = """
import runpy, sys
sys.path.insert(0, {repository!r})
import torch
from finetuning import experiment
setup_model = experiment.setup_model

def add_unused_parameter(run, task):
    task.model.unused = torch.nn.Parameter(torch.ones(3))
    return setup_model(run, task)
experiment.setup_model = add_unused_parameter
runpy.run_path({script!r}, run_name="__main__")
"""


def test_two_processes_with_micro_batches_give_the_same_run_as_one(settings, tmp_path):
    """Micro-batches of a batch of 7 are 2 + 2 and 2 + 1 reviews; one parameter gets no gradient."""
    config = copy.deepcopy(TINY_CONFIGS["bert"])
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    save_encoder(tmp_path / "model", config)
    command = ["--model", str(tmp_path / "model"), *settings]
    script = tmp_path / "script.py"
    script.write_text(UNUSED.format(repository=str(REPOSITORY), script=str(REPOSITORY / "train_bert_hf.py")))
    done = torchrun(script, *command, "--micro_batch_size", 2, "--output_dir", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    train_bert_hf.main([*command, "--output_dir", str(tmp_path / "one")])
    assert_same_run(tmp_path / "one", tmp_path / "two")


# A run with dropout whose processes are interrupted in evaluation `stop` of a loss. Rank 1 has another output folder,
# as on another machine, and so no checkpoint.
INTERRUPTED = """
import os, runpy, signal, sys
if os.environ["RANK"] != "0":
    sys.argv[-1] += "-elsewhere"
sys.path.insert(0, {repository!r})
import train_gpt
from finetuning import training
mean_loss, calls = training.mean_loss, []

def interrupted_mean_loss(reviews, classifier):
    calls.append(1)
    if len(calls) == {stop}:
        signal.raise_signal(signal.SIGINT)
    return mean_loss(reviews, classifier)
training.mean_loss = interrupted_mean_loss
train_gpt.BASE_CONFIG["drop_rate"] = 0.3
runpy.run_path({script!r}, run_name="__main__")
"""


def test_two_processes_resumed_from_a_checkpoint_give_the_same_run(gpt, tmp_path):
    scripts = {}
    for name, stop in (("interrupted.py", 6), ("uninterrupted.py", None)):
        scripts[name] = tmp_path / name
        scripts[name].write_text(INTERRUPTED.format(repository=str(REPOSITORY), script=str(TINY_GPT), stop=stop))
    done = torchrun(scripts["interrupted.py"], *gpt, "--output_dir", tmp_path / "resumed")
    assert done.returncode != 0
    assert done.stderr.count(f"Interrupted; to resume: torchrun --nproc_per_node 2 {TINY_GPT} ") == 1
    state = read_checkpoint(tmp_path / "resumed" / CHECKPOINT)["train_state"]
    assert len(state["eval_history"]) == 2
    assert not (tmp_path / "resumed" / RECORD).exists()
    for folder, resume in (("resumed", ["--resume"]), ("expected", [])):
        done = torchrun(scripts["uninterrupted.py"], *gpt, *resume, "--output_dir", tmp_path / folder)
        assert done.returncode == 0, done.stderr
    record, expected = (read_record(tmp_path / folder) for folder in ("resumed", "expected"))
    for key in ("losses", "eval_history", "epoch_metrics", "accuracy"):
        assert record[key] == expected[key]
    assert not list(tmp_path.glob("*-elsewhere"))


def test_user_error_in_both_processes_is_printed_once(gpt):
    done = torchrun(TINY_GPT, *gpt, "--batch_size", 1)
    assert done.returncode != 0
    assert done.stdout == ""
    assert script_errors(done) == ["--batch_size 1 is less than the 2 processes"]


# Only the last rank raises an error.
FAILING_RANK = """
import os, runpy, sys
sys.path.insert(0, {repository!r})
from finetuning import experiment
from finetuning.system.errors import UserError

def fail(*arguments, **settings):
    raise UserError("expected failure")
if os.environ["RANK"] == "1":
    experiment.build_optimizers = fail
runpy.run_path({script!r}, run_name="__main__")
"""


def test_user_error_in_one_process_is_printed_once(gpt, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(FAILING_RANK.format(repository=str(REPOSITORY), script=str(TINY_GPT)))
    done = torchrun(script, *gpt, "--output_dir", tmp_path / "run")
    assert done.returncode != 0
    assert done.stdout == ""
    assert script_errors(done) == ["expected failure"]
    assert "Error: " not in done.stderr.replace("ChildFailedError: ", "")


# One rank dies as if the system had killed it.
KILLED = """
import os, runpy, signal, sys
sys.path.insert(0, {repository!r})
from finetuning import {module}
original = {module}.{function}

def kill(*arguments, **settings):
    if os.environ["RANK"] == "{rank}":
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments, **settings)
{module}.{function} = kill
runpy.run_path({script!r}, run_name="__main__")
"""


@pytest.mark.parametrize(("rank", "module", "function"), [(1, "training", "batch_loss"), (0, "experiment", "prepare")])
def test_killed_process_is_reported_by_another(rank, module, function, gpt, tmp_path):
    """Rank 1 is killed in training, and rank 0 before it, while the other rank waits."""
    script = tmp_path / "script.py"
    script.write_text(
        KILLED.format(repository=str(REPOSITORY), script=str(TINY_GPT), rank=rank, module=module, function=function)
    )
    done = torchrun(script, *gpt, "--output_dir", tmp_path / "run")
    assert done.returncode != 0
    assert script_errors(done) == [
        f"process {rank} was killed, probably because the machine ran out of memory; "
        "try fewer processes (--nproc_per_node) or a smaller --micro_batch_size"
    ]
    assert "Error: " not in done.stderr.replace("ChildFailedError: ", "")


def script_errors(done):
    """Return the errors that the scripts, not torchrun, have printed."""
    return [line.partition(".py: ")[2] for line in done.stderr.splitlines() if ".py: " in line]
