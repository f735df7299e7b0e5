"""Whole runs on pretend GPUs, of every GPT mode and every encoder; and what the pretend GPUs themselves must notice."""

import pytest
import torch
from conftest import TINY_CONFIGS, reviews, save_encoder
from pretend_device import DeviceMismatch, pretend_device
from test_checkpoint import Killed, kill_after
from test_loop import small_classifier

import predict
import train_bert_hf
import train_gpt
from finetuning import checkpoint, records
from finetuning.batches import Batch, IMDbDataset
from finetuning.loop import EVALUATION_TOKENS
from finetuning.loop import predict as predict_logits
from finetuning.tokens import flatten

KINDS = ["cuda", "mps"]
FLEXIBLE = ["--trainable_token_pos", "flexible"]
GPT_MODES = [[], ["--trainable_token_pos", "first"], FLEXIBLE, ["--average_embeddings"],
             [*FLEXIBLE, "--average_embeddings"]]


@pytest.fixture
def flags(tmp_path, monkeypatch):
    """Arguments of a run of 4 steps in two epochs that saves a checkpoint after each of them."""
    monkeypatch.setattr("finetuning.experiment.draw_run", lambda folder: None)  # a third of the time
    for seed, (split, count) in enumerate({"train": 16, "validation": 8, "test": 9}.items()):
        reviews(count, seed).to_csv(tmp_path / f"{split}.csv", index=False)
    return ["--data_dir", str(tmp_path), "--num_epochs", "2", "--eval_freq", "2", "--eval_iter", "1",
            "--learning_rate", "1e-3", "--context_length", "16", "--checkpoint_minutes", "1e-9"]


@pytest.fixture
def rehearse(flags, tmp_path, monkeypatch, capsys):
    """Train on a pretend device, be killed after step 3, resume, and check predict.py's output; return the record."""
    def run(script, device, *arguments, **pretended):
        folder = tmp_path / "rehearsal"
        arguments = [*arguments, *flags, "--device", device, "--output_dir", str(folder)]
        kind = device.partition(":")[0]
        with pretend_device(kind, **pretended), monkeypatch.context() as patch:
            kill_after(patch, 3)
            with pytest.raises(Killed):
                script.main(arguments)
        with pretend_device(kind, **pretended):
            script.main([*arguments, "--save_model", "--resume"])
            record = records.read_record(folder)
            capsys.readouterr()
            predict.main([str(folder), "--device", device, "--csv", str(tmp_path / "test.csv")])
        answers = [line.split("\t")[:2] for line in capsys.readouterr().out.splitlines()]
        positive = [float(p) if label == "positive" else 1 - float(p) for label, p in answers]
        assert positive == pytest.approx(probabilities(folder), abs=1e-5)
        return record
    return run


@pytest.fixture
def run_whole(flags, tmp_path):
    """Train without an interruption on a device that is there; return the record."""
    def run(script, device, *arguments):
        folder = tmp_path / "whole"
        script.main([*arguments, *flags, "--device", device, "--output_dir", str(folder)])
        return records.read_record(folder)
    return run


def probabilities(folder):
    return records.read_predictions(folder, records.read_record(folder))["probability"].tolist()


@pytest.mark.parametrize("layers", ["all", "last_block", "last_layer"])
@pytest.mark.parametrize("mode", GPT_MODES, ids="-".join)
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpt_trains_there_as_on_the_cpu(kind, mode, layers, tiny_gpt, rehearse, run_whole, tmp_path):
    """Without dropout a device is to make no difference."""
    arguments = ["--model_size", tiny_gpt, "--weights", "random", "--trainable_layers", layers, *mode,
                 "--precision", "fp32"]
    expected, record = run_whole(train_gpt, "cpu", *arguments), rehearse(train_gpt, kind, *arguments)
    assert record["losses"] == pytest.approx(expected["losses"], abs=1e-5)
    assert len(set(record["losses"])) == 4
    assert probabilities(tmp_path / "rehearsal") == pytest.approx(probabilities(tmp_path / "whole"), abs=1e-5)


@pytest.mark.parametrize(("name", "device", "arguments"), [
    *[(name, kind, []) for name in TINY_CONFIGS for kind in KINDS],
    *[(name, "cuda", ["--trainable_layers", layers]) for name in TINY_CONFIGS if name != "modernbert-large"
      for layers in ("last_block", "last_layer")],
    ("bert", "cuda:1", []), ("bert", "cuda:1", ["--trainable_layers", "last_layer"]),
    *[("roberta", kind, ["--optimizer", "muon"]) for kind in KINDS],
    ("bert", "cuda", ["--use_attention_mask", "false", "--group_by_length", "--accumulate", "2"])])
@pytest.mark.filterwarnings("ignore:at..frobenius_norm is deprecated")  # of PyTorch's Muon on MPS
def test_an_encoder_resumed_there_ends_in_the_same_numbers(name, device, arguments, rehearse, run_whole, tmp_path):
    """With dropout drawn on the device, and on CUDA in bf16."""
    save_encoder(tmp_path / "model", TINY_CONFIGS[name])
    arguments = ["--model", str(tmp_path / "model"), *arguments]
    with pretend_device(device.partition(":")[0], count=2):
        expected = run_whole(train_bert_hf, device, *arguments)
    record = rehearse(train_bert_hf, device, *arguments, count=2)
    assert record["precision"]["used"] == ("fp32" if device == "mps" else "bf16")
    for key in ("losses", "curve", "epochs", "accuracy"):
        assert record[key] == expected[key]


