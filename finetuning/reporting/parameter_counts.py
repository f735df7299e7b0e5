"""Number of parameters of the published models, counted without downloading weights."""

from functools import cache
from typing import Any

# Values in the config.json of each Hub id that differ from the defaults of its configuration class.
CONFIGS: dict[str, dict[str, Any]] = {
    "openai-community/gpt2": {"model_type": "gpt2"},
    "google-bert/bert-base-uncased": {"model_type": "bert"},
    "distilbert/distilbert-base-uncased": {"model_type": "distilbert"},
    "FacebookAI/roberta-large": {
        "model_type": "roberta",
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
    },
    "microsoft/deberta-v3-base": {
        "model_type": "deberta-v2",
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "relative_attention": True,
        "position_buckets": 256,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
    },
    "answerdotai/ModernBERT-base": {"model_type": "modernbert"},
    "answerdotai/ModernBERT-large": {
        "model_type": "modernbert",
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "intermediate_size": 2624,
    },
    "sentence-transformers/all-MiniLM-L6-v2": {
        "model_type": "bert",
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "intermediate_size": 1536,
    },
}


@cache
def count_parameters(hub_id: str) -> int:
    """Return the number of parameters of a model in CONFIGS with a head for two classes."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    with torch.device("meta"):  # shapes only
        model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(**CONFIGS[hub_id], num_labels=2))
    return sum(parameter.numel() for parameter in model.parameters())
