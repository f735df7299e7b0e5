"""Whole runs and single steps on a real CUDA GPU, skipped elsewhere; test_pretend_device.py simulates one."""

import copy

import pytest
import torch
from helpers import Killed, flags, kill_after_step, make_reviews
from tiny_models import TINY_CONFIGS, encoder_dataset, first_token_classifier, save_encoder
from torch import nn
from transformers import AutoModelForSequenceClassification

import train_bert_hf
import train_gpt
from finetuning.data.batching import IMDbDataset
from finetuning.data.tokenization import concatenate
from finetuning.optimizers import build_optimizers
from finetuning.performance.inference import EVAL_TOKENS_PER_BATCH, Classifier, predict_logits
from finetuning.reporting import records
from finetuning.training import forward_backward

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.filterwarnings("ignore"),  # of PyTorch's compiler
]
FLEXIBLE = ["--trainable_token_pos", "flexible"]
GPT_MODES = [[], FLEXIBLE, [*FLEXIBLE, "--average_embeddings"]]
NAMES = [name for name in TINY_CONFIGS if name not in ("minilm", "modernbert-large")]  # same architecture as another


@pytest.fixture
def train(data_dir, tiny_gpt, tmp_path):
    """Return a function that trains two epochs of six steps in a folder of its own and returns the record."""

    def run(name, *arguments, folder="run"):
        settings = {"num_epochs": 2, "eval_freq": 2, "eval_iter": 1, "learning_rate": 1e-3, "context_length": 16}
        arguments = [*arguments, *flags(data_dir=data_dir, output_dir=tmp_path / folder, **settings)]
        if name == "gpt2":
            train_gpt.main(["--model_size", tiny_gpt, "--weights", "random", *arguments])
        else:
            train_bert_hf.main(["--model", str(tmp_path / name), *arguments])
        return records.read_record(tmp_path / folder)

    return run


def save_model(name, folder, dropout=True):
    """Save a tiny encoder; without dropout if runs on different devices are to be compared."""
    if name != "gpt2":
        config = copy.deepcopy(TINY_CONFIGS[name])
        for key, value in config.to_dict().items():
            if not dropout and "dropout" in key and isinstance(value, float):
                setattr(config, key, 0.0)
        save_encoder(folder / name, config)


def assert_close(record, expected, tolerance):
    assert record["losses"] == pytest.approx(expected["losses"], abs=tolerance)
    for key in ("train_loss", "validation_loss"):
        values = [row[key] for row in record["eval_history"]]
        assert values == pytest.approx([row[key] for row in expected["eval_history"]], abs=tolerance)


@pytest.mark.parametrize("layers", ["all", "last_block", "last_layer"])
@pytest.mark.parametrize(("name", "mode"), [*[("gpt2", mode) for mode in GPT_MODES], *[(name, []) for name in NAMES]])
def test_fp32_losses_are_those_of_the_cpu(name, mode, layers, train, tmp_path):
    save_model(name, tmp_path, dropout=False)
    arguments = ["--trainable_layers", layers, "--precision", "fp32", *mode]
    expected = train(name, "--device", "cpu", *arguments, folder="cpu")
    record = train(name, "--device", "cuda", *arguments)
    assert_close(record, expected, tolerance=1e-4)
    assert record["hardware"] == torch.cuda.get_device_name()


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_bf16_and_tf32_losses_are_near_those_of_fp32(name, train, tmp_path):
    save_model(name, tmp_path, dropout=False)
    expected = train(name, "--precision", "fp32", "--trainable_layers", "all", folder="fp32")
    for precision in ("bf16", "tf32"):
        record = train(name, "--precision", precision, "--trainable_layers", "all", folder=precision)
        assert record["precision"]["dtype"] == precision
        assert_close(record, expected, tolerance=0.05)


@pytest.mark.parametrize("name", ["gpt2", *NAMES])
def test_killed_and_resumed_run_equals_an_uninterrupted_one(name, train, tmp_path, monkeypatch):
    """With dropout and in the precision of the device, whose sums of gradients may differ in order."""
    save_model(name, tmp_path)
    arguments = ["--trainable_layers", "all", "--checkpoint_minutes", "1e-9"]
    expected = train(name, *arguments, folder="uninterrupted")
    with monkeypatch.context() as patch:
        kill_after_step(patch, 5)
        with pytest.raises(Killed):
            train(name, *arguments)
    assert_close(train(name, *arguments, "--resume"), expected, tolerance=0.01)


@pytest.mark.parametrize(("name", "mode"), [("gpt2", []), ("gpt2", FLEXIBLE), ("bert", []), ("modernbert-base", [])])
def test_compiled_run_with_cuda_graphs_equals_a_plain_one(name, mode, train, tmp_path):
    save_model(name, tmp_path, dropout=False)
    arguments = ["--trainable_layers", "all", "--precision", "fp32", *mode]
    assert_close(train(name, "--compile", *arguments, folder="compiled"), train(name, *arguments), tolerance=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_training_step_does_not_wait_for_the_gpu(name, tmp_path):
    save_model(name, tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / name).cuda()
    classifier = Classifier(model, train_bert_hf.class_logits, torch.device("cuda"), "bf16")
    dataset, indices = encoder_dataset(make_reviews(8)), torch.arange(8)
    (optimizer,) = build_optimizers("adamw", model, learning_rate=1e-3)

    def step():
        loss = forward_backward(dataset, indices, classifier)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    step()  # libraries load and choose kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(loss)


def test_evaluation_out_of_gpu_memory_continues_in_smaller_batches(monkeypatch, capsys):
    monkeypatch.setitem(EVAL_TOKENS_PER_BATCH, "cuda", 64)
    bytes_per_token = torch.cuda.get_device_properties(0).total_memory // 32  # 64 and 32 tokens need too much

    class LargeModel(nn.Module):
        def forward(self, input_ids):
            torch.empty(input_ids.numel() * bytes_per_token, dtype=torch.uint8, device=input_ids.device)
            return first_token_classifier().model(input_ids)

    dataset = IMDbDataset(concatenate([[i] for i in range(64)], [0] * 64), pad_token_id=0)
    classifier = Classifier(LargeModel(), lambda model, batch: model(batch.input_ids), torch.device("cuda"))
    assert predict_logits(dataset, classifier)[:, 1].tolist() == list(range(64))
    assert classifier.eval_tokens <= 16
    assert "Out of memory with 64 reviews per batch" in capsys.readouterr().err
