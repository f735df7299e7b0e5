"""Runs of several real processes, started by torchrun on this machine's CPU."""

import copy
import subprocess
import sys

import pytest
import torch
from conftest import REPOSITORY, TINY_CONFIGS, reviews, save_encoder

import train_bert_hf
import train_gpt
from finetuning import cli, distributed
from finetuning.checkpoint import CHECKPOINT
from finetuning.errors import UserError
from finetuning.plots import CURVES
from finetuning.records import PREDICTIONS, RECORD, read_predictions, read_record
from finetuning.runtime import select_device

TINY_GPT = REPOSITORY / "tests" / "tiny_gpt.py"


def torchrun(script, *arguments):
    """Run a script in two processes; returns what subprocess.run does."""
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
                           script, *map(str, arguments)], capture_output=True, text=True, timeout=240)


@pytest.fixture
def settings(tmp_path):
    """Arguments of a run whose training, validation and test set and batches no number of processes divides."""
    for seed, (split, count) in enumerate({"train": 47, "validation": 17, "test": 23}.items()):
        reviews(count, seed).to_csv(tmp_path / f"{split}.csv", index=False)
    return ["--data_dir", str(tmp_path), "--trainable_layers", "all", "--num_epochs", "2", "--batch_size", "7",
            "--eval_freq", "2", "--learning_rate", "1e-3", "--context_length", "24", "--precision", "fp32"]


@pytest.fixture
def gpt(settings, tiny_gpt):
    return ["--model_size", tiny_gpt, "--weights", "random", *settings]


def assert_same_run(one, several):
    """Two runs' folders hold the same losses, accuracies and predictions, within 1e-4, and nothing else."""
    expected, record = read_record(one), read_record(several)
    assert record["losses"] == pytest.approx(expected["losses"], abs=1e-4)
    assert len(set(record["losses"])) == 12
    for key in ("curve", "epochs"):
        for row, expected_row in zip(record[key], expected[key], strict=True):
            assert row == pytest.approx(expected_row, abs=1e-4)
    assert record["accuracy"] == expected["accuracy"]
    assert record["reviews"] == expected["reviews"] == {"train": 47, "validation": 17, "test": 23}
    predictions, expected = read_predictions(several, record), read_predictions(one, expected)
    assert predictions["label"].tolist() == expected["label"].tolist()
    assert predictions["probability"].tolist() == pytest.approx(expected["probability"].tolist(), abs=1e-4)
    assert sorted(path.name for path in several.iterdir()) == [CURVES, RECORD, PREDICTIONS]


def test_two_processes_learn_what_one_does(gpt, tmp_path, capsys):
    done = torchrun(TINY_GPT, *gpt, "--output_dir", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "token_cache").iterdir())) == 3
    train_gpt.main([*gpt, "--output_dir", str(tmp_path / "one")])
    printed = capsys.readouterr().out
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert [line for line in done.stdout.splitlines() if "minutes" not in line] == [
        line for line in printed.splitlines() if "minutes" not in line]
    assert done.stderr.count("Record: ") == 1
    record = read_record(tmp_path / "two")
    assert record["hardware"].startswith("2 processes, each on ")
    assert record["command"].startswith("torchrun --nproc_per_node 2 tiny_gpt.py --model_size ")


# A weight that trains and is never used, as some models of the Hub have them.
UNUSED = """
import runpy, sys
sys.path.insert(0, {repository!r})
import torch
from finetuning import experiment
place = experiment.place

def place_with_unused(setting, model, *arguments):
    model.unused = torch.nn.Parameter(torch.ones(3))
    return place(setting, model, *arguments)
experiment.place = place_with_unused
runpy.run_path({script!r}, run_name="__main__")
"""


