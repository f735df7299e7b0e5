"""Complete runs of every GPT mode and every encoder on simulated GPUs, and tests of the simulation itself."""

import shlex

import pytest
import torch
from helpers import Killed, kill_after_step, make_reviews
from pretend_device import pretend_device
from pretend_tensor import DeviceMismatch
from tiny_models import TINY_CONFIGS, limited_memory_classifier, save_encoder

import predict
import train_bert_hf
import train_gpt
from finetuning import checkpoint
from finetuning.data.batching import Batch, IMDbDataset
from finetuning.data.tokenization import concatenate
from finetuning.performance.inference import EVAL_TOKENS_PER_BATCH, predict_logits
from finetuning.reporting import records

KINDS = ["cuda", "mps"]
FLEXIBLE = ["--trainable_token_pos", "flexible"]
GPT_MODES = [
    [],
    ["--trainable_token_pos", "first"],
    FLEXIBLE,
    ["--average_embeddings"],
    [*FLEXIBLE, "--average_embeddings"],
]


@pytest.fixture
def flags(tmp_path, monkeypatch):
    """Arguments of a run of two epochs of two steps that saves a checkpoint after each step."""
    monkeypatch.setattr("finetuning.experiment.plot_run", lambda folder: None)  # saves a third of the time
    for seed, (split, count) in enumerate({"train": 16, "validation": 8, "test": 9}.items()):
        make_reviews(count, seed).to_csv(tmp_path / f"{split}.csv", index=False)
    arguments = "--num_epochs 2 --eval_freq 2 --eval_iter 1 --learning_rate 1e-3 --context_length 16"
    return ["--data_dir", str(tmp_path), *shlex.split(arguments), "--checkpoint_minutes", "1e-9"]


@pytest.fixture
def run_killed_and_resumed(flags, tmp_path, monkeypatch, capsys):
    """Train on a simulated device, killed after step 3 and resumed; check predict.py's output; return the record."""

    def run(script, device, *arguments, **simulated):
        folder = tmp_path / "resumed"
        arguments = [*arguments, *flags, "--device", device, "--output_dir", str(folder)]
        kind = device.partition(":")[0]
        with pretend_device(kind, **simulated), monkeypatch.context() as patch:
            kill_after_step(patch, 3)
            with pytest.raises(Killed):
                script.main(arguments)
        with pretend_device(kind, **simulated):
            script.main([*arguments, "--save_model", "--resume"])
            record = records.read_record(folder)
            capsys.readouterr()
            predict.main([str(folder), "--device", device, "--csv", str(tmp_path / "test.csv")])
        predictions = [line.split("\t")[:2] for line in capsys.readouterr().out.splitlines()]
        positive = [float(p) if label == "positive" else 1 - float(p) for label, p in predictions]
        assert positive == pytest.approx(probabilities(folder), abs=1e-5)
        return record

    return run


@pytest.fixture
def run_uninterrupted(flags, tmp_path):
    """Train without interruption on an existing or already simulated device; return the record."""

    def run(script, device, *arguments):
        folder = tmp_path / "uninterrupted"
        script.main([*arguments, *flags, "--device", device, "--output_dir", str(folder)])
        return records.read_record(folder)

    return run


def probabilities(folder):
    return records.read_predictions(folder, records.read_record(folder))["probability"].tolist()


@pytest.mark.parametrize("layers", ["all", "last_block", "last_layer"])
@pytest.mark.parametrize("mode", GPT_MODES, ids="-".join)
@pytest.mark.parametrize("kind", KINDS)
def test_gpt_run_on_a_gpu_equals_the_run_on_the_cpu(
    kind, mode, layers, tiny_gpt, run_killed_and_resumed, run_uninterrupted, tmp_path
):
    """Without dropout, which uses the generator of the device."""
    arguments = ["--model_size", tiny_gpt, "--weights", "random", "--trainable_layers", layers, *mode]
    arguments += ["--precision", "fp32"]
    expected = run_uninterrupted(train_gpt, "cpu", *arguments)
    record = run_killed_and_resumed(train_gpt, kind, *arguments)
    assert record["losses"] == pytest.approx(expected["losses"], abs=1e-5)
    assert len(set(record["losses"])) == 4
    assert probabilities(tmp_path / "resumed") == pytest.approx(probabilities(tmp_path / "uninterrupted"), abs=1e-5)


@pytest.mark.parametrize(
    ("name", "device", "arguments"),
    [
        *[(name, kind, []) for name in TINY_CONFIGS for kind in KINDS],
        *[
            (name, "cuda", ["--trainable_layers", layers])
            for name in TINY_CONFIGS
            if name != "modernbert-large"
            for layers in ("last_block", "last_layer")
        ],
        ("bert", "cuda:1", []),
        ("bert", "cuda:1", ["--trainable_layers", "last_layer"]),
        *[("roberta", kind, ["--optimizer", "muon"]) for kind in KINDS],
        ("bert", "cuda", ["--use_attention_mask", "false", "--group_by_length", "--micro_batch_size", "2"]),
    ],
)
@pytest.mark.filterwarnings("ignore:at..frobenius_norm is deprecated")  # from PyTorch's Muon on MPS
def test_resumed_encoder_run_on_a_gpu_equals_an_uninterrupted_one(
    name, device, arguments, run_killed_and_resumed, run_uninterrupted, tmp_path
):
    """With the device's dropout, and in bf16 on CUDA."""
    save_encoder(tmp_path / "model", TINY_CONFIGS[name])
    arguments = ["--model", str(tmp_path / "model"), *arguments]
    with pretend_device(device.partition(":")[0], count=2):
        expected = run_uninterrupted(train_bert_hf, device, *arguments)
    record = run_killed_and_resumed(train_bert_hf, device, *arguments, count=2)
    assert record["precision"]["dtype"] == ("fp32" if device == "mps" else "bf16")
    for key in ("losses", "eval_history", "epoch_metrics", "accuracy"):
        assert record[key] == expected[key]


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_out_of_memory_empties_the_gpu_cache(kind, monkeypatch):
    monkeypatch.setitem(EVAL_TOKENS_PER_BATCH, kind, 64)
    dataset = IMDbDataset(concatenate([[i] for i in range(64)], [0] * 64), pad_token_id=0)
    calls = []
    with pretend_device(kind):
        monkeypatch.setattr(getattr(torch, kind), "empty_cache", lambda: calls.append("empty_cache"))
        classifier = limited_memory_classifier(20, device=torch.device(kind, 0))
        logits = predict_logits(dataset, classifier)
        monkeypatch.undo()
    assert logits[:, 1].tolist() == list(range(64))
    assert [tokens for tokens, _ in classifier.model.batches] == [64, 32, 16, 16, 16, 16]
    assert calls == ["empty_cache"] * 2


