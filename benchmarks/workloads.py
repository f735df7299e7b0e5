"""The workloads whose speed is measured."""

from types import ModuleType
from typing import NamedTuple

import download_prepare_dataset
import train_bert_hf
import train_gpt
import train_sklearn_logreg


class Workload(NamedTuple):
    """A script and the flags that choose its model."""

    script: ModuleType
    flags: tuple[str, ...] = ()

    @property
    def is_neural(self) -> bool:
        """Whether the script trains a neural network."""
        return self.script in (train_gpt, train_bert_hf)


def gpt(*flags: str) -> Workload:
    """Return a workload with GPT-2, whose speed does not depend on its weights."""
    return Workload(train_gpt, ("--weights", "random", "--trainable_layers", *flags))


def encoder(name: str, trainable_layers: str) -> Workload:
    """Return a workload with one of train_bert_hf.MODELS."""
    return Workload(train_bert_hf, ("--model", name, "--trainable_layers", trainable_layers))


WORKLOADS = {
    "gpt2-all": gpt("all"),
    "gpt2-flexible": gpt("all", "--trainable_token_pos", "flexible"),
    "gpt2-last_block": gpt("last_block"),
    "gpt2-last_layer": gpt("last_layer"),
    **{f"{name}-all": encoder(name, "all") for name in train_bert_hf.MODELS},
    "roberta-last_block": encoder("roberta", "last_block"),
    "data": Workload(download_prepare_dataset),
    "logreg": Workload(train_sklearn_logreg),
}
