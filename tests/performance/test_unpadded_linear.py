"""Training with `unpadded_linear` equals training on padded batches."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from tiny_models import CPU, MAX_LENGTH, TINY_CONFIGS, save_encoder
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForSequenceClassification

import predict
import train_bert_hf
from finetuning.data.batching import Batch
from finetuning.performance import inference
from finetuning.performance.inference import Classifier
from finetuning.performance.unpadded_linear import unpadded_linear
from finetuning.reporting.records import read_predictions, read_record
from finetuning.reporting.saved_models import read_settings

LENGTHS = (MAX_LENGTH, 5, 1, 13)


@pytest.fixture(autouse=True)
def row_multiple(monkeypatch):
    """Compute no padding as filler, which would be most of these small batches; return a function that changes it."""

    def change(multiple):
        monkeypatch.setattr("finetuning.performance.cpu_kernels.ROW_MULTIPLE", multiple)

    change(1)
    return change


class RecordLinearInputs(TorchFunctionMode):
    """Context that collects the shapes of the inputs of F.linear."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.linear:
            self.shapes.append(tuple(args[0].shape))
        return function(*args, **(kwargs or {}))


def make_batch(lengths=LENGTHS):
    """Return a batch of random reviews, padded to the longest and masked."""
    lengths = torch.tensor(lengths)
    mask = (torch.arange(lengths.max()) < lengths[:, None]).long()
    ids = torch.randint(5, 20, mask.shape) * mask + (1 - mask)  # padding has an ID that the tokenizers never mask
    return Batch(ids, mask, lengths, torch.zeros_like(lengths))


def make_model(name):
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(TINY_CONFIGS[name]).eval()


def logits_and_gradients(model, batch, context):
    """Return the logits, and the gradients of all parameters that have one."""
    model.zero_grad()
    with context:
        logits = train_bert_hf.class_logits(model, batch)
    (logits * torch.arange(1.0, 1 + logits.numel()).view_as(logits)).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), gradients


