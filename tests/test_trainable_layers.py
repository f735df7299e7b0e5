import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_models import TINY_CONFIGS, TINY_SIZES, tiny_tokenizer
from transformers import AutoModelForSequenceClassification, BigBirdConfig, ElectraConfig

import train_gpt
from finetuning.model_inspection import detect_finetune_layers
from finetuning.performance.gpt_classifier import GPTClassifier
from finetuning.system.errors import UserError
from finetuning.trainable_layers import (
    count_parameters,
    find_finetune_layers,
    isolated_copy,
    modules_in_order,
    set_trainable,
)
from previous_chapters import GPTModel
from train_bert_hf import MODELS

MODES = ("all", "last_block", "last_layer")
GPT_CONFIG = {"vocab_size": 20, "context_length": 8, "emb_dim": 8, "n_heads": 2, "n_layers": 2, "drop_rate": 0.0,
              "qkv_bias": True}  # fmt: skip


def tiny_encoder(config):
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config)


def tiny_gpt_classifier():
    """Return a GPTClassifier and its last layers."""
    torch.manual_seed(0)
    model = GPTModel(GPT_CONFIG)
    layers = train_gpt.replace_head(model, seed=0)
    return GPTClassifier(model), layers


def check_gradients(model, logits, prefixes):
    """Check that exactly the parameters whose names start with one of the prefixes are trainable and get a gradient."""
    F.cross_entropy(logits, torch.tensor([0, 1])).backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == name.startswith(prefixes), name
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            # A key bias adds the same value to all scores of a query, which softmax ignores: only rounding remains.
            assert parameter.grad.abs().max() > 0 or "key" in name.lower() or name.endswith("k_lin.bias"), name
        else:
            assert parameter.grad is None, name


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_set_trainable_selects_the_layers_of_each_published_encoder(name, mode):
    model, spec = tiny_encoder(TINY_CONFIGS[name]), MODELS[name]
    set_trainable(model, mode, spec.finetune_layers(model))
    head = {"roberta": "classifier."}.get(name, spec.head)  # as published, RoBERTa's dense layer is part of the head
    prefixes = {
        "all": ("",),
        "last_block": (head, *spec.pooler_and_norm, f"{spec.blocks}.1."),
        "last_layer": (head,),
    }[mode]
    ids = torch.tensor([[2, 6, 9, 11, 3], [2, 8, 7, 12, 3]])
    check_gradients(model, model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits, prefixes)


@pytest.mark.parametrize("mode", MODES)
def test_set_trainable_selects_the_layers_of_a_gpt(mode):
    model, layers = tiny_gpt_classifier()
    set_trainable(model, mode, layers)
    prefixes = {"all": ("",), "last_block": ("out_head", "final_norm", "trf_blocks.1."), "last_layer": ("out_head",)}
    logits = model(torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[2], [2]]))[:, 0]
    check_gradients(model, logits, prefixes[mode])


def test_set_trainable_selects_the_detected_layers_of_another_encoder():
    config = ElectraConfig(**TINY_SIZES | {"embedding_size": 16, "num_hidden_layers": 3})
    model = tiny_encoder(config)
    set_trainable(model, "last_block", detect_finetune_layers("google/electra", model, tiny_tokenizer()))
    ids = torch.tensor([[2, 6, 9, 3], [2, 8, 7, 3]])
    check_gradients(model, model(input_ids=ids).logits, ("classifier.", "electra.encoder.layer.2."))


@pytest.mark.parametrize("name", MODELS)
def test_find_finetune_layers_agrees_with_each_encoder_spec(name):
    model = tiny_encoder(TINY_CONFIGS[name]).train()
    found = find_finetune_layers(model, modules_in_order(model, input_ids=torch.tensor([[2, 6, 3]])), 2, 2)
    listed = MODELS[name].finetune_layers(model)
    assert found.head is listed.head
    assert found.last_block is listed.last_block
    found_parameters, listed_parameters = (
        {id(p) for module in layers.pooler_and_norm for p in module.parameters()} for layers in (found, listed)
    )
    assert found_parameters == listed_parameters
    assert model.training


def test_find_finetune_layers_refuses_a_model_without_a_classifier():
    model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    with pytest.raises(UserError, match="cannot find this model's output layer"):
        find_finetune_layers(model, modules_in_order(model, input=torch.ones(1, 4)), 1, 2)


def test_isolated_copy_does_not_change_the_model_or_the_random_state():
    """BigBird disables its sparse attention permanently after a short text, and seeds NumPy with each text."""
    sparse = {"attention_type": "block_sparse", "block_size": 2, "num_random_blocks": 1}
    model = tiny_encoder(BigBirdConfig(**TINY_SIZES | {"max_position_embeddings": 2048}, **sparse)).train()

    def state():
        modules = {name: id(module) for name, module in model.named_modules()}
        random_states = torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()
        return str(model), str(model.config), modules, random_states

    before = state()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    order = modules_in_order(model, input_ids=torch.tensor([[2, 6, 3]]))
    with isolated_copy(model) as copied:
        copied.train()(input_ids=torch.tensor([[2, 6, 3] * 16]))
        random.random()
    assert order[-1] is model.classifier.out_proj
    assert state() == before
    assert {m.attention_type for m in model.modules() if hasattr(m, "attention_type")} == {"block_sparse"}
    assert all(module.training and not module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_count_parameters_counts_shared_ones_once():
    model, layers = tiny_gpt_classifier()
    # 20*8 + 8*8 embeddings, 2 blocks of 4*(8*8+8) + 8*32+32 + 32*8+8 + 4*8, final norm 2*8, head 8*2+2
    assert count_parameters(model)[0] == 224 + 2 * (288 + 288 + 264 + 32) + 16 + 18
    set_trainable(model, "last_layer", layers)
    assert count_parameters(model)[1] == 18
    model.trf_blocks[1] = model.trf_blocks[0]
    assert count_parameters(model)[0] == 224 + (288 + 288 + 264 + 32) + 16 + 18
