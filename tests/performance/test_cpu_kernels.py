from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from tiny_models import TINY_CONFIGS
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForSequenceClassification

from finetuning.performance import cpu_kernels
from finetuning.performance.cpu_kernels import attention_bias_and_length, fast_cpu_ops, num_filler


def test_dropout_keeps_the_expected_fraction_and_scales_it():
    x = torch.ones(1000, 1000)
    with fast_cpu_ops():
        y = F.dropout(x, 0.1)
    mask = y != 0
    # 900,000 elements are expected, with a standard deviation of 300: the bound is five of them.
    assert abs(mask.sum().item() - 900_000) < 1_500
    assert torch.allclose(y[mask], torch.tensor(1 / 0.9))
    # Neighbors take bits of the same random number and must still be independent: 0.81 of the pairs, +- 0.0004.
    assert (mask[:, 1:] & mask[:, :-1]).float().mean().item() == pytest.approx(0.81, abs=0.003)


@pytest.mark.parametrize(("p", "expected"), [(0.5, [0, 0, 1, 1]), (1 / 2**16, [0, 1, 1, 1])])
def test_keep_mask_drops_bits_below_the_threshold(p, expected):
    bits = torch.tensor([-(2**15), -1, 0, 2**15 - 1], dtype=torch.int16)
    assert cpu_kernels.keep_mask(bits, p, torch.float32).tolist() == expected


def test_dropout_is_determined_by_the_seed():
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        with fast_cpu_ops():
            outputs.append(F.dropout(torch.ones(7, 9), 0.5))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_gradient_of_dropout_is_its_scaled_mask():
    x = torch.randn(50, 50, requires_grad=True)
    with fast_cpu_ops():
        y = F.dropout(x, 0.3)
    y.sum().backward()
    assert torch.allclose(x.grad * x, y)


def test_bf16_gelu_is_as_close_to_the_tanh_approximation_as_pytorch():
    """For all bf16 values from -8 to 8, and for normally distributed ones."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    torch.manual_seed(0)
    for x in (numbers[numbers.abs() <= 8], torch.randn(10_000).bfloat16()):
        exact = F.gelu(x.double(), approximate="tanh")
        with fast_cpu_ops():
            output = F.gelu(x, approximate="tanh")
        assert torch.equal(output, F.gelu(x))
        assert (output - exact).abs().max() < 2**-7 + 0.0005  # half of the last bit from 4 to 8, plus the approximation
        errors = [(y - exact).square().mean().sqrt() for y in (output, F.gelu(x, approximate="tanh"))]
        assert errors[0] < 1.02 * errors[1]


def test_fp32_gelu_is_left_to_pytorch():
    x = torch.linspace(-4, 4, 101)
    with fast_cpu_ops():
        assert torch.equal(F.gelu(x, approximate="tanh"), torch.nn.GELU("tanh")(x))
    assert not torch.equal(F.gelu(x, approximate="tanh"), F.gelu(x))


def test_float64_is_not_converted_to_bf16_as_by_autocast():
    x = torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16), fast_cpu_ops():
        assert F.scaled_dot_product_attention(x, x, x, dropout_p=0.1).dtype == torch.float64
        assert F.dropout(x, 0.1).dtype == F.gelu(x, approximate="tanh").dtype == torch.float64


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.dropout(x, 0.5),
        lambda x: F.scaled_dot_product_attention(x, x, torch.eye(8).expand_as(x), dropout_p=0.5).square(),
    ],
)
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("backward_within", [True, False])
def test_gradient_checkpointing_repeats_the_same_dropout(function, reentrant, backward_within):
    """Output and gradients equal those without checkpointing from the same seed."""
    results = []
    for checkpointed in (True, False):
        torch.manual_seed(0)
        x = torch.arange(64.0).view(1, 1, 8, 8).requires_grad_()
        with fast_cpu_ops() if checkpointed else nullcontext():
            y = checkpoint(function, x, use_reentrant=reentrant) if checkpointed else function(x)
            if backward_within:
                y.sum().backward()
        if not backward_within:
            y.sum().backward()
        results.append((y, x.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name", ["bert", "distilbert", "roberta"])
def test_encoder_training_uses_the_fast_dropout_and_attention(name):
    model = AutoModelForSequenceClassification.from_config(TINY_CONFIGS[name]).train()
    mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    with torch.profiler.profile(acc_events=True) as profile, fast_cpu_ops():
        model(input_ids=torch.full((2, 8), 7), attention_mask=mask).logits.sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert "Attention" in names
    assert "aten::bernoulli_" not in names


def test_num_filler_completes_a_multiple_up_to_the_limit():
    assert [num_filler(count, multiple=64, limit=10) for count in (0, 1, 60, 64, 65, 120)] == [0, 10, 4, 0, 10, 8]


def test_attention_lengths_are_multiples_or_all_keys():
    counts = torch.tensor([1, 31, 32, 33, 70, 75])
    mask = torch.arange(75)[None] < counts[:, None]
    key = torch.zeros(6, 1, 75, 1)
    lengths = [length for _, length in attention_bias_and_length(mask[:, None, None], key)]
    assert lengths == [32, 32, 32, 64, 75, 75]
