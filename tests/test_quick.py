import random
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_CONFIGS, reviews
from test_loop import CPU, encoder_dataset
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForSequenceClassification

import train_bert_hf
from finetuning import quick
from finetuning.loop import EVALUATION_TOKENS, Classifier, predict
from finetuning.quick import quick_cpu


def test_dropout_keeps_the_right_share_and_scales_it():
    x = torch.ones(1000, 1000)
    with quick_cpu():
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
    assert quick.kept(drawn, p, torch.float32).tolist() == expected


def test_the_same_seed_drops_the_same():
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        with quick_cpu():
            outputs.append(F.dropout(torch.ones(7, 9), 0.5))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_the_gradient_of_dropout_is_its_mask():
    x = torch.randn(50, 50, requires_grad=True)
    with quick_cpu():
        y = F.dropout(x, 0.3)
    y.sum().backward()
    assert torch.allclose(x.grad * x, y)


def textbook_attention(query, key, value, allowed, p, lengths):
    """Attention written out, dropping by the same random numbers: one draw a review, for its own keys."""
    outputs = []
    for review, length in enumerate(lengths):
        scores = query[review] @ key[review, :, :length].mT / query.shape[-1] ** 0.5
        weights = scores.masked_fill(~allowed[review, :, :, :length], -torch.inf).softmax(dim=-1)
        if p:
            weights = weights * quick.kept(quick.draw(weights.shape), p, weights.dtype) / (1 - p)
        outputs.append(weights @ value[review, :, :length])
    return torch.stack(outputs)