@pytest.mark.parametrize("kind", KINDS)
def test_an_evaluation_for_which_memory_is_too_small_there_empties_the_cache(kind, monkeypatch):
    monkeypatch.setitem(EVALUATION_TOKENS, kind, 64)
    dataset = IMDbDataset(flatten([[i] for i in range(64)], [0] * 64), pad_token_id=0)
    emptied = []
    with pretend_device(kind):
        monkeypatch.setattr(getattr(torch, kind), "empty_cache", lambda: emptied.append(1))
        classifier = small_classifier(20, device=torch.device(kind, 0))
        logits = predict_logits(dataset, classifier)
        monkeypatch.undo()
    assert logits[:, 1].tolist() == list(range(64))
    assert [tokens for tokens, _ in classifier.model.batches] == [64, 32, 16, 16, 16, 16]
    assert emptied == [1, 1]


def state_of_another_device(device):
    return {"cpu": torch.get_rng_state(), device.type: torch.get_rng_state()}


def labels_left_behind(batch, device):
    return Batch(*(tensor if tensor is None or tensor is batch.labels else tensor.to(device) for tensor in batch))


def logits_in_float64(model, batch):
    return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.double()


@pytest.mark.parametrize(("device", "target", "broken", "error", "message"), [
    ("cuda", (Batch, "to"), labels_left_behind, DeviceMismatch, "expected all tensors to be on the same device"),
    ("mps", (train_bert_hf, "read_logits"), logits_in_float64, TypeError, "MPS has no float64"),
    *[(device, (checkpoint, "random_state"), state_of_another_device, AssertionError, None)
      for device in ("cuda", "cuda:1", "mps")]])
def test_a_rehearsal_notices_what_only_a_gpu_would(device, target, broken, error, message, rehearse, run_whole,
                                                   monkeypatch, tmp_path):
    monkeypatch.setattr(*target, broken)
    with pytest.raises(error, match=message):
        test_an_encoder_resumed_there_ends_in_the_same_numbers("bert", device, [], rehearse, run_whole, tmp_path)


def test_tensors_of_different_devices_do_not_meet():
    with pretend_device("cuda", count=2):
        x = torch.ones(3, device="cuda")
        assert x.device == torch.device("cuda", 0)
        assert (x * torch.tensor(2.0) + 1).tolist() == [3, 3, 3]  # a tensor without dimensions may
        assert x[torch.tensor([0, 2])].shape == (2,)  # so may indices
        for other in (torch.ones(3), torch.ones(3, device="cuda:1")):
            with pytest.raises(DeviceMismatch, match="cuda:0.*cpu|cuda:1"):
                x + other
        with pytest.raises(DeviceMismatch):
            torch.ones(3)[torch.zeros(1, dtype=torch.int64, device="cuda")]
        with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
            x.numpy()
        assert type(x.cpu()) is type(torch.ones(3).to("cuda").to("cpu")) is torch.Tensor


def test_mps_has_no_float64():
    with pretend_device("mps"):
        x = torch.ones(3, device="mps")
        for make in (x.double, lambda: torch.ones(3, dtype=torch.float64, device="mps"),
                     lambda: torch.ones(3, dtype=torch.float64).to("mps")):
            with pytest.raises(TypeError, match="MPS has no float64"):
                make()
        assert x.cpu().double().dtype == torch.float64


@pytest.mark.parametrize("kind", KINDS)
def test_each_device_draws_from_a_generator_of_its_own(kind):
    with pretend_device(kind, count=2):
        module = getattr(torch, kind)
        torch.manual_seed(5)
        on_cpu, state = torch.rand(3), module.get_rng_state()
        on_gpu = torch.rand(3, device=kind).tolist()
        assert on_gpu == on_cpu.tolist()  # from the same seed
        torch.manual_seed(5)
        torch.rand(3, device=f"{kind}:1")
        assert torch.equal(torch.rand(3), on_cpu)
        assert torch.equal(module.get_rng_state(), state)
        torch.nn.functional.dropout(torch.ones(3, device=kind))
        assert not torch.equal(module.get_rng_state(), state)
        module.set_rng_state(state)
        assert torch.rand(3, device=kind).tolist() == on_gpu


def test_the_current_device_is_the_one_that_was_set():
    with pretend_device("cuda", count=2):
        state = torch.cuda.get_rng_state(0)
        torch.cuda.set_device("cuda:1")
        x = torch.ones(3, device="cuda")
        assert x.device == x.clone().to("cuda").device == torch.device("cuda", 1)
        torch.rand(3, device="cuda")
        assert torch.equal(torch.cuda.get_rng_state(0), state)
        assert not torch.equal(torch.cuda.get_rng_state(), state)
    assert not torch.cuda.is_available()


def test_gradients_are_where_their_parameters_are():
    with pretend_device("cuda"):
        model = torch.nn.Linear(2, 1).to("cuda")
        model(torch.ones(3, 2, device="cuda")).sum().backward()
        assert model.weight.grad.device == model.weight.device == torch.device("cuda", 0)
        assert model.weight.grad.tolist() == [[3, 3]]
