import pytest
from tiny_models import TINY_CONFIGS, save_encoder

import train_bert_hf
import train_gpt
from benchmarks.workloads import WORKLOADS, Workload


@pytest.fixture
def tiny_workloads(tmp_path, tiny_gpt, monkeypatch):
    """Replace the models of three workloads by tiny ones."""
    save_encoder(tmp_path / "model", TINY_CONFIGS["bert"])
    gpt = ("--model_size", tiny_gpt, "--weights", "random", "--trainable_layers")
    encoder = Workload(train_bert_hf, ("--model", str(tmp_path / "model"), "--trainable_layers", "all"))
    for name in ("gpt2-all", "gpt2-last_block", "gpt2-last_layer"):
        monkeypatch.setitem(WORKLOADS, name, Workload(train_gpt, (*gpt, name.partition("-")[2])))
    for name in ("bert-all", "modernbert-base-all"):
        monkeypatch.setitem(WORKLOADS, name, encoder)
