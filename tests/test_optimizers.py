import copy

import torch
from torch import nn

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
    optimizer = build_optimizer("adamw", net, net["head"], 5e-5)
    assert names(net, optimizer.param_groups[0]["params"]) == {"hidden.weight", "hidden.bias", "head.weight",
                                                               "head.bias"}
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (5e-5, 0.1)
    assert (optimizer.defaults["betas"], optimizer.defaults["eps"]) == ((0.9, 0.999), 1e-8)


def test_muon_takes_the_hidden_matrices_and_adamw_the_rest():
    net = model()
    muon, adamw = build_optimizer("muon", net, net["head"], 1e-3).optimizers
    assert isinstance(muon, torch.optim.Muon)
    assert names(net, muon.param_groups[0]["params"]) == {"hidden.weight"}
    assert names(net, adamw.param_groups[0]["params"]) == {"embedding.weight", "hidden.bias", "head.weight",
                                                           "head.bias"}


def test_muon_moves_every_parameter_and_its_state_can_be_restored():
    def step(net, optimizer):
        hidden = net["hidden"](net["embedding"](torch.tensor([1, 2])))
        nn.functional.cross_entropy(net["head"](hidden), torch.tensor([0, 1])).backward()
        optimizer.step()
        optimizer.zero_grad()
    first, second = model(), model()
    a = build_optimizer("muon", first, first["head"], 1e-2)
    b = build_optimizer("muon", second, second["head"], 1e-2)
    step(first, a)
    assert all(not torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))
    assert all(p.grad is None for p in first.parameters())
    second.load_state_dict(first.state_dict())
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    step(first, a)
    step(second, b)
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))


def test_muon_without_hidden_matrices_is_adamw():
    net = model()
    net.requires_grad_(False)
    net["head"].requires_grad_(True)
    assert isinstance(build_optimizer("muon", net, net["head"], 1e-3), torch.optim.AdamW)