def assert_equal(actual, expected):
    torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=1e-6)
    assert actual[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(actual[1][name], gradient, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("lengths", [LENGTHS, (MAX_LENGTH, MAX_LENGTH)], ids=["padded", "without padding"])
@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_logits_and_gradients_equal_those_of_the_padded_batch(name, lengths):
    model, batch = make_model(name), make_batch(lengths)
    expected = logits_and_gradients(model, batch, nullcontext())
    assert all(gradient.isfinite().all() for gradient in expected[1].values())
    assert_equal(logits_and_gradients(model, batch, unpadded_linear(batch.attention_mask)), expected)


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_linear_layers_of_encoders_receive_non_padding_tokens_only(name):
    model, batch = make_model(name), make_batch()
    with RecordLinearInputs() as padded:
        train_bert_hf.class_logits(model, batch)
    with RecordLinearInputs() as unpadded, unpadded_linear(batch.attention_mask):
        train_bert_hf.class_logits(model, batch)
    num_skipping = 0
    for shape, padded_shape in zip(unpadded.shapes, padded.shapes, strict=True):
        skips = padded_shape[:-1] == batch.attention_mask.shape
        assert shape == ((sum(LENGTHS), padded_shape[-1]) if skips else padded_shape)
        num_skipping += skips
    assert num_skipping >= 8  # at least four in each of the two blocks


@pytest.mark.parametrize(("multiple", "num_rows"), [(16, 48), (64, 64), (100, 96)])
def test_filler_rows_make_few_numbers_of_rows(multiple, num_rows, row_multiple):
    """The batch has 43 non-padding tokens and 96 positions."""
    row_multiple(multiple)
    model, batch = make_model("bert"), make_batch()
    expected = logits_and_gradients(model, batch, nullcontext())
    with RecordLinearInputs() as recorded:
        assert_equal(logits_and_gradients(model, batch, unpadded_linear(batch.attention_mask)), expected)
    assert (num_rows, 16) in recorded.shapes


@pytest.mark.parametrize("bias", [True, False])
def test_output_is_zero_at_padding_and_linear_elsewhere(bias):
    layer, mask = torch.nn.Linear(3, 2, bias=bias), torch.tensor([[1, 1, 0], [1, 0, 0]])
    x = torch.randn(2, 3, 3, requires_grad=True)
    with unpadded_linear(mask):
        output = layer(x)
    torch.testing.assert_close(output, layer(x) * mask[..., None])
    (gradient,) = torch.autograd.grad(output.sum(), x)
    torch.testing.assert_close(gradient, layer.weight.sum(dim=0) * mask[..., None])


@pytest.mark.parametrize("shape", [(3,), (2, 3), (3, 2, 3), (2, 2, 3), (2, 3, 3, 3)])
def test_inputs_of_another_shape_are_left_as_they_are(shape):
    layer, x = torch.nn.Linear(3, 2), torch.randn(shape)
    with unpadded_linear(torch.tensor([[1, 1, 0], [1, 0, 0]])):
        output = layer(x)
    torch.testing.assert_close(output, layer(x), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["bert", "modernbert-base"])
def test_bf16_logits_keep_the_autocast_dtype(name):
    model, batch = make_model(name), make_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = train_bert_hf.class_logits(model, batch)
        with unpadded_linear(batch.attention_mask):
            logits = train_bert_hf.class_logits(model, batch)
    assert logits.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(logits, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("lengths", "skip_padding", "skips"),
    [((20, 18), True, True), ((20, 19), True, False), ((20, 18), False, False)],
)
def test_classifier_skips_padding_of_at_least_5_percent(lengths, skip_padding, skips):
    classifier = Classifier(make_model("bert"), train_bert_hf.class_logits, CPU, skip_padding=skip_padding)
    batch = make_batch(lengths)
    with RecordLinearInputs() as recorded:
        logits = classifier(batch)
    assert ((sum(lengths), 16) in recorded.shapes) == skips
    assert ((2, 20, 16) in recorded.shapes) != skips
    torch.testing.assert_close(logits, train_bert_hf.class_logits(classifier.model, batch), rtol=0, atol=1e-6)


def test_classifier_that_skips_padding_accepts_batches_without_mask():
    classifier = Classifier(make_model("bert"), train_bert_hf.class_logits, CPU, skip_padding=True)
    batch = make_batch()._replace(attention_mask=None)
    assert torch.equal(classifier(batch), train_bert_hf.class_logits(classifier.model, batch))


def test_training_with_dropout_equals_training_on_padded_batches():
    """Dropout draws the same random numbers, because only linear layers skip the padding."""
    batch, results = make_batch(), []
    for skip_padding in (False, True):
        model = make_model("bert").train()
        classifier = Classifier(model, train_bert_hf.class_logits, CPU, skip_padding=skip_padding)
        torch.manual_seed(1)
        logits = classifier(batch)
        logits.square().sum().backward()
        results.append((logits.detach(), {name: p.grad for name, p in model.named_parameters()}))
    assert_equal(*results)


def skipped_padding(recorded):
    """Return whether a linear layer received rows of tokens; the 48 reviews give fewer pooled rows."""
    return any(len(shape) == 2 and shape[0] > 48 for shape in recorded.shapes)


def test_run_and_predictions_of_a_published_encoder_skip_padding(data_dir, tmp_path, monkeypatch, capsys):
    """The losses equal those of padded batches; predict.py reproduces the run's probabilities."""
    save_encoder(tmp_path / "model", TINY_CONFIGS["bert"])
    encoder = train_bert_hf.MODELS["bert"]._replace(hub_id=str(tmp_path / "model"))
    monkeypatch.setitem(train_bert_hf.MODELS, "bert", encoder)
    arguments = ["--model", "bert", "--data_dir", str(data_dir), "--device", "cpu", "--context_length", "24"]
    arguments += ["--precision", "fp32"]
    losses = []
    for min_padding in (0.05, 2.0):  # 2.0 is never reached
        monkeypatch.setattr(inference, "MIN_PADDING", min_padding)
        folder = tmp_path / str(min_padding)
        with RecordLinearInputs() as recorded:
            train_bert_hf.main([*arguments, "--save_model", "--output_dir", str(folder)])
        assert skipped_padding(recorded) == (min_padding < 1)
        losses.append(read_record(folder)["losses"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)

    monkeypatch.setattr(inference, "MIN_PADDING", 0.05)
    folder = tmp_path / "0.05"
    assert read_settings(folder)[1]["skip_padding"] is True
    capsys.readouterr()
    with RecordLinearInputs() as recorded:
        predict.main([str(folder), "--device", "cpu", "--csv", str(data_dir / "test.csv")])
    assert skipped_padding(recorded)
    probabilities = [float(line.split("\t")[1]) for line in capsys.readouterr().out.splitlines()]
    expected = read_predictions(folder, read_record(folder))["probability"]
    assert probabilities == pytest.approx(expected.where(expected > 0.5, 1 - expected).tolist(), abs=1e-6)
