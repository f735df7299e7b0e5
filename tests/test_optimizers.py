import copy

import pytest
import torch
from tiny_models import TINY_CONFIGS
from torch import nn
from transformers import AutoModelForSequenceClassification, GPT2Config

import train_bert_hf
import train_gpt
from finetuning.optimizers import build_optimizers
from finetuning.reporting import records
from finetuning.system.errors import UserError
from finetuning.trainable_layers import set_trainable


def tiny_network():
    torch.manual_seed(0)
    return nn.ModuleDict({"embedding": nn.Embedding(5, 4), "hidden": nn.Linear(4, 4), "head": nn.Linear(4, 2)})


def parameter_names(module, optimizer):
    """Return the names of the parameters that an optimizer updates."""
    names = {id(p): name for name, p in module.named_parameters()}
    return {names[id(p)] for p in optimizer.param_groups[0]["params"]}


def test_adamw_has_the_published_settings_and_only_trainable_parameters():
    net = tiny_network()
    net["embedding"].requires_grad_(False)
    (optimizer,) = build_optimizers("adamw", net, 5e-5)
    assert parameter_names(net, optimizer) == {
        "hidden.weight",
        "hidden.bias",
        "head.weight",
        "head.bias",
    }
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (5e-5, 0.1)
    assert (optimizer.defaults["betas"], optimizer.defaults["eps"]) == ((0.9, 0.999), 1e-8)


def test_muon_gets_the_matrices_and_its_own_learning_rate_and_adamw_the_rest():
    net = tiny_network()
    muon, adamw = build_optimizers("muon", net, 5e-5, 1e-4)
    assert isinstance(muon, torch.optim.Muon)
    assert parameter_names(net, muon) == {"hidden.weight", "head.weight"}
    assert parameter_names(net, adamw) == {"embedding.weight", "hidden.bias", "head.bias"}
    assert (muon.defaults["lr"], muon.defaults["weight_decay"], muon.defaults["adjust_lr_fn"]) == (
        1e-4,
        0.1,
        "match_rms_adamw",
    )
    assert (adamw.defaults["lr"], adamw.defaults["weight_decay"]) == (5e-5, 0.1)


GPT2 = GPT2Config(vocab_size=20, n_positions=16, n_embd=8, n_layer=2, n_head=2, pad_token_id=0)


@pytest.mark.parametrize("config", [*TINY_CONFIGS.values(), GPT2], ids=lambda config: config.model_type)
def test_muon_gets_every_matrix_except_embeddings_in_each_architecture(config):
    """This includes the Conv1D layers of GPT-2 from the Hub and every output layer."""
    net = AutoModelForSequenceClassification.from_config(config)
    muon, adamw = build_optimizers("muon", net, 1e-5, 1e-4)
    matrices = parameter_names(net, muon)
    assert matrices == {
        name
        for name, p in net.named_parameters()
        if p.ndim == 2 and not any(part in name for part in ("embedding", "wte", "wpe"))
    }
    assert matrices & {"classifier.weight", "classifier.out_proj.weight", "score.weight"}
    assert len(matrices) + len(parameter_names(net, adamw)) == len(list(net.parameters()))
    if config is GPT2:
        assert {"transformer.h.1.attn.c_attn.weight", "transformer.h.0.mlp.c_fc.weight"} <= matrices


def test_muon_excludes_frozen_matrices_tied_embeddings_and_other_embedding_classes():
    class QuantEmbedding(nn.Module):  # as in I-BERT
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(5, 4))

    net = nn.ModuleDict(
        {
            "frozen": nn.Linear(4, 4),
            "words": nn.Embedding(5, 4),
            "positions": QuantEmbedding(),
            "decoder": nn.Linear(4, 5, bias=False),
            "head": nn.Linear(4, 2, bias=False),
        }
    )
    net["frozen"].requires_grad_(False)
    net["decoder"].weight = net["words"].weight
    muon, adamw = build_optimizers("muon", net, 1e-3, 1e-4)
    assert parameter_names(net, muon) == {"head.weight"}
    assert parameter_names(net, adamw) == {"words.weight", "positions.weight"}