@pytest.mark.parametrize("p", [0.4, 0.0])
@pytest.mark.parametrize("mask", ["padding and a hole", "causal", None])
def test_attention_and_its_gradients_are_the_textbook_s(mask, p, monkeypatch):
    torch.manual_seed(0)
    tensors = [torch.randn(2, 3, 7, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    allowed, lengths = torch.ones(2, 1, 7, 7, dtype=torch.bool), [7, 7]
    if mask == "causal":
        allowed = allowed.tril()
    elif mask:
        allowed[0, :, :, 5:] = False  # a review of 5 tokens
        allowed[1, :, 2, 3] = False  # as of a local window
        lengths = [5, 7]
    upstream = torch.randn(2, 3, 7, 4, dtype=torch.float64)
    monkeypatch.setattr(quick, "QUICK_DTYPE", torch.float64)  # so that the comparison is not one of rounding

    torch.manual_seed(1)
    with quick_cpu():
        output = F.scaled_dot_product_attention(*tensors, attn_mask=None if mask in (None, "causal") else allowed,
                                                dropout_p=p, is_causal=mask == "causal")
    assert output.grad_fn.name() == "AttentionBackward"
    torch.manual_seed(1)
    expected = textbook_attention(*tensors, allowed, p, lengths)
    assert torch.allclose(output, expected)
    for gradient, wanted in zip(torch.autograd.grad(output, tensors, upstream),
                                torch.autograd.grad(expected, tensors, upstream), strict=True):
        assert torch.allclose(gradient, wanted)


@pytest.mark.parametrize("mask", ["causal", None])
def test_bf16_attention_is_about_as_exact_as_pytorch_s(mask):
    """Also where scores are large, as they are in a pretrained GPT-2: here they spread by 4."""
    torch.manual_seed(0)
    tensors = [scale * torch.randn(2, 3, 256, 32) for scale in (4, 1, 1)]
    tensors = [tensor.bfloat16().requires_grad_() for tensor in tensors]
    upstream = torch.randn(2, 3, 256, 32).bfloat16()
    allowed = torch.ones(2, 1, 256, 256, dtype=torch.bool)
    doubles = [tensor.double() for tensor in tensors]
    exact = textbook_attention(*doubles, allowed.tril() if mask else allowed, 0.0, [256, 256])
    exact = exact, *torch.autograd.grad(exact, doubles, upstream.double())
    errors = []
    for mode in (quick_cpu(), torch.enable_grad()):
        with mode, torch.autocast("cpu", dtype=torch.bfloat16):
            output = F.scaled_dot_product_attention(*tensors, is_causal=mask == "causal")
        assert (output.grad_fn.name() == "AttentionBackward") == (not errors)
        found = output, *torch.autograd.grad(output, tensors, upstream)
        errors.append([(a - b).square().mean().sqrt().item() for a, b in zip(found, exact, strict=True)])
    # Output, and the gradients of query, key and value; single numbers of bf16 are off by up to 1 / 256.
    assert all(quick < 2 * fused for quick, fused in zip(*errors, strict=True))
    assert all(error < 0.01 * value.square().mean().sqrt() for error, value in zip(errors[0], exact, strict=True))


def test_in_bf16_gelu_is_as_close_to_its_tanh_approximation_as_pytorch_s():
    """Over all numbers of bf16 from -8 to 8, and over those that activations are like."""
    numbers = torch.arange(-2**15, 2**15, dtype=torch.int16).view(torch.bfloat16)
    torch.manual_seed(0)
    for x in (numbers[numbers.abs() <= 8], torch.randn(10_000).bfloat16()):
        exact = F.gelu(x.double(), approximate="tanh")
        with quick_cpu():
            output = F.gelu(x, approximate="tanh")
        assert torch.equal(output, F.gelu(x))
        assert (output - exact).abs().max() < 2**-7 + 0.0005  # half of the last bit of 4 to 8, and the approximation
        errors = [(y - exact).square().mean().sqrt() for y in (output, F.gelu(x, approximate="tanh"))]
        assert errors[0] < 1.02 * errors[1]


def test_in_fp32_gelu_stays_what_it_is():
    x = torch.linspace(-4, 4, 101)
    with quick_cpu():
        assert torch.equal(F.gelu(x, approximate="tanh"), torch.nn.GELU("tanh")(x))
    assert not torch.equal(F.gelu(x, approximate="tanh"), F.gelu(x))


def count(profile, name):
    return sum(event.count for event in profile.key_averages() if event.key == name)


@pytest.mark.skipif(not quick.CAN_PACK, reason="this build of PyTorch cannot lay out weights")
@pytest.mark.parametrize(("precision", "learns"), [("bf16", True), ("bf16", False), ("fp32", True)])
def test_evaluation_lays_out_each_weight_once_and_computes_the_same(precision, learns, monkeypatch):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(TINY_CONFIGS["bert"])
    linears = sum(isinstance(module, torch.nn.Linear) for module in model.modules())
    classifier = Classifier(model.requires_grad_(learns), train_bert_hf.read_logits, CPU, precision)
    monkeypatch.setitem(EVALUATION_TOKENS, "cpu", 64)
    dataset = encoder_dataset(reviews(20))
    with torch.profiler.profile(acc_events=True) as profile:  # or PyTorch 2.11 warns
        found = predict(dataset, classifier)
    packs = precision == "bf16" and learns
    assert count(profile, "mkldnn::_reorder_linear_weight") == (linears if packs else 0)
    batches = count(profile, "aten::gelu") / model.config.num_hidden_layers
    assert batches > 1
    assert count(profile, "mkldnn::_linear_pointwise") == (linears * batches if packs else 0)
    monkeypatch.setattr(quick, "CAN_PACK", False)
    assert torch.equal(found, predict(dataset, classifier))


def test_weights_are_laid_out_anew_when_they_have_changed():
    layer = torch.nn.Linear(4, 2)
    for factor in (1, 2):
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), quick.packed_weights():
            layer.weight.fill_(factor)
            layer.bias.fill_(0.5)
            assert layer(torch.ones(3, 4)).tolist() == [[4 * factor + 0.5] * 2] * 3


def test_layers_that_learn_keep_their_weights_as_they_are():
    layer = torch.nn.Linear(4, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16), quick.packed_weights():
        layer(torch.ones(3, 4)).sum().backward()
    assert layer.weight.grad.tolist() == [[3.0] * 4] * 2


def attention_calls(count):
    """Yield arguments of attention as models, and mistakes, make them: (tensors, keyword arguments)."""
    draw = random.Random(0)
    for _ in range(count):
        batch, heads, queries, keys, width = (draw.choice(sizes) for sizes in ((1, 2), (1, 3), (1, 2, 5), (1, 2, 5),
                                                                               (1, 4)))
        if draw.random() < 0.5:
            keys = queries
        dtype = draw.choice([torch.float32, torch.float64, torch.bfloat16])
        tensors = [torch.randn(batch, heads, tokens, width, dtype=dtype) for tokens in (queries, keys, keys)]
        oddity = draw.randrange(12)  # mostly none
        if oddity == 0:
            tensors[2] = torch.randn(batch, heads, keys, 3, dtype=dtype)
        elif oddity == 1:
            tensors[draw.randrange(3)] = torch.randn(1, heads, draw.choice([queries, keys]), width, dtype=dtype)
        elif oddity == 2:
            tensors[draw.randrange(3)] = torch.randn(batch, 1, draw.choice([queries, keys]), width, dtype=dtype)
        elif oddity == 3:
            tensors = [tensor[0] for tensor in tensors]
        elif oddity == 4:
            tensors[draw.randrange(3)] = torch.randn(batch, heads, keys, width, dtype=torch.float64)
        mask = None
        if draw.random() < 0.7:
            shape = [draw.choice([1, size]) for size in (batch, heads, queries, keys)][draw.choice([0, 0, 0, 1, 2]):]
            mask = torch.rand(shape) < 0.7
            if draw.random() < 0.7:
                mask[..., 0] = True  # no query without a key
            if draw.random() < 0.2:
                mask = mask.to(dtype)
        yield tensors, {"attn_mask": mask, "dropout_p": draw.choice([1e-9, 1e-9, 0.0]),  # which drops nothing
                        "is_causal": draw.random() < (0.05 if mask is not None else 0.4),
                        "scale": draw.choice([None, None, 0.0, 0.5, -2.0])}


@pytest.mark.parametrize("autocast", [False, True])
def test_attention_is_pytorch_s_whatever_it_is_given(autocast, monkeypatch):
    """The same output and gradients, or the same refusal; and it is not all left to PyTorch.

    What is computed here is compared with PyTorch's plain kernel: the fused one answers a causal
    mask with NaN where the scale is not above 0.
    """
    torch.manual_seed(0)
    monkeypatch.setattr(quick, "QUICK_DTYPE", torch.bfloat16 if autocast else torch.float32)
    done = Counter()
    for tensors, arguments in attention_calls(600):
        found, name = [], ""
        for _ in range(2):
            mode = (quick_cpu() if not name else
                    sdpa_kernel(SDPBackend.MATH) if name == "AttentionBackward" else nullcontext())
            inputs = [tensor.clone().requires_grad_() for tensor in tensors]
            try:
                with mode, torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                    output = F.scaled_dot_product_attention(*inputs, **arguments)
                    name = output.grad_fn.name()
                    found.append([output, *torch.autograd.grad(output.double().sin().sum(), inputs)])
            except RuntimeError as error:
                name = "refused"
                found.append(type(error))
            done[name] += 1
        described = [tuple(tensor.shape) for tensor in tensors], tensors[0].dtype, arguments
        if isinstance(found[1], type):
            assert found[0] == found[1], described
            continue
        for a, b in zip(*found, strict=True):
            assert a.dtype == b.dtype, described
            exact = torch.bfloat16 not in (a.dtype, tensors[0].dtype) and not autocast
            torch.testing.assert_close(a.double(), b.double(), atol=1e-5 if exact else 0.1, rtol=1e-5 if exact else 0.1,
                                       equal_nan=True, msg=lambda message, case=described: f"{case}: {message}")
    assert done["AttentionBackward"] > 100
    assert done["refused"] > 20


def test_float64_never_becomes_bf16():
    """Autocast leaves it as it is."""
    x, layer = torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True), torch.nn.Linear(4, 4).double()
    with torch.autocast("cpu", dtype=torch.bfloat16), quick_cpu():
        assert F.scaled_dot_product_attention(x, x, x, dropout_p=0.1).dtype == torch.float64
        assert F.dropout(x, 0.1).dtype == F.gelu(x, approximate="tanh").dtype == torch.float64
    expected = layer(x)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), quick.packed_weights():
        assert torch.equal(layer(x), expected)
        assert F.linear(x[0, 0], layer.weight[0]).dtype == torch.float64


