import json
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from tiny_models import TINY_CONFIGS, save_encoder
from torch import nn

import train_bert_hf
import train_gpt
from benchmarks import bf16_accuracy, implementations, limits, report, scaling, speed, timing
from benchmarks.experiments import EXPERIMENTS, Experiment
from finetuning.data.reviews import load_dataframes
from finetuning.performance import device
from finetuning.performance.gpt_classifier import GPTClassifier
from finetuning.system.errors import UserError
from finetuning.trainable_layers import set_trainable

CPU = torch.device("cpu")
FLAGS = ["--steps", "3", "--reviews", "10", "--context_length", "16", "--precision", "fp32", "--device", "cpu"]


@pytest.fixture
def tiny_experiments(tmp_path, tiny_gpt, monkeypatch):
    """Replace the models of three experiments by tiny ones."""
    save_encoder(tmp_path / "model", TINY_CONFIGS["bert"])
    gpt = ("--model_size", tiny_gpt, "--weights", "random", "--trainable_layers")
    encoder = Experiment(train_bert_hf, ("--model", str(tmp_path / "model"), "--trainable_layers", "all"))
    for name in ("gpt2-all", "gpt2-last_block", "gpt2-last_layer"):
        monkeypatch.setitem(EXPERIMENTS, name, Experiment(train_gpt, (*gpt, name.partition("-")[2])))
    for name in ("bert-all", "modernbert-base-all"):
        monkeypatch.setitem(EXPERIMENTS, name, encoder)


@pytest.fixture
def measure(tiny_experiments, data_dir):
    """Measure an implementation of an experiment in this process."""

    def run(name, implementation, *flags):
        arguments = [name, "--implementation", implementation, "--data_dir", str(data_dir), *FLAGS, *flags]
        return speed.measure(speed.parse_args(arguments))

    return run


def tiny_model(name):
    torch.manual_seed(0)
    return transformers.AutoModelForSequenceClassification.from_config(TINY_CONFIGS[name])


def measured(**parts):
    return {"run": 1.0, "step": 1.0, "review": 1.0, "tokenizing": 1.0, "peak_memory": 100} | parts


# limits


def test_count_flops_of_a_tiny_bert_equals_the_count_by_hand():
    width, hidden, blocks, classes = 16, 32, 2, 2
    flops = limits.count_flops(tiny_model("bert"), train_bert_hf.class_logits, longest=40)
    per_token = blocks * (4 * 2 * width * width + 2 * 2 * width * hidden)  # query, key, value, output; two feed-forward
    per_token_squared = blocks * 2 * 2 * width  # scores, weighted values
    per_review = 2 * width * width + 2 * width * classes  # pooler, classifier
    assert flops.evaluation == (0, per_review, per_token, per_token_squared)
    # Each product of the forward pass has two in the backward pass, for its input and for its weight.
    assert flops.training == (0, 3 * per_review, 3 * per_token, 3 * per_token_squared)
    expected = sum(per_review + n * per_token + n**2 * per_token_squared for n in (3, 5))
    assert flops.evaluation(np.array([3, 5])) == expected


def test_count_flops_leaves_out_the_gradients_of_frozen_layers():
    model = tiny_model("bert")
    set_trainable(model, "last_layer", SimpleNamespace(last_block=None, pooler_and_norm=[], head=model.classifier))
    flops = limits.count_flops(model, train_bert_hf.class_logits, longest=40)
    assert flops.training([9]) - flops.evaluation([9]) == 2 * 16 * 2  # the gradient of the classifier's weight


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_count_flops_is_exact_for_each_encoder_and_leaves_it_unchanged(name):
    model = tiny_model(name)
    attention, before = model.config._attn_implementation, {k: v.clone() for k, v in model.state_dict().items()}
    flops = limits.count_flops(model, train_bert_hf.class_logits, longest=32)
    count = limits.count_batch(limits.copy_to_meta(model), train_bert_hf.class_logits, 3, 13, train=True)
    assert flops.training([13] * 3) == count
    assert (flops.training.per_batch > 0) == (name == "deberta-v3-base")  # which projects the relative positions
    assert model.config._attn_implementation == attention
    assert model.config.pad_token_id is not None
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(p.is_meta or p.grad is not None for p in model.parameters())


