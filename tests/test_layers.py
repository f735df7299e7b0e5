import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_CONFIGS
from transformers import AlbertConfig, AutoModelForSequenceClassification, ElectraConfig

import train_bert_hf
import train_gpt
from finetuning.errors import UserError
from finetuning.gpt_classifier import GPTClassifier
from finetuning.layers import count_parameters, find_output_layers, set_trainable
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
    expected = {"all": ("",), "last_block": (encoder.head, *encoder.between, f"{encoder.blocks}.1."),
                "last_layer": (encoder.head,)}[mode]
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
    found = find_output_layers(model, 2, 2, input_ids=torch.tensor([[2, 6, 3]]))
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
    set_trainable(model, "last_block", train_bert_hf.output_layers("google/electra", model))
    ids = torch.tensor([[2, 6, 9, 3], [2, 8, 7, 3]])
    check_gradients(model, model(input_ids=ids).logits, ("classifier.", "electra.encoder.layer.2."))


def test_last_block_is_refused_where_there_is_no_telling_which_it_is():
    config = AlbertConfig(vocab_size=20, hidden_size=16, embedding_size=16, num_hidden_layers=3, num_attention_heads=2,
                          intermediate_size=16, max_position_embeddings=16)
    model = tiny_encoder(config)  # one block, run three times
    layers = train_bert_hf.output_layers("albert", model)
    with pytest.raises(UserError, match="use --trainable_layers all or last_layer"):
        set_trainable(model, "last_block", layers)
    set_trainable(model, "last_layer", layers)
    assert count_parameters(model)[1] == 16 * 2 + 2


def test_a_model_without_a_classifier_is_refused():
    with pytest.raises(UserError, match="cannot find this model's output layer"):
        find_output_layers(torch.nn.Sequential(torch.nn.Linear(4, 3)), 1, 2, input=torch.ones(1, 4))


def test_parameters_are_counted_once():
    model, layers = gpt()
    # 20*8 + 8*8 embeddings, 2 blocks of 4*(8*8+8) + 8*32+32 + 32*8+8 + 4*8, final norm 2*8, head 8*2+2
    assert count_parameters(model)[0] == 224 + 2 * (288 + 288 + 264 + 32) + 16 + 18
    set_trainable(model, "last_layer", layers)
    assert count_parameters(model)[1] == 18
