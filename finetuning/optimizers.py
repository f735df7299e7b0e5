"""The optimizers of the train scripts: AdamW as published, or Muon for matrices and AdamW for the rest."""

import torch
from torch import nn

from finetuning.system.errors import UserError

WEIGHT_DECAY = 0.1


def build_optimizers(
    name: str, model: nn.Module, learning_rate: float, muon_learning_rate: float = 1e-4
) -> list[torch.optim.Optimizer]:
    """Return the optimizers of the trainable parameters, with constant learning rates and weight decay 0.1.

    "adamw" is AdamW (Loshchilov & Hutter, 2019) for all of them. "muon" is Muon (Jordan et al., 2024)
    for every two-dimensional weight that is not an embedding, including the output layer, with steps
    scaled to the size of AdamW's, and AdamW for the rest. Raises UserError if Muon has no weight to train.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    muon_params = matrices(model) if name == "muon" else []
    if name == "muon" and not muon_params:
        raise UserError("--optimizer muon has no two-dimensional weight to train in this model; use --optimizer adamw")
    muon_ids = {id(p) for p in muon_params}
    adamw_params = [p for p in trainable if id(p) not in muon_ids]
    optimizers: list[torch.optim.Optimizer] = []
    if muon_params:
        optimizers.append(
            torch.optim.Muon(
                muon_params, lr=muon_learning_rate, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"
            )
        )
    if adamw_params:
        optimizers.append(torch.optim.AdamW(adamw_params, lr=learning_rate, weight_decay=WEIGHT_DECAY, fused=True))
    return optimizers


def matrices(model: nn.Module) -> list[nn.Parameter]:
    """Return the trainable two-dimensional weights that are not embeddings."""
    embeddings = {id(p) for module in model.modules() if is_embedding(module) for p in module.parameters(recurse=False)}
    return [p for p in model.parameters() if p.requires_grad and p.ndim == 2 and id(p) not in embeddings]


def is_embedding(module: nn.Module) -> bool:
    """Return whether a module's own parameters are embeddings, including classes that are not PyTorch's."""
    return isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or "Embedding" in type(module).__name__
