import random
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from finetuning.performance import cpu_kernels
from finetuning.performance.cpu_kernels import fast_cpu_ops


def textbook_attention(query, key, value, allowed, p, lengths):
    """Return attention from its definition, with the random bits drawn per review for the first `lengths` keys."""
    outputs = []
    for review, length in enumerate(lengths):
        scores = query[review] @ key[review, :, :length].mT / query.shape[-1] ** 0.5
        weights = scores.masked_fill(~allowed[review, :, :, :length], -torch.inf).softmax(dim=-1)
        if p:
            weights = (
                weights * cpu_kernels.keep_mask(cpu_kernels.random_bits(weights.shape), p, weights.dtype) / (1 - p)
            )
        outputs.append(weights @ value[review, :, :length])
    return torch.stack(outputs)


def is_fast(output):
    """Return whether an output was computed by `cpu_kernels.Attention`, whose filler may be sliced off."""
    nodes = [output.grad_fn, *(node for node, _ in output.grad_fn.next_functions)]
    return any(node is not None and node.name() == "AttentionBackward" for node in nodes)


@pytest.mark.parametrize("p", [0.4, 0.0])
@pytest.mark.parametrize("mask", ["padding and local window", "causal", None])
def test_attention_and_its_gradients_match_the_definition(mask, p, monkeypatch):
    torch.manual_seed(0)
    tensors = [torch.randn(2, 3, 7, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    allowed, lengths, padded = torch.ones(2, 1, 7, 7, dtype=torch.bool), [7, 7], tensors
    if mask == "causal":
        allowed, lengths = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril(), [9, 9]  # completed to a multiple of 3
        padded = [F.pad(tensor, (0, 0, 0, 2)) for tensor in tensors]
    elif mask:
        allowed[0, :, :, 5:] = False  # a review of 5 tokens
        allowed[1, :, 2, 3] = False  # as in a local window
        lengths = [6, 7]  # 5 completed to a multiple of 3
    upstream = torch.randn(2, 3, 7, 4, dtype=torch.float64)
    monkeypatch.setattr(cpu_kernels, "KEY_MULTIPLE", 3)
    monkeypatch.setattr(cpu_kernels, "FAST_DTYPE", torch.float64)  # compare without rounding errors

    torch.manual_seed(1)
    with fast_cpu_ops():
        output = F.scaled_dot_product_attention(
            *tensors, attn_mask=None if mask in (None, "causal") else allowed, dropout_p=p, is_causal=mask == "causal"
        )
    assert is_fast(output)
    torch.manual_seed(1)
    expected = textbook_attention(*padded, allowed, p, lengths)[:, :, :7]
    assert torch.allclose(output, expected)
    gradients, expected_gradients = (torch.autograd.grad(y, tensors, upstream) for y in (output, expected))
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert torch.allclose(gradient, expected_gradient)


@pytest.mark.parametrize("mask", ["causal", None])
def test_bf16_attention_is_about_as_accurate_as_pytorch(mask):
    """The scores have a standard deviation of 4: a pretrained GPT-2's are large as well."""
    torch.manual_seed(0)
    tensors = [scale * torch.randn(2, 3, 256, 32) for scale in (4, 1, 1)]
    tensors = [tensor.bfloat16().requires_grad_() for tensor in tensors]
    upstream = torch.randn(2, 3, 256, 32).bfloat16()
    allowed = torch.ones(2, 1, 256, 256, dtype=torch.bool)
    doubles = [tensor.double() for tensor in tensors]
    exact = textbook_attention(*doubles, allowed.tril() if mask else allowed, 0.0, [256, 256])
    exact = exact, *torch.autograd.grad(exact, doubles, upstream.double())
    errors = []
    for mode in (fast_cpu_ops(), torch.enable_grad()):
        with mode, torch.autocast("cpu", dtype=torch.bfloat16):
            output = F.scaled_dot_product_attention(*tensors, is_causal=mask == "causal")
        assert is_fast(output) == (not errors)
        values = output, *torch.autograd.grad(output, tensors, upstream)
        errors.append([(a - b).square().mean().sqrt().item() for a, b in zip(values, exact, strict=True)])
    # Errors of the output and of the gradients of query, key and value; bf16 itself rounds by up to 1 / 256.
    assert all(ours < 2 * fused for ours, fused in zip(*errors, strict=True))
    assert all(error < 0.01 * value.square().mean().sqrt() for error, value in zip(errors[0], exact, strict=True))


def attention_calls(count):
    """Yield random arguments of attention, valid and invalid: (tensors, keyword arguments)."""
    rng = random.Random(0)
    for _ in range(count):
        batch, heads, queries, keys, width = (
            rng.choice(sizes) for sizes in ((1, 2), (1, 3), (1, 2, 5), (1, 2, 5), (1, 4))
        )
        if rng.random() < 0.5:
            keys = queries
        dtype = rng.choice([torch.float32, torch.float64, torch.bfloat16])
        tensors = [torch.randn(batch, heads, tokens, width, dtype=dtype) for tokens in (queries, keys, keys)]
        mistake = rng.randrange(12)  # above 4: none
        if mistake == 0:
            tensors[2] = torch.randn(batch, heads, keys, 3, dtype=dtype)
        elif mistake == 1:
            tensors[rng.randrange(3)] = torch.randn(1, heads, rng.choice([queries, keys]), width, dtype=dtype)
        elif mistake == 2:
            tensors[rng.randrange(3)] = torch.randn(batch, 1, rng.choice([queries, keys]), width, dtype=dtype)
        elif mistake == 3:
            tensors = [tensor[0] for tensor in tensors]
        elif mistake == 4:
            tensors[rng.randrange(3)] = torch.randn(batch, heads, keys, width, dtype=torch.float64)
        mask = None
        if rng.random() < 0.7:
            shape = [rng.choice([1, size]) for size in (batch, heads, queries, keys)][rng.choice([0, 0, 0, 1, 2]) :]
            mask = torch.rand(shape) < 0.7
            if rng.random() < 0.7:
                mask[..., 0] = True  # each query may attend to a key
            if rng.random() < 0.2:
                mask = mask.to(dtype)
        yield (
            tensors,
            {
                "attn_mask": mask,
                "dropout_p": rng.choice([1e-9, 1e-9, 0.0]),  # drops nothing
                "is_causal": rng.random() < (0.05 if mask is not None else 0.4),
                "scale": rng.choice([None, None, 0.0, 0.5, -2.0]),
            },
        )


def run_attention(tensors, arguments, context, autocast):
    """Return ("fast" or "PyTorch", output and gradients), or ("raised", type of the error)."""
    inputs = [tensor.clone().requires_grad_() for tensor in tensors]
    try:
        with context, torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            output = F.scaled_dot_product_attention(*inputs, **arguments)
            gradients = torch.autograd.grad(output.double().sin().sum(), inputs)
    except RuntimeError as error:
        return "raised", type(error)
    return "fast" if is_fast(output) else "PyTorch", [output, *gradients]


@pytest.mark.parametrize("autocast", [False, True])
def test_attention_equals_pytorch_for_random_arguments(autocast, monkeypatch):
    """Output and gradients are equal, or the same exception is raised.

    The reference is PyTorch's math kernel: the fused one returns NaN for a causal mask with a scale
    of 0 or less.
    """
    torch.manual_seed(0)
    monkeypatch.setattr(cpu_kernels, "FAST_DTYPE", torch.bfloat16 if autocast else torch.float32)
    outcomes = Counter()
    for tensors, arguments in attention_calls(600):
        outcome, results = run_attention(tensors, arguments, fast_cpu_ops(), autocast)
        reference = sdpa_kernel(SDPBackend.MATH) if outcome == "fast" else nullcontext()
        expected_outcome, expected = run_attention(tensors, arguments, reference, autocast)
        outcomes.update([outcome, expected_outcome])
        case = [tuple(tensor.shape) for tensor in tensors], tensors[0].dtype, arguments
        if expected_outcome == "raised":
            assert results == expected, case
            continue
        for a, b in zip(results, expected, strict=True):
            assert a.dtype == b.dtype, case
            exact = torch.bfloat16 not in (a.dtype, tensors[0].dtype) and not autocast
            torch.testing.assert_close(
                a.double(),
                b.double(),
                atol=1e-5 if exact else 0.1,
                rtol=1e-5 if exact else 0.1,
                equal_nan=True,
                msg=lambda message, case=case: f"{case}: {message}",
            )
    assert outcomes["fast"] > 100
    assert outcomes["raised"] > 20


@pytest.mark.parametrize(
    "arguments",
    [
        {"dropout_p": 0.0},
        {"dropout_p": 0.0, "is_causal": True},
        {"dropout_p": 0.1, "enable_gqa": True},
        {"dropout_p": 0.1, "attn_mask": torch.zeros(1, 1, 5, 5)},
        {"dropout_p": 0.1, "attn_mask": torch.zeros(1, 1, 5, 5, dtype=torch.bool)},
    ],
)
def test_unsupported_attention_arguments_are_left_to_pytorch(arguments):
    query = torch.randn(1, 2, 5, 4, requires_grad=True)
    outputs = []
    for mode in (fast_cpu_ops(), torch.enable_grad()):
        torch.manual_seed(0)
        with mode:
            outputs.append(F.scaled_dot_product_attention(query, query, query, **arguments))
    assert torch.equal(*outputs)


def test_attention_returns_the_autocast_dtype():
    query = torch.randn(1, 2, 5, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16), fast_cpu_ops():
        assert F.scaled_dot_product_attention(query, query, query, dropout_p=0.1).dtype == torch.bfloat16
