"""The optimizers of the train scripts: AdamW as published, or Muon for the matrices and AdamW for the rest."""

import torch
from torch import nn

from finetuning.errors import UserError

WEIGHT_DECAY = 0.1


class Together:
    """Several optimizers, each with its own parameters, behind the interface of one."""

    def __init__(self, *optimizers):
        self.optimizers = optimizers

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self):
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def state_dict(self):
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load_state_dict(self, states):
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)


def build_optimizer(name, model, learning_rate, muon_learning_rate=None):
    """Return an optimizer for the trainable parameters of `model`, with constant learning rate and weight decay 0.1.

    "adamw" is AdamW (Loshchilov & Hutter, 2019) for all of them. "muon" is Muon (Jordan et al., 2024)
    at `muon_learning_rate`, its steps scaled to the size of AdamW's, for every two-dimensional weight
    that is not an embedding, the output layer included, and AdamW for the rest. Raises UserError if
    Muon has no weight to train.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    embeddings = {id(p) for module in model.modules() if is_embedding(module) for p in module.parameters(recurse=False)}
    matrices = [p for p in trainable if name == "muon" and p.ndim == 2 and id(p) not in embeddings]
    if name == "muon" and not matrices:
        raise UserError("--optimizer muon has no two-dimensional weight to train in this model; use --optimizer adamw")
    matrix_ids = {id(p) for p in matrices}
    others = [p for p in trainable if id(p) not in matrix_ids]
    optimizers = []
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=muon_learning_rate, weight_decay=WEIGHT_DECAY,
                                           adjust_lr_fn="match_rms_adamw"))
    if others:
        optimizers.append(torch.optim.AdamW(others, lr=learning_rate, weight_decay=WEIGHT_DECAY, fused=True))
    return optimizers[0] if len(optimizers) == 1 else Together(*optimizers)


def is_embedding(module):
    """Return whether the module's own parameters are embeddings, also where its class is not PyTorch's."""
    return isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or "Embedding" in type(module).__name__