def test_two_processes_that_accumulate_learn_what_one_does(settings, tmp_path):
    """A batch of 7 is cut into shares of 4 and 3 reviews, and these into parts of 2, 1 and 1, and of 1, 1 and 1.

    A weight that gets no gradient is in nobody's way.
    """
    config = copy.deepcopy(TINY_CONFIGS["bert"])
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    save_encoder(tmp_path / "model", config)
    command = ["--model", str(tmp_path / "model"), *settings]
    script = tmp_path / "script.py"
    script.write_text(UNUSED.format(repository=str(REPOSITORY), script=str(REPOSITORY / "train_bert_hf.py")))
    done = torchrun(script, *command, "--accumulate", 3, "--output_dir", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    train_bert_hf.main([*command, "--output_dir", str(tmp_path / "one")])
    assert_same_run(tmp_path / "one", tmp_path / "two")


# A run with dropout whose first process is interrupted while it is at step `stop`. The other one writes to a folder of
# its own, as on another machine: there is no checkpoint.
INTERRUPTED = """
import os, runpy, signal, sys
if os.environ["RANK"] != "0":
    sys.argv[-1] += "-elsewhere"
sys.path.insert(0, {repository!r})
import train_gpt
from finetuning import experiment

class Stopping(experiment.CheckpointWriter):
    def __call__(self, progress, now=False):
        if progress.step == {stop}:
            signal.raise_signal(signal.SIGINT)
            now = True
        super().__call__(progress, now)
experiment.CheckpointWriter = Stopping
train_gpt.BASE_CONFIG["drop_rate"] = 0.3
runpy.run_path({script!r}, run_name="__main__")
"""


def test_an_interrupted_run_of_two_processes_ends_in_the_same_numbers(gpt, tmp_path):
    scripts = {}
    for name, stop in (("cut.py", 8), ("whole.py", None)):
        scripts[name] = tmp_path / name
        scripts[name].write_text(INTERRUPTED.format(repository=str(REPOSITORY), script=str(TINY_GPT), stop=stop))
    done = torchrun(scripts["cut.py"], *gpt, "--output_dir", tmp_path / "cut")
    assert done.returncode != 0
    assert done.stderr.count("Interrupted; to go on: torchrun --nproc_per_node 2 tiny_gpt.py ") == 1
    assert CHECKPOINT in {path.name for path in (tmp_path / "cut").iterdir()}
    assert not (tmp_path / "cut" / RECORD).exists()
    for folder, resume in (("cut", ["--resume"]), ("whole", [])):
        done = torchrun(scripts["whole.py"], *gpt, *resume, "--output_dir", tmp_path / folder)
        assert done.returncode == 0, done.stderr
    cut, whole = (read_record(tmp_path / folder) for folder in ("cut", "whole"))
    for key in ("losses", "curve", "epochs", "accuracy"):
        assert cut[key] == whole[key]
    assert not list(tmp_path.glob("*-elsewhere"))


def test_a_mistake_is_one_line(gpt):
    done = torchrun(TINY_GPT, *gpt, "--batch_size", 1)
    assert done.returncode != 0
    assert done.stdout == ""
    assert said(done) == ["--batch_size 1 is too small for 2 processes with --accumulate 1: each part needs a review"]


# Only the last process is in trouble.
IN_TROUBLE = """
import os, runpy, sys
sys.path.insert(0, {repository!r})
from finetuning import experiment
from finetuning.errors import UserError

class Trouble:
    def __call__(self, *arguments, **settings):
        raise UserError("trouble")
if os.environ["RANK"] == "1":
    experiment.build_optimizer = Trouble()
runpy.run_path({script!r}, run_name="__main__")
"""


def test_trouble_in_one_process_is_one_line(gpt, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(IN_TROUBLE.format(repository=str(REPOSITORY), script=str(TINY_GPT)))
    done = torchrun(script, *gpt, "--output_dir", tmp_path / "run")
    assert done.returncode != 0
    assert done.stdout == ""
    assert said(done) == ["trouble"]
    assert "Error: " not in done.stderr.replace("ChildFailedError: ", "")


# The last process dies as if the system had killed it.
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


@pytest.mark.parametrize(("rank", "module", "function"), [(1, "loop", "calc_loss_batch"), (0, "experiment", "prepare")])
def test_a_process_killed_by_the_system_is_one_line_of_another(rank, module, function, gpt, tmp_path):
    """In the midst of training, and before, while the others wait for it."""
    script = tmp_path / "script.py"
    script.write_text(KILLED.format(repository=str(REPOSITORY), script=str(TINY_GPT), rank=rank, module=module,
                                    function=function))
    done = torchrun(script, *gpt, "--output_dir", tmp_path / "run")
    assert done.returncode != 0
    assert said(done) == [f"process {rank} died without an error message, as where the system kills one for want of "
                          "memory; try fewer processes (--nproc_per_node) or --accumulate 2 or more"]
    assert "Error: " not in done.stderr.replace("ChildFailedError: ", "")


def said(done):
    """What the processes themselves, rather than torchrun, said was wrong."""
    return [line.partition(".py: ")[2] for line in done.stderr.splitlines() if ".py: " in line]


@pytest.mark.parametrize("variables", [
    {"WORLD_SIZE": "2"}, {"WORLD_SIZE": "several"}, {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"},
    {"TORCHELASTIC_RUN_ID": "over", "WORLD_SIZE": "2", "RANK": "0"},
    {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}])
def test_variables_that_torchrun_did_not_set_are_ignored(variables, monkeypatch):
    for name in (*cli.TORCHRUN, *variables):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with distributed.processes():
        assert (distributed.rank(), distributed.size()) == (0, 1)
    assert cli.launcher() == ["python"]
    cli.run(lambda: None)


@pytest.fixture
def process(monkeypatch):
    """Pretend to be the process of the given rank among `size`."""
    def pretend(rank, size):
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        monkeypatch.setattr(distributed, "size", lambda: size)
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(size))
    return pretend


def test_shares_hold_each_review_once(process):
    shares = []
    for rank in range(3):
        process(rank, 3)
        shares.append(distributed.share(torch.arange(8)).tolist())
    assert shares == [[0, 1, 2], [3, 4, 5], [6, 7]]


def test_each_process_draws_its_own_dropout_which_the_step_alone_tells(process):
    def draw(rank, seed, step):
        process(rank, 2)
        torch.manual_seed(5)
        distributed.seed_apart(seed, step)
        return torch.rand(())
    torch.manual_seed(5)
    assert torch.rand(()) == draw(0, 123, 4)  # the first draws what a single process would
    drawn = [draw(0, 123, 4), draw(1, 123, 4), draw(1, 123, 5), draw(1, 124, 4)]
    assert len(set(map(float, drawn))) == 4
    assert draw(1, 123, 4) == drawn[1]


def test_each_process_has_its_own_gpu(process, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    process(1, 2)
    assert select_device("cuda") == torch.device("cuda", 1)
    assert chosen == [torch.device("cuda", 1)]
    assert distributed.own_device(torch.device("cpu")) == torch.device("cpu")
    process(2, 3)
    with pytest.raises(UserError, match="--nproc_per_node 3 is more than this machine's 2 GPUs"):
        distributed.own_device(torch.device("cuda"))


@pytest.mark.parametrize("name", ["cuda:1", "mps"])
def test_a_device_that_processes_cannot_share_is_refused(process, name):
    process(0, 2)
    with pytest.raises(UserError, match=f"--device {name}: under torchrun choose cpu or cuda"):
        distributed.own_device(torch.device(name))
