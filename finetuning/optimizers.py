"""The optimizers of the train scripts: AdamW as published, or Muon for the hidden matrices."""

import torch
from torch import nn

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


def build_optimizer(name, model, head, learning_rate):
    """An optimizer for the trainable parameters of `model`, with constant learning rate and weight decay 0.1.

    "adamw" is AdamW (Loshchilov & Hutter, 2019) for all. "muon" is Muon (Jordan et al., 2024) for
    the weights of the linear layers other than `head`, its updates scaled to the size of AdamW's so
    that one learning rate serves both, and AdamW for embeddings, norms, biases and the head.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    hidden = []
    if name == "muon":
        hidden = [module.weight for module in model.modules()
                  if isinstance(module, nn.Linear) and module is not head and module.weight.requires_grad]
    hidden_ids = {id(p) for p in hidden}
    others = [p for p in trainable if id(p) not in hidden_ids]
    adamw = torch.optim.AdamW(others, lr=learning_rate, weight_decay=WEIGHT_DECAY, fused=True)
    if not hidden:
        return adamw
    return Together(torch.optim.Muon(hidden, lr=learning_rate, weight_decay=WEIGHT_DECAY,
                                     adjust_lr_fn="match_rms_adamw"), adamw)
