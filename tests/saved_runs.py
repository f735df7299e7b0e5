"""Small training runs with --save_model, one for each pooling and kind of model."""

import copy
from pathlib import Path

from tiny_models import TINY_CONFIGS, save_encoder

import train_bert_hf
import train_gpt
import train_sklearn_logreg

ENCODER = ["--context_length", "16", "--learning_rate", "1e-3", "--precision", "fp32"]
GPT = [*ENCODER, "--learning_rate", "1e-2", "--weights", "random"]
# Every pooling, with and without padding and mask, the head alone or more layers trained.
RUNS = {
    "last": (train_gpt, [*GPT, "--trainable_layers", "all"]),
    "first": (train_gpt, [*GPT, "--trainable_token_pos", "first"]),
    "flexible": (train_gpt, [*GPT, "--trainable_token_pos", "flexible"]),
    "average": (train_gpt, [*GPT, "--average_embeddings"]),
    "head of a GPT": (train_gpt, [*GPT, "--trainable_layers", "last_layer"]),
    "bf16": (train_gpt, [*GPT, "--precision", "bf16"]),
    "distilbert": (train_bert_hf, ENCODER),
    "roberta": (train_bert_hf, ENCODER),
    "head of modernbert-base": (train_bert_hf, [*ENCODER, "--trainable_layers", "last_layer"]),
    "bert": (train_bert_hf, [*ENCODER, "--use_attention_mask", "false"]),
    "counts": (train_sklearn_logreg, []),
    "nb-ngrams": (train_sklearn_logreg, ["--features", "nb-ngrams"]),
}


def train_and_save(name: str, gpt_size: str, folder: Path) -> Path:
    """Train one of RUNS on the CSV files in `folder`; return the folder of the run."""
    script, flags = RUNS[name]
    model = {train_gpt: ["--model_size", gpt_size], train_sklearn_logreg: []}.get(script)
    if model is None:
        config = copy.deepcopy(TINY_CONFIGS[name.split()[-1]])
        config.initializer_range = 0.5  # with the default range the predictions for all texts would be alike
        save_encoder(folder / "encoder", config)
        model = ["--model", str(folder / "encoder")]
    script.main([*model, *flags, "--data_dir", str(folder), "--output_dir", str(folder / "run"), "--save_model"])
    return folder / "run"
