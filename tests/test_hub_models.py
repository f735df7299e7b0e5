import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import TINY_CONFIGS, TINY_SIZES, save_encoder
from transformers import AutoModelForSequenceClassification

from finetuning.hub_models import load_pretrained
from finetuning.system.errors import UserError
from train_bert_hf import MODELS


def test_load_pretrained_converts_half_precision_to_float32(tmp_path):
    save_encoder(tmp_path, TINY_CONFIGS["deberta-v3-base"], dtype=torch.float16)
    assert load_file(tmp_path / "model.safetensors")["deberta.embeddings.word_embeddings.weight"].dtype == torch.float16
    model, _ = load_pretrained(str(tmp_path), seed=123)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_load_pretrained_draws_only_new_layers_from_the_seed(tmp_path, capsys):
    save_encoder(tmp_path, TINY_CONFIGS["distilbert"])
    first, second, other = (load_pretrained(str(tmp_path), seed)[0].state_dict() for seed in (123, 123, 7))
    stored = load_file(tmp_path / "model.safetensors")
    new = {"pre_classifier.weight", "classifier.weight", "classifier.bias"}
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name])
        assert torch.equal(tensor, other[name]) == (name not in new)
        if name in stored:
            assert torch.equal(tensor, stored[name])
    assert "New layers: classifier, pre_classifier" in capsys.readouterr().err


@pytest.mark.parametrize("name", MODELS)
def test_load_pretrained_equals_the_published_code(name, hub_snapshot):
    """Each weight is equal, because random numbers are drawn in the same order."""
    hub_id = MODELS[name].hub_id
    save_encoder(hub_snapshot(hub_id), TINY_CONFIGS[name])
    torch.manual_seed(123)
    published = AutoModelForSequenceClassification.from_pretrained(hub_id, num_labels=2)
    if name == "roberta":
        published.classifier.out_proj = torch.nn.Linear(published.config.hidden_size, 2)
    elif name != "distilbert":
        published.classifier = torch.nn.Linear(published.config.hidden_size, 2)
    torch.manual_seed(5)  # must not matter
    model, _ = load_pretrained(name, 123, MODELS)
    expected, state = published.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in state.items())
    dropouts = {path: module.p for path, module in model.named_modules() if isinstance(module, torch.nn.Dropout)}
    assert all(p == published.get_submodule(path).p for path, p in dropouts.items())


def test_load_pretrained_replaces_a_head_with_another_number_of_classes(tmp_path):
    config = transformers.BertConfig(**TINY_CONFIGS["bert"].to_dict() | {"num_labels": 3})
    save_encoder(tmp_path, config, kind=AutoModelForSequenceClassification)
    model, _ = load_pretrained(str(tmp_path), seed=123)
    assert model.classifier.weight.shape == (2, 16)


@pytest.mark.parametrize("change", ["missing", "misshapen"])
def test_load_pretrained_refuses_missing_or_misshapen_block_weights(tmp_path, change):
    save_encoder(tmp_path, TINY_CONFIGS["bert"])
    tensors = load_file(tmp_path / "model.safetensors")
    name = "bert.encoder.layer.1.output.dense.weight"
    tensor = tensors.pop(name)
    if change == "misshapen":
        tensors[name] = tensor[:8].clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=name):
        load_pretrained(str(tmp_path), seed=123)


def test_load_pretrained_refuses_missing_embeddings_of_another_class(tmp_path):
    save_encoder(tmp_path, transformers.IBertConfig(**TINY_SIZES, pad_token_id=1))
    model, _ = load_pretrained(str(tmp_path), seed=123)
    assert not isinstance(model.get_input_embeddings(), torch.nn.Embedding)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["ibert.embeddings.word_embeddings.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"ibert.embeddings.word_embeddings.weight, are missing"):
        load_pretrained(str(tmp_path), seed=123)
