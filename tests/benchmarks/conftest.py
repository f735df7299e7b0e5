import pytest
from tiny_models import TINY_CONFIGS, save_encoder

import train_bert_hf
import train_gpt
from benchmarks.experiments import EXPERIMENTS, Experiment


@pytest.fixture
def tiny_experiments(tmp_path, tiny_gpt, monkeypatch):
    """Replace the models of three experiments by tiny ones."""
    save_encoder(tmp_path / "model", TINY_CONFIGS["bert"])
    gpt = ("--model_size", tiny_gpt, "--weights", "random", "--trainable_layers")
    encoder = Experiment(train_bert_hf, ("--model", str(tmp_path / "model"), "--trainable_layers", "all"))
    for name in ("gpt2-all", "gpt2-last_block", "gpt2-last_layer"):
        monkeypatch.setitem(EXPERIMENTS, name, Experiment(train_gpt, (*gpt, name.partition("-")[2])))
    for name in ("bert-all", "modernbert-base-all"):
        monkeypatch.setitem(EXPERIMENTS, name, encoder)
