import json
import pickle

import pytest
import torch
import transformers
from bad_inputs import BadInput, Bomb, bad_file, parameters
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
    assert "Randomly initialized layers: classifier, pre_classifier" in capsys.readouterr().err


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


def weights(name, message, change):
    """Return a case with invalid weights: `change` returns new tensors or bytes from the valid ones."""

    def prepare(folder):
        path = folder / "model" / "model.safetensors"
        changed = change(load_file(path), path.read_bytes())
        path.write_bytes(changed) if isinstance(changed, bytes) else save_file(changed, path, {"format": "pt"})

    return BadInput(name, message, prepare)


def pickle_with_code(folder):
    (folder / "model" / "model.safetensors").unlink()
    with open(folder / "model" / "pytorch_model.bin", "wb") as weights_file:
        pickle.dump({"weight": Bomb()}, weights_file, protocol=2)


def torch_file_with_code(folder):
    (folder / "model" / "model.safetensors").unlink()
    torch.save({"weight": Bomb()}, folder / "model" / "pytorch_model.bin")


def without_tokenizer(folder):
    for path in (folder / "model").glob("token*"):
        path.unlink()


def model_with_code(folder):
    """Add an architecture defined in a file of the model, which would create a folder if it were executed."""
    settings = {
        "model_type": "other",
        "auto_map": {"AutoConfig": "code.Config", "AutoModelForSequenceClassification": "code.Model"},
    }
    (folder / "model" / "config.json").write_text(json.dumps(settings))
    (folder / "model" / "code.py").write_text("import os\nos.mkdir('exploded')\n")


def adapter_without_weights(folder):
    for path in (folder / "model").iterdir():
        path.unlink()
    (folder / "model" / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/bert"}')


def tokenizer_without(*roles):
    def prepare(folder):
        path = folder / "model" / "tokenizer_config.json"
        path.write_text(
            json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key not in roles})
        )

    return prepare


CASES = [
    weights("truncated weights", "cannot load --model model", lambda tensors, content: content[:-100]),
    weights("a truncated header", "cannot load --model model", lambda tensors, content: content[:100]),
    weights("empty weights", "cannot load --model model", lambda tensors, content: b""),
    weights("zeros as weights", "cannot load --model model", lambda tensors, content: bytes(len(content))),
    weights("an HTML page as weights", "cannot load --model model", lambda tensors, content: b"<html>Log in</html>"),
    weights(
        "missing tensors",
        "1 parameters, such as bert.encoder.layer.1.output.dense.weight, are missing",
        lambda tensors, content: {
            name: tensor for name, tensor in tensors.items() if name != "bert.encoder.layer.1.output.dense.weight"
        },
    ),
    weights(
        "wrong shapes",
        "are missing or of another shape",
        lambda tensors, content: {name: tensor[:3].clone() for name, tensor in tensors.items()},
    ),
    weights(
        "weights of another model",
        "are missing or of another shape",
        lambda tensors, content: {f"gpt.{name}": tensor for name, tensor in tensors.items()},
    ),
    weights(
        "a NaN",
        "the checkpoint of --model model is damaged: bert.encoder.layer.1.output.dense.bias holds NaN",
        lambda tensors, content: (
            tensors | {"bert.encoder.layer.1.output.dense.bias": torch.tensor([float("nan")] + [0.0] * 15)}
        ),
    ),
    BadInput(
        "a model with custom code",
        "cannot load --model model: it needs code of its own, which is never run here",
        model_with_code,
    ),
    BadInput(
        "an adapter beside the weights",
        "cannot load --model model: it holds an adapter (adapter_config.json)",
        lambda folder: (folder / "model" / "adapter_config.json").write_text("{}"),
    ),
    BadInput("an adapter instead of weights", "it holds an adapter (adapter_config.json)", adapter_without_weights),
    BadInput("no padding token", "its tokenizer has neither a pad nor an eos token", tokenizer_without("pad_token")),
    BadInput("a pickle that runs code", "cannot load --model model", pickle_with_code),
    BadInput("a PyTorch file that runs code", "its weights are a pickle of more than tensors", torch_file_with_code),
    BadInput("no tokenizer", "cannot load --model model: its tokenizer has no vocabulary", without_tokenizer),
    bad_file("a truncated configuration", "model/config.json", b'{"model_type": "be', "cannot load --model model"),
    bad_file("a list as configuration", "model/config.json", b"[]", "cannot load --model model"),
    bad_file("an image model", "model/config.json", b'{"model_type": "vit"}', "cannot load --model model"),
    bad_file(
        "an unknown architecture", "model/config.json", b'{"model_type": "nonsense"}', "cannot load --model model"
    ),
    bad_file(
        "a smaller vocabulary",
        "model/config.json",
        json.dumps({**TINY_CONFIGS["bert"].to_dict(), "vocab_size": 5}).encode(),
        "its tokenizer is of another model",
    ),
    bad_file("a truncated tokenizer", "model/tokenizer.json", b"{", "cannot load --model model"),
]


@pytest.mark.parametrize(("bad", "script"), parameters(CASES))
def test_bad_model_ends_in_one_line_and_changes_no_file(bad, script, assert_refused):
    assert_refused(bad, script)
