"""Trainable layers: the output layer, the last transformer block, or the whole model."""

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from finetuning.system.errors import UserError


class FinetuneLayers(NamedTuple):
    """The last layers of a classifier, from last to first."""

    head: nn.Module  # the output layer, hidden size -> classes, with the classification head it may be a part of
    pooler_and_norm: list[nn.Module]  # the layers between the last block and the head
    last_block: nn.Module | None  # the last transformer block; None if it is unknown


def set_trainable(model: nn.Module, trainable_layers: str, layers: FinetuneLayers) -> None:
    """Make "all" layers trainable, or the "last_block" and what follows it, or only the "last_layer".

    Raises UserError for "last_block" if the model's last block is unknown.
    """
    if trainable_layers == "all":
        model.requires_grad_(True)
        return
    trainable = [layers.head]
    if trainable_layers == "last_block":
        if layers.last_block is None:
            raise UserError(
                "cannot tell which layer of this model is its last transformer block; "
                "use --trainable_layers all or last_layer"
            )
        trainable += [layers.last_block, *layers.pooler_and_norm]
    model.requires_grad_(False)
    for module in trainable:
        module.requires_grad_(True)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return (total, trainable) numbers of parameters; shared parameters count once."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


@contextmanager
def isolated_copy(model: nn.Module) -> Iterator[nn.Module]:
    """Yield a copy of a model that shares its parameters, with gradients disabled.

    Forward passes of the copy change neither the model's modules and configuration nor the random
    state of this process.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            yield copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def modules_in_order(model: nn.Module, **inputs: Any) -> list[nn.Module]:
    """Return the modules with parameters of their own in the order in which they run for these inputs."""
    order = []
    with isolated_copy(model) as copied:
        originals = dict(zip(copied.modules(), model.modules(), strict=True))
        for module in originals:
            if any(True for _ in module.parameters(recurse=False)):
                module.register_forward_pre_hook(lambda module, _: order.append(originals[module]))
        copied.eval()(**inputs)
    return order


def find_output_layer(model: nn.Module, order: list[nn.Module], num_classes: int) -> str:
    """Return the path of a model's output layer: the last of `modules_in_order`, with `num_classes` outputs.

    Raises UserError if that is not a linear layer with `num_classes` outputs.
    """
    if not isinstance(order[-1], nn.Linear) or order[-1].out_features != num_classes:
        raise UserError("cannot find this model's output layer; is it a sequence classifier?")
    return next(path for path, module in model.named_modules() if module is order[-1])


def classification_head(model: nn.Module, path: str) -> nn.Module:
    """Return the classification head that holds the output layer at `path`, or else the output layer."""
    part = model.get_submodule(path.partition(".")[0])
    return model.get_submodule(path) if part is getattr(model, "base_model", None) else part


def find_finetune_layers(
    model: nn.Module, order: list[nn.Module], num_blocks: int | None, num_classes: int
) -> FinetuneLayers:
    """Find a model's last layers from `modules_in_order`.

    The blocks are the list of `num_blocks` modules that runs last; `pooler_and_norm` are the modules
    that run between its last member and the head. Raises UserError if there is no output layer.
    """
    head = classification_head(model, find_output_layer(model, order, num_classes))
    last_run = {module: position for position, module in enumerate(order)}

    def end_of(block):
        return max(last_run.get(part, -1) for part in block.modules())

    candidates = [m[-1] for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == num_blocks]
    last_block = max(candidates, key=end_of, default=None)
    if last_block and not any(last_block.children()):
        last_block = None  # XLM has no blocks: one list holds all attentions, another all norms
    parts = set(head.modules())
    between = [m for m in order[end_of(last_block) + 1 :] if m not in parts] if last_block else []
    return FinetuneLayers(head, list(dict.fromkeys(between)), last_block)
