import pytest
from tiny_benchmarks import FLAGS
from torch import nn

import train_gpt
from benchmarks import implementations, limits, speed
from benchmarks.workloads import WORKLOADS
from finetuning.data.reviews import load_dataframes
from finetuning.performance.gpt_classifier import GPTClassifier
from finetuning.system.errors import UserError


@pytest.fixture
def measure(tiny_workloads, data_dir):
    """Measure an implementation of a workload in this process."""

    def run(name, implementation, *flags):
        arguments = [name, "--implementation", implementation, "--data_dir", str(data_dir), *FLAGS, *flags]
        return speed.measure(speed.parse_args(arguments))

    return run


@pytest.mark.parametrize("name", ["gpt2-all", "gpt2-last_block", "gpt2-last_layer", "bert-all"])
@pytest.mark.parametrize("implementation", ["reference", "project"])
def test_measure_returns_positive_numbers(name, implementation, measure):
    seconds = measure(name, implementation)
    assert {"tokenizing", "step", "review", "run", "peak_memory"} <= seconds.keys()
    assert seconds.pop("precision", None) == ("fp32" if implementation == "project" else None)
    assert all(value > 0 for value in seconds.values())
    is_project = implementation == "project"
    assert ("caching" in seconds) == (is_project and name == "gpt2-last_layer")
    assert ("log_review" in seconds) == (is_project and name == "gpt2-last_block")
    assert ("step_utilization" in seconds) == (is_project and name != "gpt2-last_layer")
    assert seconds["run"] == pytest.approx(
        seconds.get("caching", 0)
        + seconds.get("log_caching", 0)
        + 4_375 * seconds["step"]
        + 88 * 320 * seconds.get("log_review", seconds["review"])
        + 50_000 * seconds["review"]
    )


def test_compilation_counts_in_the_whole_run(measure, monkeypatch):
    monkeypatch.setattr("finetuning.experiment.devices.check_compiler", lambda device: None)
    monkeypatch.setattr(nn.Module, "compile", lambda *_, **__: None)  # takes long
    monkeypatch.setattr("benchmarks.timing.StepClock.warm_up", lambda clock: 1e6)
    seconds = measure("bert-all", "project_compiled")
    assert seconds["compiling"] == pytest.approx(1e6, abs=100)  # and the evaluation's first call
    assert seconds["run"] == pytest.approx(
        seconds["compiling"] + 4_375 * seconds["step"] + (88 * 320 + 50_000) * seconds["review"]
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_measure_times_the_trainer(precision, measure):
    seconds = measure("bert-all", f"trainer_{precision}")
    assert seconds.keys() == {"run", "step", "review", "peak_memory"}
    assert all(value > 0 for value in seconds.values())


def test_shares_are_flops_per_second_over_the_matrix_rate(measure, monkeypatch):
    monkeypatch.setattr(limits, "matmul_throughput", lambda *_: 1e6)
    seconds = measure("gpt2-all", "project", "--steps", "2")
    model = train_gpt.instantiate_model("gpt2-tiny (0M)", "random")
    train_gpt.replace_head(model, seed=1)
    flops = limits.count_flops(GPTClassifier(model), train_gpt.last_token_logits, longest=16)
    assert seconds["matmul_throughput"] == 1e6
    # The published GPT-2 reads the last position of the padded row: padding counts.
    assert seconds["step_flops"] == flops.training([16] * 8)
    assert seconds["step_utilization"] == pytest.approx(flops.training([16] * 8) / seconds["step"] / 1e6)
    assert seconds["review_flops"] == flops.evaluation([16])
    assert seconds["review_utilization"] == pytest.approx(flops.evaluation([16]) / seconds["review"] / 1e6)


def test_shares_of_an_encoder_count_no_padding(measure, data_dir, monkeypatch):
    batches = []
    monkeypatch.setattr(limits, "count_flops", lambda *_: limits.Flops(count, count))

    def count(lengths):
        batches.append(lengths.tolist())
        return 1

    measure("bert-all", "project")
    own_lengths = [min(16, 2 + len(text.split())) for text in load_dataframes(data_dir)[0]["text"]]
    assert batches == [own_lengths[:8], own_lengths[8:16], own_lengths[16:24], own_lengths[:10]]


def test_all_implementations_train_on_the_same_batches_in_the_order_of_the_file(measure, data_dir):
    batches = {}

    def record(module, inputs):
        is_token_embedding = isinstance(module, nn.Embedding) and module.num_embeddings == 21
        if is_token_embedding and module.training and len(inputs[0]) == 8:
            batches[name].append([row[row != 0].tolist() for row in inputs[0]])

    hook = nn.modules.module.register_module_forward_pre_hook(record)
    try:
        for name in ("reference", "trainer_fp32", "project"):
            batches[name] = []
            measure("bert-all", name)
    finally:
        hook.remove()
    assert len(batches["reference"]) == 3
    assert batches["trainer_fp32"][:3] == batches["project"][:3] == batches["reference"]


def test_measure_refuses_more_reviews_than_there_are(measure):
    with pytest.raises(UserError, match="--steps 3 and --reviews 49 need 49 of 48 reviews"):
        measure("bert-all", "project", "--reviews", "49")


def test_prepare_restores_the_script_after_an_error(tiny_workloads, data_dir):
    args = speed.parse_args(["gpt2-all", "--data_dir", str(data_dir / "missing")])
    before = train_gpt.finetune
    with pytest.raises(UserError):
        implementations.prepare(args, WORKLOADS["gpt2-all"])
    assert train_gpt.finetune is before