def test_count_flops_of_gpt_computes_logits_at_one_position(tiny_gpt):
    model = train_gpt.instantiate_model(tiny_gpt, "random")
    train_gpt.replace_head(model, seed=1)
    flops = limits.count_flops(GPTClassifier(model), train_gpt.last_token_logits, longest=64)
    width = 8
    # The last block computes queries, outputs and feed-forward layers at one position, keys and values at all.
    first_block, last_block = 4 * 2 * width**2 + 2 * 2 * 4 * width**2, 2 * 2 * width**2
    assert flops.evaluation.per_token == first_block + last_block + 2 * 2 * width
    assert flops.evaluation.per_token_squared == 2 * 2 * width
    assert flops.evaluation.per_review == 2 * 2 * width**2 + 2 * 2 * 4 * width**2 + 2 * width * 2


def test_fit_flops_raises_if_the_count_is_not_quadratic():
    assert limits.fit_flops(lambda size, n: 7 + size * (5 + 3 * n + 2 * n**2), longest=50) == (7, 5, 3, 2)
    with pytest.raises(ValueError, match="not quadratic"):
        limits.fit_flops(lambda size, n: size * n**3, longest=50)


def test_linear_shapes_counts_all_linear_layers_but_the_head():
    model = tiny_model("bert")
    assert limits.linear_shapes(model, model.classifier) == {(16, 16): 2 * 4 + 1, (32, 16): 2, (16, 32): 2}
    roberta = tiny_model("roberta")
    assert sum(limits.linear_shapes(roberta, roberta.classifier).values()) == 2 * 6


def test_matrix_rate_weighs_layers_by_their_flops(monkeypatch):
    monkeypatch.setattr(limits, "time_linear", lambda x, weight: 1.0 if len(weight) == 4 else 3.0)
    shapes = {(4, 8): 2, (16, 8): 1}
    assert limits.matrix_rate(shapes, 10, "fp32", CPU) == 10 * 2 * (2 * 4 * 8 + 16 * 8) / (2 * 1.0 + 3.0)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_matrix_rate_multiplies_in_the_precision(precision, dtype, monkeypatch):
    shapes = []

    def time_linear(x, weight):
        assert x.dtype == weight.dtype == dtype
        shapes.append((*x.shape, *weight.shape))
        return limits_time_linear(x, weight)

    limits_time_linear = limits.time_linear
    monkeypatch.setattr(limits, "time_linear", time_linear)
    assert limits.matrix_rate({(4, 8): 2}, 10, precision, CPU) > 0
    assert set(shapes) == {(10, 8, 4, 8)}


# timing


@pytest.mark.parametrize(("kind", "interval"), [("cpu", 1), ("cuda", 5)])
def test_step_clock_times_intervals_without_the_first(kind, interval, monkeypatch):
    synchronized = []
    monkeypatch.setattr(timing, "synchronize", synchronized.append)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.steps_done**2)
    clock = timing.StepClock(torch.device(kind), num_steps=30)
    for _ in range(31):
        clock("state")
    ends = np.arange(interval, 31, interval)
    assert len(synchronized) == 31 // interval
    assert clock.seconds() == pytest.approx(np.diff(ends**2) / interval)
    # The mean of 1, 3, 5, ... is what the steps took.
    assert clock.means([2 * i + 1 for i in range(30)]) == pytest.approx(clock.seconds())


