"""Which layers learn: the output layer, the last transformer block, or everything."""

import copy
import random
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from finetuning.errors import UserError


class OutputLayers(NamedTuple):
    """The layers at a classifier's end, from last to first."""

    head: nn.Module  # the output layer, hidden size -> classes, with the classification head it may be a part of
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


@contextmanager
def trial_copy(model):
    """A copy of a model to try things with: it shares the parameters, and no gradients are computed.

    What a forward pass changes in a model's modules, in its configuration or in the random state
    of this process leaves no trace.
    """
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            yield copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def modules_in_order(model, **inputs):
    """Return the modules with parameters of their own in the order in which they compute for these inputs."""
    started = []
    with trial_copy(model) as trial:
        originals = dict(zip(trial.modules(), model.modules(), strict=True))
        for module in originals:
            if any(True for _ in module.parameters(recurse=False)):
                module.register_forward_pre_hook(lambda module, _: started.append(originals[module]))
        trial.eval()(**inputs)
    return started


def find_output_layer(model, order, num_labels):
    """Return the path of an unknown model's output layer: the last of `modules_in_order`, with `num_labels` outputs.

    Raises UserError if that is not a linear layer.
    """
    if not isinstance(order[-1], nn.Linear) or order[-1].out_features != num_labels:
        raise UserError("cannot find this model's output layer; is it a sequence classifier?")
    return next(path for path, module in model.named_modules() if module is order[-1])


def head_of(model, path):
    """Return the head: the output layer at `path`, or the classification head of the model that it is a part of."""
    part = model.get_submodule(path.partition(".")[0])
    return model.get_submodule(path) if part is getattr(model, "base_model", None) else part


def find_output_layers(model, order, num_blocks, num_labels):
    """Find an unknown model's OutputLayers by the order in which its modules compute.

    The blocks are the list of `num_blocks` modules that computes last; what computes between its
    last member and the head stands between them. Raises UserError if there is no output layer.
    """
    head = head_of(model, find_output_layer(model, order, num_labels))
    last_run = {module: position for position, module in enumerate(order)}

    def end_of(block):
        return max(last_run.get(part, -1) for part in block.modules())
    last_blocks = [m[-1] for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == num_blocks]
    last_block = max(last_blocks, key=end_of, default=None)
    if last_block and not any(last_block.children()):
        last_block = None  # XLM keeps the attentions, norms and so on of all blocks in a list each
    parts = set(head.modules())
    between = [m for m in order[end_of(last_block) + 1:] if m not in parts] if last_block else []
    return OutputLayers(head, list(dict.fromkeys(between)), last_block)
