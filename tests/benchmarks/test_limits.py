from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from tiny_models import CPU, TINY_CONFIGS

import train_bert_hf
import train_gpt
from benchmarks import limits
from finetuning.performance.gpt_classifier import GPTClassifier
from finetuning.trainable_layers import set_trainable


def tiny_model(name):
    torch.manual_seed(0)
    return transformers.AutoModelForSequenceClassification.from_config(TINY_CONFIGS[name])


def test_count_flops_of_a_tiny_bert_equals_the_count_by_hand():
    width, hidden, blocks, classes = 16, 32, 2, 2
    flops = limits.count_flops(tiny_model("bert"), train_bert_hf.class_logits, longest=40)
    per_token = blocks * (4 * 2 * width * width + 2 * 2 * width * hidden)  # query, key, value, output; two feed-forward
    per_token_squared = blocks * 2 * 2 * width  # scores, weighted values
    per_review = 2 * width * width + 2 * width * classes  # pooler, classifier
    assert flops.evaluation == (0, 0, per_review, per_token, per_token_squared)
    # Each product of the forward pass has two in the backward pass, for its input and for its weight.
    assert flops.training == (0, 0, 3 * per_review, 3 * per_token, 3 * per_token_squared)
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
    model = limits.fit_flops(lambda size, n: 7 + 4 * n + size * (5 + 3 * n + 2 * n**2), longest=50)
    assert model == (7, 4, 5, 3, 2)
    assert model([1, 10]) == 7 + 4 * 10 + (5 + 3 + 2) + (5 + 30 + 200)
    with pytest.raises(ValueError, match="not quadratic"):
        limits.fit_flops(lambda size, n: size * n**3, longest=50)


def test_linear_shapes_counts_all_linear_layers_but_the_head():
    model = tiny_model("bert")
    assert limits.linear_shapes(model, model.classifier) == {(16, 16): 2 * 4 + 1, (32, 16): 2, (16, 32): 2}
    roberta = tiny_model("roberta")
    assert sum(limits.linear_shapes(roberta, roberta.classifier).values()) == 2 * 6


def test_matmul_throughput_weighs_layers_by_their_flops(monkeypatch):
    monkeypatch.setattr(limits, "time_linear", lambda x, weight: 1.0 if len(weight) == 4 else 3.0)
    shapes = {(4, 8): 2, (16, 8): 1}
    assert limits.matmul_throughput(shapes, 10, "fp32", CPU) == 10 * 2 * (2 * 4 * 8 + 16 * 8) / (2 * 1.0 + 3.0)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_matmul_throughput_multiplies_in_the_precision(precision, dtype, monkeypatch):
    shapes = []

    def time_linear(x, weight):
        assert x.dtype == weight.dtype == dtype
        shapes.append((*x.shape, *weight.shape))
        return limits_time_linear(x, weight)

    limits_time_linear = limits.time_linear
    monkeypatch.setattr(limits, "time_linear", time_linear)
    assert limits.matmul_throughput({(4, 8): 2}, 10, precision, CPU) > 0
    assert set(shapes) == {(10, 8, 4, 8)}