# implementations


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
    assert ("step_share" in seconds) == (is_project and name != "gpt2-last_layer")
    assert seconds["run"] == pytest.approx(
        seconds.get("caching", 0)
        + seconds.get("log_caching", 0)
        + 4_375 * seconds["step"]
        + 88 * 320 * seconds.get("log_review", seconds["review"])
        + 50_000 * seconds["review"]
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_measure_times_the_trainer(precision, measure):
    seconds = measure("bert-all", f"trainer_{precision}")
    assert seconds.keys() == {"run", "step", "review", "peak_memory"}
    assert all(value > 0 for value in seconds.values())


def test_shares_are_flops_per_second_over_the_matrix_rate(measure, monkeypatch):
    monkeypatch.setattr(limits, "matrix_rate", lambda *_: 1e6)
    seconds = measure("gpt2-all", "project", "--steps", "2")
    model = train_gpt.instantiate_model("gpt2-tiny (0M)", "random")
    train_gpt.replace_head(model, seed=1)
    flops = limits.count_flops(GPTClassifier(model), train_gpt.last_token_logits, longest=16)
    assert seconds["matrix_rate"] == 1e6
    # The published GPT-2 reads the last position of the padded row: padding counts.
    assert seconds["step_flops"] == flops.training([16] * 8)
    assert seconds["step_share"] == pytest.approx(flops.training([16] * 8) / seconds["step"] / 1e6)
    assert seconds["review_flops"] == flops.evaluation([16])
    assert seconds["review_share"] == pytest.approx(flops.evaluation([16]) / seconds["review"] / 1e6)


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


def test_parse_args_refuses_a_single_step():
    with pytest.raises(UserError, match="--steps must be 2 or more: the first one warms up"):
        speed.parse_args(["--steps", "1"])


def test_parse_args_refuses_an_unknown_experiment():
    with pytest.raises(UserError, match="must be one of gpt2-all, .*, not 'gpt3'"):
        speed.parse_args(["gpt3"])


def test_prepare_restores_the_script_after_an_error(tiny_experiments, data_dir):
    args = speed.parse_args(["gpt2-all", "--data_dir", str(data_dir / "missing")])
    before = train_gpt.finetune
    with pytest.raises(UserError):
        implementations.prepare(args, EXPERIMENTS["gpt2-all"])
    assert train_gpt.finetune is before


# speed


@pytest.fixture
def in_process(monkeypatch, tiny_experiments):
    """Measure in this process instead of one each, and collect the implementations measured."""
    calls = []

    def measure(args, name, implementation, deadline):
        calls.append((name, implementation))
        child = SimpleNamespace(**vars(args) | {"experiments": [name], "implementation": implementation})
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
    args = speed.parse_args(["--gpu", "bert-all", "--device", "cpu", "--rounds", "2"])
    assert (args.experiments, args.device, args.rounds, args.steps) == (["bert-all"], "cpu", 2, 30)


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_gpu_flag_needs_cuda():
    with pytest.raises(UserError, match="--device cuda is not on this machine"):
        speed.main(["--gpu"])


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


# report


def test_ratio_table_holds_the_median_of_the_rounds_ratios():
    rounds = [
        {"reference": measured(run=6.0, step=step), "project": measured(run=2.0, step=2.0)} for step in (2.0, 9.0, 4.0)
    ]
    assert report.ratio_table({"gpt2-all": rounds}).splitlines()[2:] == [
        "| gpt2-all | 3.00x | 2.00x | 1.00x | 1.00x | 1.00x |  |  |  |"
    ]


def test_ratio_table_counts_the_better_precision_of_the_trainer_for_each_part():
    trainers = {"trainer_fp32": measured(step=3.0, review=5.0), "trainer_bf16": measured(step=4.0, review=2.0)}
    rounds = [trainers | {"project": measured(), "project_compiled": measured(step=0.5)}]
    assert report.ratio_table({"bert-all": rounds}).splitlines()[2:] == [
        "| bert-all |  |  |  |  |  | 3.00x | 2.00x | 1.00x |",
        "| bert-all, compiled |  |  |  |  |  | 6.00x | 2.00x | 1.00x |",
    ]


def test_ratio_table_leaves_cells_empty_that_were_not_measured_or_do_not_compare():
    rows = {
        "data": [{"reference": {"run": 10.0, "peak_memory": 5}, "project": {"run": 4.0, "peak_memory": 10}}],
        "gpt2-last_layer": [{"reference": measured(run=8.0), "project": measured(caching=0.5, step=0.001)}],
    }
    assert report.ratio_table(rows).splitlines()[2:] == [
        "| data | 2.50x |  |  |  | 0.50x |  |  |  |",
        "| gpt2-last_layer | 8.00x |  |  | 1.00x | 1.00x |  |  |  |",
    ]


def test_share_table_holds_medians():
    shares = {"matrix_rate": 325e9, "step_flops": 1024.7e9, "review_flops": 42.69e9, "review_share": 0.824}
    rounds = [
        {"project": measured(precision="fp32", step_share=share, **shares), "reference": measured()}
        for share in (0.8, 0.851, 0.9)
    ]
    assert report.share_table({"gpt2-all": rounds, "logreg": [{"project": measured()}]}).splitlines()[2:] == [
        "| gpt2-all | fp32 | 325 GFLOP/s | 1,025 GFLOP | 85% | 42.7 GFLOP | 82% |"
    ]
    assert report.share_table({"logreg": [{"project": measured()}]}) == "Not measured yet."


def test_add_report_replaces_earlier_measurements_of_the_same_experiment(tmp_path):
    path = tmp_path / "speed.json"
    report.add_report(path, {"command": "1", "rows": {"data": [1], "logreg": [2]}})
    report.add_report(path, {"command": "2", "rows": {"logreg": [3]}})
    report.add_report(path, {"command": "3", "rows": {"data": [4], "bert-all": [5]}})
    assert report.read_reports(path) == [
        {"command": "2", "rows": {"logreg": [3]}},
        {"command": "3", "rows": {"data": [4], "bert-all": [5]}},
    ]
    assert report.merge_rows(report.read_reports(path)) == {"bert-all": [5], "data": [4], "logreg": [3]}


def test_update_page_writes_the_sections_between_their_markers(tmp_path):
    rounds = [{"reference": measured(run=2.0), "project": measured()}]
    for path in (report.PATH, report.GPU_PATH):
        report.add_report(tmp_path / path.name, {"hardware": "a GPU", "rows": {"logreg": rounds}})
    page = tmp_path / "README.md"
    lines = [f"<!-- {name}: written by benchmarks/speed.py --update_readme -->\nold\n<!-- end of {name} -->\nkept\n"
             for name in report.sections(tmp_path)]  # fmt: skip
    page.write_text("".join(lines))
    report.update_page(tmp_path)
    text = page.read_text()
    assert "old" not in text
    assert text.count("kept") == 3
    assert text.count("| logreg | 2.00x |") == 2
    assert "a GPU:\n\n| experiment |" in text
    report.update_page(tmp_path)
    assert page.read_text() == text
    page.write_text(lines[0])
    with pytest.raises(UserError, match="must have the lines"):
        report.update_page(tmp_path)


def test_page_holds_what_was_measured():
    page = (report.FOLDER / "README.md").read_text(encoding="utf-8")
    for name, content in report.sections().items():
        assert f"-->\n{content}\n<!-- end of {name} -->" in page
    bf16_report = json.loads((report.FOLDER / "bf16_accuracy.json").read_text(encoding="utf-8"))
    assert bf16_accuracy.accuracy_table(bf16_report["seeds"]) in page
    scaling_report = json.loads((report.FOLDER / "scaling.json").read_text(encoding="utf-8"))
    assert scaling.reviews_table(scaling_report["reviews"]) in page
    assert scaling.tokens_table(scaling_report["tokens"]) in page


# scaling and bf16_accuracy


def test_scaling_measures_reviews_and_steps(byte_tokenizer, tiny_gpt, data_dir, monkeypatch):
    monkeypatch.setitem(train_gpt.MODEL_CONFIGS, "gpt2-small (124M)", train_gpt.MODEL_CONFIGS[tiny_gpt])
    args = scaling.parse_args(["--data_dir", str(data_dir), "--precision", "fp32"])
    row = scaling.measure_reviews(args, 100)  # the 48 reviews of the training set, twice and 4 of them
    assert row["reviews"] == 100
    assert min(row["tokenizing"], row["cached"], row["batching"]) > 0
    assert scaling.measure_step(args, 16)["step"] > 0


def test_bf16_accuracy_compares_runs_of_the_train_script(data_dir, tmp_path, capsys):
    save_encoder(tmp_path / "model", TINY_CONFIGS["modernbert-base"])
    output = tmp_path / "bf16_accuracy.json"
    flags = {
        "--model": tmp_path / "model",
        "--data_dir": data_dir,
        "--seeds": 1,
        "--train": 16,
        "--test": 12,
        "--context_length": 16,
        "--learning_rate": 1e-3,
        "--output": output,
    }
    bf16_accuracy.main([str(word) for flag in flags.items() for word in flag])
    (row,) = json.loads(output.read_text())["seeds"]
    assert row["reviews"] == 12
    assert row["difference"] == pytest.approx(row["bf16"]["test"] - row["fp32"]["test"])
    assert row["bf16"]["last_loss"] == pytest.approx(row["fp32"]["last_loss"], abs=0.05)
    assert row["bf16"]["last_loss"] != row["fp32"]["last_loss"]
    assert "| mean |" in capsys.readouterr().out


def test_accuracy_table_holds_each_seed_and_the_mean():
    results = {"fp32": {"test": 0.9}, "bf16": {"test": 0.89}}
    row = {"seed": 1, "difference": -0.01, "interval": [-0.02, 0.0], "p_value": 0.051, **results}
    assert bf16_accuracy.accuracy_table([row, {**row, "bf16": {"test": 0.92}}]).splitlines()[2:] == [
        "| 1 | 90.00% | 89.00% | -1.00 points (-2.00 to +0.00) | 0.05 |",
        "| 1 | 90.00% | 92.00% | -1.00 points (-2.00 to +0.00) | 0.05 |",
        "| mean | 90.00% | 90.50% | +0.50 points | |",
    ]
