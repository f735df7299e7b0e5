import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_CONFIGS
from transformers import AutoModelForSequenceClassification

from finetuning import dropout
from finetuning.dropout import quick_dropout


def test_dropout_keeps_the_right_share_and_scales_it():
    x = torch.ones(1000, 1000)
    with quick_dropout():
        y = F.dropout(x, 0.1)
    kept = y != 0
    # 900,000 +- 300 elements are kept: five standard deviations either way.
    assert abs(kept.sum().item() - 900_000) < 1_500
    assert torch.allclose(y[kept], torch.tensor(1 / 0.9))
    # Neighbours share a random number, and yet are dropped independently: 0.81 +- 0.0004 of the pairs stay.
    assert (kept[:, 1:] & kept[:, :-1]).float().mean().item() == pytest.approx(0.81, abs=0.003)


@pytest.mark.parametrize(("p", "expected"), [(0.5, [0, 0, 1, 1]), (1 / 2**16, [0, 1, 1, 1])])
def test_the_threshold_by_hand(p, expected):
    drawn = torch.tensor([-2**15, -1, 0, 2**15 - 1], dtype=torch.int16)
    assert dropout.kept(drawn, p, torch.float32).tolist() == expected


def test_the_same_seed_drops_the_same():
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        with quick_dropout():
            outputs.append(F.dropout(torch.ones(7, 9), 0.5))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_the_gradient_of_dropout_is_its_mask():
    x = torch.randn(50, 50, requires_grad=True)
    with quick_dropout():
        y = F.dropout(x, 0.3)
    y.sum().backward()
    assert torch.allclose(x.grad * x, y)


def textbook_attention(query, key, value, allowed, p, lengths):
    """Attention written out, dropping by the same random numbers: one draw a review, for its own keys."""
    outputs = []
    for review, length in enumerate(lengths):
        scores = query[review] @ key[review, :, :length].mT / query.shape[-1] ** 0.5
        weights = scores.masked_fill(~allowed[review, :, :, :length], -torch.inf).softmax(dim=-1)
        weights = weights * dropout.kept(dropout.draw(weights.shape), p, weights.dtype) / (1 - p)
        outputs.append(weights @ value[review, :, :length])
    return torch.stack(outputs)


@pytest.mark.parametrize("masked", [True, False])
def test_attention_and_its_gradients_are_the_textbook_s(masked):
    torch.manual_seed(0)
    tensors = [torch.randn(2, 3, 7, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    allowed = torch.ones(2, 1, 7, 7, dtype=torch.bool)
    if masked:
        allowed[0, :, :, 5:] = False  # a review of 5 tokens
        allowed[1, :, 2, 3] = False  # a hole, as of a local window
    upstream = torch.randn(2, 3, 7, 4, dtype=torch.float64)

    torch.manual_seed(1)
    with quick_dropout():
        output = F.scaled_dot_product_attention(*tensors, attn_mask=allowed if masked else None, dropout_p=0.4)
    torch.manual_seed(1)
    expected = textbook_attention(*tensors, allowed, 0.4, [5, 7] if masked else [7, 7])
    assert torch.allclose(output, expected)
    for gradient, wanted in zip(torch.autograd.grad(output, tensors, upstream),
                                torch.autograd.grad(expected, tensors, upstream), strict=True):
        assert torch.allclose(gradient, wanted)


@pytest.mark.parametrize("arguments", [
    {"dropout_p": 0.0}, {"dropout_p": 0.1, "is_causal": True},
    {"dropout_p": 0.1, "attn_mask": torch.zeros(1, 1, 5, 5)},
    {"dropout_p": 0.1, "attn_mask": torch.zeros(1, 1, 5, 5, dtype=torch.bool)}])
def test_what_it_does_not_know_is_left_to_pytorch(arguments):
    query = torch.randn(1, 2, 5, 4)
    outputs = []
    for mode in (quick_dropout(), torch.enable_grad()):
        torch.manual_seed(0)
        with mode:
            outputs.append(F.scaled_dot_product_attention(query, query, query, **arguments))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("name", ["bert", "distilbert", "roberta"])
def test_no_model_draws_its_dropout_the_slow_way(name):
    model = AutoModelForSequenceClassification.from_config(TINY_CONFIGS[name]).train()
    mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    with torch.profiler.profile() as profile, quick_dropout():
        model(input_ids=torch.full((2, 8), 7), attention_mask=mask).logits.sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert "AttentionWithDropout" in names
    assert "aten::bernoulli_" not in names


def test_under_autocast_attention_is_in_its_precision():
    query = torch.randn(1, 2, 5, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16), quick_dropout():
        assert F.scaled_dot_product_attention(query, query, query, dropout_p=0.1).dtype == torch.bfloat16