def rng_state_of_another_device(device):
    return {"cpu": torch.get_rng_state(), device.type: torch.get_rng_state()}


def move_all_but_labels(batch, device):
    return Batch(*(tensor if tensor is None or tensor is batch.labels else tensor.to(device) for tensor in batch))


def logits_in_float64(model, batch):
    return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.double()


@pytest.mark.parametrize(
    ("device", "target", "broken", "error", "message"),
    [
        ("cuda", (Batch, "to"), move_all_but_labels, DeviceMismatch, "expected all tensors to be on the same device"),
        ("mps", (train_bert_hf, "class_logits"), logits_in_float64, TypeError, "MPS has no float64"),
        *[
            (device, (checkpoint, "get_rng_state"), rng_state_of_another_device, AssertionError, None)
            for device in ("cuda", "cuda:1", "mps")
        ],
    ],
)
def test_simulation_detects_errors_that_only_a_gpu_would_show(
    device, target, broken, error, message, run_killed_and_resumed, run_uninterrupted, monkeypatch, tmp_path
):
    monkeypatch.setattr(*target, broken)
    with pytest.raises(error, match=message):
        test_resumed_encoder_run_on_a_gpu_equals_an_uninterrupted_one(
            "bert", device, [], run_killed_and_resumed, run_uninterrupted, tmp_path
        )


def test_operators_on_tensors_of_different_devices_raise():
    with pretend_device("cuda", count=2):
        x = torch.ones(3, device="cuda")
        assert x.device == torch.device("cuda", 0)
        assert (x * torch.tensor(2.0) + 1).tolist() == [3, 3, 3]  # tensors without dimensions are allowed
        assert x[torch.tensor([0, 2])].shape == (2,)  # so are indices
        for other in (torch.ones(3), torch.ones(3, device="cuda:1")):
            with pytest.raises(DeviceMismatch, match="cuda:0.*cpu|cuda:1"):
                x + other
        with pytest.raises(DeviceMismatch):
            torch.ones(3)[torch.zeros(1, dtype=torch.int64, device="cuda")]
        with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
            x.numpy()
        assert type(x.cpu()) is type(torch.ones(3).to("cuda").to("cpu")) is torch.Tensor


def test_float64_on_mps_raises_type_error():
    with pretend_device("mps"):
        x = torch.ones(3, device="mps")
        for create in (
            x.double,
            lambda: torch.ones(3, dtype=torch.float64, device="mps"),
            lambda: torch.ones(3, dtype=torch.float64).to("mps"),
        ):
            with pytest.raises(TypeError, match="MPS has no float64"):
                create()
        assert x.cpu().double().dtype == torch.float64


@pytest.mark.parametrize("kind", KINDS)
def test_each_device_has_its_own_generator(kind):
    with pretend_device(kind, count=2):
        module = getattr(torch, kind)
        torch.manual_seed(5)
        on_cpu, state = torch.rand(3), module.get_rng_state()
        on_gpu = torch.rand(3, device=kind).tolist()
        assert on_gpu == on_cpu.tolist()  # torch.manual_seed seeds both
        torch.manual_seed(5)
        torch.rand(3, device=f"{kind}:1")
        assert torch.equal(torch.rand(3), on_cpu)
        assert torch.equal(module.get_rng_state(), state)
        torch.nn.functional.dropout(torch.ones(3, device=kind))
        assert not torch.equal(module.get_rng_state(), state)
        module.set_rng_state(state)
        assert torch.rand(3, device=kind).tolist() == on_gpu


def test_set_device_selects_the_current_device():
    with pretend_device("cuda", count=2):
        state = torch.cuda.get_rng_state(0)
        torch.cuda.set_device("cuda:1")
        x = torch.ones(3, device="cuda")
        assert x.device == x.clone().to("cuda").device == torch.device("cuda", 1)
        torch.rand(3, device="cuda")
        assert torch.equal(torch.cuda.get_rng_state(0), state)
        assert not torch.equal(torch.cuda.get_rng_state(), state)
    assert not torch.cuda.is_available()


def test_gradients_are_on_the_device_of_their_parameters():
    with pretend_device("cuda"):
        model = torch.nn.Linear(2, 1).to("cuda")
        model(torch.ones(3, 2, device="cuda")).sum().backward()
        assert model.weight.grad.device == model.weight.device == torch.device("cuda", 0)
        assert model.weight.grad.tolist() == [[3, 3]]
