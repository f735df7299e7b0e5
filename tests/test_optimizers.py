import copy

import pytest
import torch
from conftest import TINY_CONFIGS
from torch import nn
from transformers import AutoModelForSequenceClassification, GPT2Config

import train_bert_hf
import train_gpt
from finetuning import records
from finetuning.errors import UserError
from finetuning.layers import set_trainable
from finetuning.optimizers import build_optimizer


def model():
    torch.manual_seed(0)
    return nn.ModuleDict({"embedding": nn.Embedding(5, 4), "hidden": nn.Linear(4, 4), "head": nn.Linear(4, 2)})


def names(module, parameters):
    found = {id(p): name for name, p in module.named_parameters()}
    return {found[id(p)] for p in parameters}


def test_adamw_has_the_published_settings_and_only_what_trains():
    net = model()
    net["embedding"].requires_grad_(False)
    optimizer = build_optimizer("adamw", net, 5e-5)
    assert names(net, optimizer.param_groups[0]["params"]) == {"hidden.weight", "hidden.bias", "head.weight",
                                                               "head.bias"}
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (5e-5, 0.1)
    assert (optimizer.defaults["betas"], optimizer.defaults["eps"]) == ((0.9, 0.999), 1e-8)


def test_muon_trains_the_matrices_at_its_own_learning_rate_and_adamw_the_rest():
    net = model()
    muon, adamw = build_optimizer("muon", net, 5e-5, 1e-4).optimizers
    assert isinstance(muon, torch.optim.Muon)
    assert names(net, muon.param_groups[0]["params"]) == {"hidden.weight", "head.weight"}
    assert names(net, adamw.param_groups[0]["params"]) == {"embedding.weight", "hidden.bias", "head.bias"}
    assert (muon.defaults["lr"], muon.defaults["weight_decay"], muon.defaults["adjust_lr_fn"]) == (
        1e-4, 0.1, "match_rms_adamw")
    assert (adamw.defaults["lr"], adamw.defaults["weight_decay"]) == (5e-5, 0.1)


GPT2 = GPT2Config(vocab_size=20, n_positions=16, n_embd=8, n_layer=2, n_head=2, pad_token_id=0)


@pytest.mark.parametrize("config", [*TINY_CONFIGS.values(), GPT2], ids=lambda config: config.model_type)
def test_muon_trains_every_matrix_but_embeddings_whatever_its_module(config):
    """Also the Conv1D layers of GPT-2 from the Hub, and the output layer of each."""
    net = AutoModelForSequenceClassification.from_config(config)
    muon, adamw = build_optimizer("muon", net, 1e-5, 1e-4).optimizers
    found = names(net, muon.param_groups[0]["params"])
    assert found == {name for name, p in net.named_parameters()
                     if p.ndim == 2 and not any(part in name for part in ("embedding", "wte", "wpe"))}
    assert "classifier.weight" in found or "classifier.out_proj.weight" in found or "score.weight" in found
    assert len(found) + len(names(net, adamw.param_groups[0]["params"])) == len(list(net.parameters()))
    if config is GPT2:
        assert {"transformer.h.1.attn.c_attn.weight", "transformer.h.0.mlp.c_fc.weight"} <= found


def test_muon_leaves_frozen_matrices_tied_embeddings_and_embeddings_of_other_classes_alone():
    class QuantEmbedding(nn.Module):  # I-BERT's is such a one
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(5, 4))

    net = nn.ModuleDict({"frozen": nn.Linear(4, 4), "words": nn.Embedding(5, 4), "positions": QuantEmbedding(),
                         "decoder": nn.Linear(4, 5, bias=False), "head": nn.Linear(4, 2, bias=False)})
    net["frozen"].requires_grad_(False)
    net["decoder"].weight = net["words"].weight
    muon, adamw = build_optimizer("muon", net, 1e-3, 1e-4).optimizers
    assert names(net, muon.param_groups[0]["params"]) == {"head.weight"}
    assert names(net, adamw.param_groups[0]["params"]) == {"words.weight", "positions.weight"}


def test_muon_moves_every_parameter_and_its_state_can_be_restored():
    def step(net, optimizer):
        hidden = net["hidden"](net["embedding"](torch.tensor([1, 2])))
        nn.functional.cross_entropy(net["head"](hidden), torch.tensor([0, 1])).backward()
        optimizer.step()
        optimizer.zero_grad()
    first, second = model(), model()
    a, b = (build_optimizer("muon", net, 1e-2, 1e-2) for net in (first, second))
    step(first, a)
    assert all(not torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))
    assert all(p.grad is None for p in first.parameters())
    second.load_state_dict(first.state_dict())
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    step(first, a)
    step(second, b)
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))


def test_muon_alone_where_nothing_is_left_for_adamw_and_an_error_where_nothing_is_left_for_muon():
    net = nn.ModuleDict({"words": nn.Embedding(5, 4), "norm": nn.LayerNorm(4), "head": nn.Linear(4, 2, bias=False)})
    net.requires_grad_(False)
    net["head"].requires_grad_(True)
    assert isinstance(build_optimizer("muon", net, 1e-3, 1e-4), torch.optim.Muon)
    net.requires_grad_(True)
    net["head"].requires_grad_(False)
    with pytest.raises(UserError, match="no two-dimensional weight to train"):
        build_optimizer("muon", net, 1e-3, 1e-4)


@pytest.mark.parametrize("script", [train_gpt, train_bert_hf])
def test_the_published_learning_rate_of_muon_is_the_default(script):
    args = script.parse_args(["--optimizer", "muon"])
    assert args.muon_learning_rate == 1e-4
    assert script.run_name(args).endswith("-optimizer_muon-seed123")
    args = script.parse_args(["--optimizer", "muon", "--muon_learning_rate", "3e-4"])
    assert script.run_name(args).endswith("-optimizer_muon-muon_learning_rate_0.0003-seed123")


@pytest.mark.parametrize("flag", [["--muon_learning_rate", "1e-4"], ["--muon_learning_rate=1e-3"]])
def test_the_learning_rate_of_muon_without_muon_is_refused(flag, tiny_gpt, data_dir, failing):
    line = failing(train_gpt.main, "--model_size", tiny_gpt, "--weights", "random", "--data_dir", data_dir,
                   "--output_dir", data_dir / "run", *flag)
    assert line.endswith("--muon_learning_rate needs --optimizer muon; this run uses adamw")


def test_a_run_gives_muon_its_learning_rate(tiny_gpt, data_dir):
    """With a learning rate next to nothing for the rest, the matrices alone move."""
    flags = ["--model_size", tiny_gpt, "--weights", "random", "--trainable_layers", "all", "--context_length", "8",
             "--data_dir", str(data_dir), "--output_dir", str(data_dir / "run"), "--max_steps", "1", "--save_model",
             "--learning_rate", "1e-30", "--optimizer", "muon", "--muon_learning_rate", "0.5"]
    train_gpt.main(flags)
    trained, *_ = train_gpt.load_saved(data_dir / "run" / records.MODEL, {
        "trainable_token_pos": "last", "average_embeddings": False, "context_length": 8})
    before = train_gpt.instantiate_model(tiny_gpt, "random", seed=123)
    set_trainable(before, "all", train_gpt.replace_head(before, seed=123))
    moved = {name for name, p in before.named_parameters()
             if not torch.allclose(p, trained.get_parameter(name), atol=1e-6)}
    assert moved == {name for name, p in before.named_parameters() if p.ndim == 2 and "emb" not in name}
