"""Which layers learn: the output layer, the last transformer block, or everything."""

from typing import NamedTuple

import torch
from torch import nn

from finetuning.errors import UserError


class OutputLayers(NamedTuple):
    """The layers at a classifier's end, from last to first."""

    head: nn.Module  # the output layer: hidden size -> classes
    between: list[nn.Module]  # what stands between the last block and the head: final norm, pooler, ...
    last_block: nn.Module | None  # the last transformer block; None where it is not known


def set_trainable(model, trainable_layers, layers):
    """Let "all" of the model learn, or the "last_block" and what comes after it, or the "last_layer" alone.

    Raises UserError for "last_block" where the model's last block is not known.
    """
    if trainable_layers == "all":
        model.requires_grad_(True)
        return
    if trainable_layers == "last_block" and layers.last_block is None:
        raise UserError("cannot tell which layer of this model is its last transformer block; "
                        "use --trainable_layers all or last_layer")
    model.requires_grad_(False)
    learning = {"last_block": [layers.last_block, *layers.between, layers.head], "last_layer": [layers.head]}
    for module in learning[trainable_layers]:
        module.requires_grad_(True)


def count_parameters(model):
    """(all, trainable) parameters, a shared one counted once."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


@torch.no_grad()
def find_output_layers(model, num_blocks, num_labels, **inputs):
    """Find an unknown model's OutputLayers by watching the order in which its layers run.

    `inputs` is any input the model accepts. The blocks are the list of `num_blocks` modules that
    runs last, what runs after its last member stands between, and the last linear layer with
    `num_labels` outputs is the head. Raises UserError if there is no such layer.
    """
    started = []
    with_parameters = [m for m in model.modules() if any(True for _ in m.parameters(recurse=False))]
    handles = [module.register_forward_pre_hook(lambda module, _: started.append(module)) for module in with_parameters]
    was_training = model.training
    try:
        model.eval()(**inputs)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()

    heads = [m for m in started if isinstance(m, nn.Linear) and m.out_features == num_labels]
    if not heads or heads[-1] is not started[-1]:
        raise UserError("cannot find this model's output layer; is it a sequence classifier?")
    last_run = {module: position for position, module in enumerate(started)}

    def end_of(block):
        return max(last_run.get(part, -1) for part in block.modules())
    last_blocks = [m[-1] for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == num_blocks]
    last_block = max(last_blocks, key=end_of, default=None)
    between = started[end_of(last_block) + 1:-1] if last_block else []
    return OutputLayers(started[-1], list(dict.fromkeys(between)), last_block)
