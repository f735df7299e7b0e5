import sys
import time
from types import SimpleNamespace

import pytest
import torch
from tiny_benchmarks import FLAGS, measured

from benchmarks import implementations, report, speed
from finetuning.performance import device
from finetuning.system.errors import UserError


@pytest.fixture
def in_process(monkeypatch, tiny_workloads):
    """Measure in this process instead of one each, and collect the implementations measured."""
    calls = []

    def measure(args, name, implementation, deadline):
        calls.append((name, implementation))
        child = SimpleNamespace(**vars(args) | {"workloads": [name], "implementation": implementation})
        return speed.measure(child)

    monkeypatch.setattr(speed, "measure_in_subprocess", measure)
    return calls


def test_main_measures_all_implementations_in_turns(in_process, data_dir, tmp_path, capsys):
    output = tmp_path / "speed.json"
    arguments = ["gpt2-all", "bert-all", "--peer", "trainer", "--rounds", "2", *FLAGS]
    speed.main([*arguments, "--data_dir", str(data_dir), "--output", str(output)])
    gpt = [("gpt2-all", name) for name in ("project", "reference")]
    bert = [("bert-all", name) for name in ("project", "reference", "trainer_fp32", "trainer_bf16")]
    assert in_process == gpt * 2 + bert * 2
    (written,) = report.read_reports(output)
    assert {name: len(rounds) for name, rounds in written["rows"].items()} == {
        "gpt2-all, fp32": 2,
        "bert-all, fp32": 2,
    }
    assert report.ratio_table(written["rows"]) in capsys.readouterr().out


def test_gpu_flag_measures_three_models_with_and_without_compile(in_process, data_dir, tmp_path, monkeypatch, capsys):
    args = speed.parse_args(["--gpu"])
    assert (args.device, args.steps, args.minutes, args.output) == ("cuda", 30, 10.0, "benchmarks/speed_gpu.json")
    compiled = []
    monkeypatch.setattr(device, "check_compiler", lambda device: None)
    monkeypatch.setattr(implementations, "setup_model", lambda context, task: setup_model(context, task, compiled))
    output = tmp_path / "gpu.json"
    speed.main(["--gpu", *FLAGS, "--data_dir", str(data_dir), "--output", str(output)])
    encoder = ["project", "reference", "project_compiled", "trainer_fp32", "trainer_bf16"]
    names = ["bert-all", "modernbert-base-all"]
    assert in_process == [
        *[("gpt2-all", name) for name in encoder[:3]],
        *[(name, implementation) for name in names for implementation in encoder],
    ]
    assert compiled == [False, True] * 3
    assert len(report.read_reports(output)[-1]["rows"]) == 3
    assert "gpt2-all, fp32, compiled" in capsys.readouterr().out


def setup_model(context, task, compiled):
    """Set up the model without compiling it, which takes long."""
    compiled.append(context.args.compile)
    context.args.compile = False
    return experiment_setup_model(context, task)


experiment_setup_model = implementations.setup_model


def test_gpu_flag_keeps_the_flags_that_are_given():
    args = speed.parse_args(["--gpu", "bert-all", "--device", "auto", "--rounds", "3"])
    # Both values are the defaults without --gpu.
    assert (args.workloads, args.device, args.rounds, args.steps) == (["bert-all"], "auto", 3, 30)


def test_main_reports_what_failed_and_keeps_the_rest(monkeypatch, tmp_path):
    results = {"project": measured(), "reference": None}
    monkeypatch.setattr(speed, "measure_in_subprocess", lambda args, name, implementation, _: results[implementation])
    output = tmp_path / "speed.json"
    with pytest.raises(UserError, match=r"not measured: logreg \(reference\)"):
        speed.main(["logreg", "--rounds", "1", "--output", str(output)])
    assert report.read_reports(output)[0]["rows"] == {"logreg": [{"project": measured()}]}


def test_main_writes_nothing_without_a_measurement_of_the_project(monkeypatch, tmp_path):
    results = {"project": None, "reference": measured()}
    monkeypatch.setattr(speed, "measure_in_subprocess", lambda args, name, implementation, _: results[implementation])
    with pytest.raises(UserError, match=r"not measured: logreg \(project\)"):
        speed.main(["logreg", "--rounds", "1", "--output", str(tmp_path / "speed.json")])
    assert not (tmp_path / "speed.json").exists()


def test_gpu_flag_needs_cuda():
    with pytest.raises(UserError, match="--device cuda is not on this machine"):
        speed.main(["--gpu"])


def test_peer_is_refused_on_several_gpus(monkeypatch):
    """The Trainer trains with DataParallel on all of them, this project on one."""
    monkeypatch.setattr(speed, "select_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="would use all 2 GPUs; set CUDA_VISIBLE_DEVICES to one of them"):
        speed.main(["--gpu"])
    args = speed.parse_args(["--gpu", "gpt2-all"])  # which the Trainer does not measure
    speed.check_single_gpu(args, torch.device("cuda"))


def test_measure_in_subprocess_returns_what_the_process_measures(data_dir):
    args = speed.parse_args(["--data_dir", str(data_dir)])
    assert speed.measure_in_subprocess(args, "logreg", "reference", deadline=None).keys() == {"run", "peak_memory"}


def test_measure_in_subprocess_stops_at_the_deadline_and_survives_failures(monkeypatch, capsys):
    args = speed.parse_args([])
    assert speed.measure_in_subprocess(args, "logreg", "reference", deadline=time.monotonic()) is None
    assert "timed out" in capsys.readouterr().err
    monkeypatch.setattr(sys, "executable", "false")
    assert speed.measure_in_subprocess(args, "logreg", "reference", deadline=None) is None
    assert "non-zero exit status" in capsys.readouterr().err


def test_parse_args_refuses_a_single_step():
    with pytest.raises(UserError, match="--steps must be 2 or more: the first one warms up"):
        speed.parse_args(["--steps", "1"])


def test_parse_args_refuses_an_unknown_workload():
    with pytest.raises(UserError, match="must be one of gpt2-all, .*, not 'gpt3'"):
        speed.parse_args(["gpt3"])
