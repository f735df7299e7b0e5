import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SIZES, TINY_CONFIGS, tiny_tokenizer
from transformers import (
    AlbertConfig,
    AutoModelForSequenceClassification,
    BigBirdConfig,
    ElectraConfig,
    XLMConfig,
    XLMRobertaConfig,
)

import train_bert_hf
import train_gpt
from finetuning.errors import UserError
from finetuning.gpt_classifier import GPTClassifier
from finetuning.layers import count_parameters, find_output_layers, modules_in_order, set_trainable, trial_copy
from previous_chapters import GPTModel

MODES = ("all", "last_block", "last_layer")


def tiny_encoder(config):
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config)


def gpt():
    torch.manual_seed(0)
    model = GPTModel({"vocab_size": 20, "context_length": 8, "emb_dim": 8, "n_heads": 2, "n_layers": 2,
                      "drop_rate": 0.0, "qkv_bias": True})
    layers = train_gpt.replace_head(model, seed=0)
    return GPTClassifier(model), layers


def check_gradients(model, logits, expected):
    """Every trainable tensor, whose name starts with one of `expected`, must get a gradient, every frozen one none."""
    F.cross_entropy(logits, torch.tensor([0, 1])).backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == name.startswith(expected), name
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            # A key's bias shifts all scores of a query alike, which softmax ignores: its gradient is only rounding.
            assert parameter.grad.abs().max() > 0 or "key" in name.lower() or name.endswith("k_lin.bias"), name
        else:
            assert parameter.grad is None, name


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", train_bert_hf.MODELS)
def test_what_trains_in_each_encoder(name, mode):
    model = tiny_encoder(TINY_CONFIGS[name])
    set_trainable(model, mode, train_bert_hf.output_layers(name, model))
    encoder = train_bert_hf.MODELS[name]
    head = {"roberta": "classifier."}.get(name, encoder.head)  # RoBERTa's dense layer, too, as published
    expected = {"all": ("",), "last_block": (head, *encoder.between, f"{encoder.blocks}.1."),
                "last_layer": (head,)}[mode]
    ids = torch.tensor([[2, 6, 9, 11, 3], [2, 8, 7, 12, 3]])
    check_gradients(model, model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits, expected)


@pytest.mark.parametrize("mode", MODES)
def test_what_trains_in_gpt(mode):
    model, layers = gpt()
    set_trainable(model, mode, layers)
    expected = {"all": ("",), "last_block": ("out_head", "final_norm", "trf_blocks.1."), "last_layer": ("out_head",)}
    logits = model(torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[2], [2]]))[:, 0]
    # Positions that the input does not reach get gradients of zero, but as part of one tensor.
    check_gradients(model, logits, expected[mode])


@pytest.mark.parametrize("name", train_bert_hf.MODELS)
def test_the_table_of_models_names_what_a_search_finds(name):
    model = tiny_encoder(TINY_CONFIGS[name]).train()
    found = find_output_layers(model, modules_in_order(model, input_ids=torch.tensor([[2, 6, 3]])), 2, 2)
    listed = train_bert_hf.output_layers(name, model)
    assert found.head is listed.head
    assert found.last_block is listed.last_block
    parameters = [{id(p) for module in layers.between for p in module.parameters()} for layers in (found, listed)]
    assert parameters[0] == parameters[1]
    assert model.training


def test_a_model_that_is_not_in_the_table():
    config = ElectraConfig(vocab_size=20, hidden_size=16, embedding_size=16, num_hidden_layers=3, num_attention_heads=2,
                           intermediate_size=16, max_position_embeddings=16)
    model = tiny_encoder(config)
    set_trainable(model, "last_block", train_bert_hf.output_layers("google/electra", model, tiny_tokenizer()))
    ids = torch.tensor([[2, 6, 9, 3], [2, 8, 7, 3]])
    check_gradients(model, model(input_ids=ids).logits, ("classifier.", "electra.encoder.layer.2."))


@pytest.mark.parametrize("config", [
    # One block, run three times.
    AlbertConfig(vocab_size=20, hidden_size=16, embedding_size=16, num_hidden_layers=3, num_attention_heads=2,
                 intermediate_size=16, max_position_embeddings=16),
    # The attentions of all blocks in one list, their norms in another.
    XLMConfig(vocab_size=20, emb_dim=16, n_layers=3, n_heads=2, max_position_embeddings=16)])
def test_last_block_is_refused_where_there_is_no_telling_which_it_is(config):
    model = tiny_encoder(config)
    layers = train_bert_hf.output_layers("other", model, tiny_tokenizer())
    with pytest.raises(UserError, match="use --trainable_layers all or last_layer"):
        set_trainable(model, "last_block", layers)
    set_trainable(model, "last_layer", layers)
    assert count_parameters(model)[1] == 16 * 2 + 2


def test_a_classification_head_trains_as_a_whole():
    """Of an unknown model, too: its dense layer is as new as its output layer."""
    model = tiny_encoder(XLMRobertaConfig(**SIZES, pad_token_id=1))
    layers = train_bert_hf.output_layers("xlm-roberta", model, tiny_tokenizer(1))
    set_trainable(model, "last_layer", layers)
    assert count_parameters(model)[1] == (16 * 16 + 16) + (16 * 2 + 2)
    assert layers.between == []


def test_a_model_without_a_classifier_is_refused():
    model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    with pytest.raises(UserError, match="cannot find this model's output layer"):
        find_output_layers(model, modules_in_order(model, input=torch.ones(1, 4)), 1, 2)


def test_a_trial_leaves_no_trace():
    """BigBird gives up its sparse attention for good after a short text, and seeds NumPy with each text."""
    model = tiny_encoder(BigBirdConfig(**SIZES | {"max_position_embeddings": 2048}, attention_type="block_sparse",
                                       block_size=2, num_random_blocks=1)).train()
    before = str(model), str(model.config), {name: id(module) for name, module in model.named_modules()}
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    states = torch.get_rng_state(), str(np.random.get_state()), random.getstate()
    order = modules_in_order(model, input_ids=torch.tensor([[2, 6, 3]]))
    with trial_copy(model) as trial:
        trial.train()(input_ids=torch.tensor([[2, 6, 3] * 16]))
        random.random()
    assert order[-1] is model.classifier.out_proj
    assert before == (str(model), str(model.config), {name: id(module) for name, module in model.named_modules()})
    assert {module.attention_type for module in model.modules() if hasattr(module, "attention_type")} == {
        "block_sparse"}
    assert all(module.training and not module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (str(np.random.get_state()), random.getstate()) == states[1:]


def test_parameters_are_counted_once():
    model, layers = gpt()
    # 20*8 + 8*8 embeddings, 2 blocks of 4*(8*8+8) + 8*32+32 + 32*8+8 + 4*8, final norm 2*8, head 8*2+2
    assert count_parameters(model)[0] == 224 + 2 * (288 + 288 + 264 + 32) + 16 + 18
    set_trainable(model, "last_layer", layers)
    assert count_parameters(model)[1] == 18
