import copy

import pytest
import torch
from tiny_gpt import GPT_CONFIG
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from gpt_download import read_params
from previous_chapters import GPTModel, generate_text_simple, load_weights_into_gpt


@pytest.fixture
def published(tmp_path):
    """A tiny GPT-2 of Transformers, and its weights as gpt_download returns them."""
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=8, n_head=2, n_layer=3)).eval()
    for parameter in gpt2.parameters():  # the initial zeros and ones of biases and norms would hide a swap
        nn.init.normal_(parameter, std=0.3)
    gpt2.transformer.save_pretrained(tmp_path)
    return gpt2, read_params(tmp_path / "model.safetensors")


def test_gpt_model_logits_equal_those_of_transformers(published):
    gpt2, params = published
    model = GPTModel(GPT_CONFIG).eval()
    load_weights_into_gpt(model, params)
    ids = torch.randint(50, (4, 16))
    with torch.no_grad():
        torch.testing.assert_close(model(ids), gpt2(ids).logits, rtol=1e-4, atol=1e-4)


def test_load_weights_into_gpt_refuses_arrays_that_do_not_fit_and_copies_nothing(published):
    _, params = published
    model = GPTModel(GPT_CONFIG)
    before = copy.deepcopy(model.state_dict())
    broken = copy.deepcopy(params)
    del broken["blocks"][1]["attn"]["c_attn"]["b"]
    with pytest.raises(ValueError, match="blocks/1/attn/c_attn/b is missing"):
        load_weights_into_gpt(model, broken)
    broken = copy.deepcopy(params)
    broken["blocks"].append(broken["blocks"][0])
    with pytest.raises(ValueError, match=r"blocks/3/.* has no place in this model"):
        load_weights_into_gpt(model, broken)
    broken = copy.deepcopy(params)
    broken["wpe"] = broken["wpe"][:15]
    with pytest.raises(ValueError, match=r"wpe has shape \(15, 8\), not \(16, 8\)"):
        load_weights_into_gpt(model, broken)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_gpt_model_creates_parameters_in_the_books_order():
    torch.manual_seed(123)
    model = GPTModel({**GPT_CONFIG, "qkv_bias": False})
    torch.manual_seed(123)
    assert torch.equal(model.tok_emb.weight, nn.Embedding(50, 8).weight)
    assert torch.equal(model.pos_emb.weight, nn.Embedding(16, 8).weight)
    for block in model.trf_blocks:
        att = block.att
        for layer in (att.W_query, att.W_key, att.W_value):
            assert torch.equal(layer.weight, nn.Linear(8, 8, bias=False).weight)
        for layer, inputs, outputs in ((att.out_proj, 8, 8), (block.ff.layers[0], 8, 32), (block.ff.layers[2], 32, 8)):
            expected = nn.Linear(inputs, outputs)
            assert torch.equal(layer.weight, expected.weight)
            assert torch.equal(layer.bias, expected.bias)
    assert torch.equal(model.out_head.weight, nn.Linear(8, 50, bias=False).weight)


def test_gpt_model_loads_a_state_dict_with_the_books_causal_masks():
    model = GPTModel(GPT_CONFIG)
    state = model.state_dict()
    assert "trf_blocks.0.att.W_query.weight" in state
    for i in range(3):
        state[f"trf_blocks.{i}.att.mask"] = torch.ones(16, 16).triu(1)
    model.load_state_dict(state)


def test_gpt_model_does_not_attend_to_later_tokens():
    model = GPTModel(GPT_CONFIG).eval()
    ids = torch.randint(50, (1, 10))
    changed = ids.clone()
    changed[0, 7] = (ids[0, 7] + 1) % 50
    with torch.no_grad():
        difference = (model(ids) - model(changed)).abs().amax(dim=-1)[0]
    assert (difference[:7] == 0).all()
    assert (difference[7:] > 0).all()


def test_gpt_model_applies_dropout_in_training_mode_only():
    model = GPTModel({**GPT_CONFIG, "drop_rate": 0.5})
    ids = torch.randint(50, (1, 10))
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))


def test_generate_text_simple_is_greedy_and_limits_the_context():
    class NextNumber(nn.Module):
        """Predicts the last token id plus the number of input tokens."""

        def forward(self, ids):
            return nn.functional.one_hot((ids[:, -1:] + ids.shape[1]) % 50, 50).float()

    ids = generate_text_simple(NextNumber(), torch.tensor([[1, 2]]), max_new_tokens=3, context_size=3)
    assert ids.tolist() == [[1, 2, 4, 7, 10]]  # 2 + 2 inputs, 4 + 3 inputs, 7 + 3 inputs


def test_gpt_model_refuses_an_emb_dim_that_n_heads_does_not_divide():
    with pytest.raises(ValueError, match="divisible"):
        GPTModel({**GPT_CONFIG, "n_heads": 3})