def test_optimizer_steps_change_every_parameter_and_restore_their_state():
    def step(net, optimizers):
        hidden = net["hidden"](net["embedding"](torch.tensor([1, 2])))
        nn.functional.cross_entropy(net["head"](hidden), torch.tensor([0, 1])).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    first, second = tiny_network(), tiny_network()
    a, b = (build_optimizers("muon", net, 1e-2, 1e-2) for net in (first, second))
    step(first, a)
    assert all(not torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))
    assert all(p.grad is None for p in first.parameters())
    second.load_state_dict(first.state_dict())
    for one, other in zip(a, b, strict=True):
        other.load_state_dict(copy.deepcopy(one.state_dict()))
    step(first, a)
    step(second, b)
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))


@pytest.fixture
def network_with_one_matrix():
    return nn.ModuleDict({"words": nn.Embedding(5, 4), "norm": nn.LayerNorm(4), "head": nn.Linear(4, 2, bias=False)})


def test_build_optimizers_omits_adamw_if_only_matrices_are_trainable(network_with_one_matrix):
    network_with_one_matrix.requires_grad_(False)
    network_with_one_matrix["head"].requires_grad_(True)
    (optimizer,) = build_optimizers("muon", network_with_one_matrix, 1e-3, 1e-4)
    assert isinstance(optimizer, torch.optim.Muon)


def test_build_optimizers_refuses_muon_without_a_trainable_matrix(network_with_one_matrix):
    network_with_one_matrix["head"].requires_grad_(False)
    with pytest.raises(UserError, match="no two-dimensional weight to train"):
        build_optimizers("muon", network_with_one_matrix, 1e-3, 1e-4)


@pytest.mark.parametrize("script", [train_gpt, train_bert_hf])
def test_parse_args_has_the_published_learning_rate_of_muon(script):
    args = script.parse_args(["--optimizer", "muon"])
    assert args.muon_learning_rate == 1e-4
    assert script.run_name(args).endswith("-optimizer_muon-seed123")
    args = script.parse_args(["--optimizer", "muon", "--muon_learning_rate", "3e-4"])
    assert script.run_name(args).endswith("-optimizer_muon-muon_learning_rate_0.0003-seed123")


@pytest.mark.parametrize("flag", [["--muon_learning_rate", "1e-4"], ["--muon_learning_rate=1e-3"]])
def test_main_refuses_muon_learning_rate_without_muon(flag, tiny_gpt, data_dir, failing):
    model = ["--model_size", tiny_gpt, "--weights", "random"]
    folders = ["--data_dir", data_dir, "--output_dir", data_dir / "run"]
    line = failing(train_gpt.main, *model, *folders, *flag)
    assert line.endswith("--muon_learning_rate needs --optimizer muon; this run uses adamw")


def test_main_passes_muon_its_own_learning_rate(tiny_gpt, data_dir):
    """With a negligible learning rate for AdamW, only the matrices change."""
    model = ["--model_size", tiny_gpt, "--weights", "random", "--trainable_layers", "all", "--context_length", "8"]
    folders = ["--data_dir", str(data_dir), "--output_dir", str(data_dir / "run"), "--save_model"]
    optimizer = ["--optimizer", "muon", "--muon_learning_rate", "0.5", "--learning_rate", "1e-30", "--max_steps", "1"]
    train_gpt.main([*model, *folders, *optimizer])
    settings = {"trainable_token_pos": "last", "average_embeddings": False, "context_length": 8}
    trained, *_ = train_gpt.load_finetuned(data_dir / "run" / records.MODEL, settings)
    before = train_gpt.instantiate_model(tiny_gpt, "random", seed=123)
    set_trainable(before, "all", train_gpt.replace_head(before, seed=123))
    changed = {
        name for name, p in before.named_parameters() if not torch.allclose(p, trained.get_parameter(name), atol=1e-6)
    }
    assert changed == {name for name, p in before.named_parameters() if p.ndim == 2 and "emb" not in name}