def test_one_weight_with_two_biases_and_inputs_of_any_number_of_dimensions():
    weight, x = torch.nn.Parameter(torch.ones(2, 4)), torch.ones(3, 4)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), quick.packed_weights():
        assert F.linear(x, weight, torch.tensor([1.0, 2.0])).tolist() == [[5, 6]] * 3
        assert F.linear(x, weight).tolist() == [[4, 4]] * 3
        assert F.linear(x[0], weight, torch.tensor([3.0, 4.0])).tolist() == [7, 8]
        assert F.linear(x[:0], weight).shape == (0, 2)


@pytest.mark.parametrize("function", [
    lambda x: F.dropout(x, 0.5),
    lambda x: F.scaled_dot_product_attention(x, x, torch.eye(8).expand_as(x), dropout_p=0.5).square()])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("backward_within", [True, False])
def test_under_gradient_checkpointing_dropout_repeats(function, reentrant, backward_within):
    """The gradients are those of the same random numbers without checkpointing."""
    results = []
    for checkpointed in (True, False):
        torch.manual_seed(0)
        x = torch.arange(64.0).view(1, 1, 8, 8).requires_grad_()
        with quick_cpu() if checkpointed else nullcontext():
            y = checkpoint(function, x, use_reentrant=reentrant) if checkpointed else function(x)
            if backward_within:
                y.sum().backward()
        if not backward_within:
            y.sum().backward()
        results.append((y, x.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("arguments", [
    {"dropout_p": 0.0}, {"dropout_p": 0.0, "is_causal": True}, {"dropout_p": 0.1, "enable_gqa": True},
    {"dropout_p": 0.1, "attn_mask": torch.zeros(1, 1, 5, 5)},
    {"dropout_p": 0.1, "attn_mask": torch.zeros(1, 1, 5, 5, dtype=torch.bool)}])
def test_what_it_does_not_know_is_left_to_pytorch(arguments):
    query = torch.randn(1, 2, 5, 4, requires_grad=True)
    outputs = []
    for mode in (quick_cpu(), torch.enable_grad()):
        torch.manual_seed(0)
        with mode:
            outputs.append(F.scaled_dot_product_attention(query, query, query, **arguments))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("name", ["bert", "distilbert", "roberta"])
def test_no_model_draws_its_dropout_the_slow_way(name):
    model = AutoModelForSequenceClassification.from_config(TINY_CONFIGS[name]).train()
    mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    with torch.profiler.profile(acc_events=True) as profile, quick_cpu():
        model(input_ids=torch.full((2, 8), 7), attention_mask=mask).logits.sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert "Attention" in names
    assert "aten::bernoulli_" not in names


def test_under_autocast_attention_is_in_its_precision():
    query = torch.randn(1, 2, 5, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16), quick_cpu():
        assert F.scaled_dot_product_attention(query, query, query, dropout_p=0.1).dtype == torch.bfloat16
