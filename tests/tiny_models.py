"""Tiny encoders and GPT-2 models with random weights, and their training."""

import copy
import weakref

import numpy as np
import pandas as pd
import torch
import transformers
from helpers import WORDS
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ModernBertConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

import train_bert_hf
import train_gpt
from finetuning.data.batching import IMDbDataset
from finetuning.data.tokenization import concatenate
from finetuning.optimizers import build_optimizers
from finetuning.performance.gpt_classifier import GPTClassifier
from finetuning.performance.inference import Classifier
from finetuning.training import TrainConfig, TrainState, train_classifier
from previous_chapters import GPTModel

CPU = torch.device("cpu")

# Encoders

TINY_SIZES = {
    "vocab_size": 5 + len(WORDS),
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
}
# One for each architecture in train_bert_hf.MODELS, with the published dropout.
TINY_CONFIGS = {
    "distilbert": DistilBertConfig(
        vocab_size=TINY_SIZES["vocab_size"], dim=16, n_layers=2, n_heads=2, hidden_dim=32, max_position_embeddings=40
    ),
    "bert": BertConfig(**TINY_SIZES),
    "minilm": BertConfig(**TINY_SIZES),
    "roberta": RobertaConfig(**TINY_SIZES, pad_token_id=1, type_vocab_size=1),
    "deberta-v3-base": DebertaV2Config(
        **TINY_SIZES,
        type_vocab_size=0,
        relative_attention=True,
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
    ),
    **dict.fromkeys(
        ["modernbert-base", "modernbert-large"],
        ModernBertConfig(
            **TINY_SIZES,
            pad_token_id=0,
            cls_token_id=2,
            sep_token_id=3,
            bos_token_id=2,
            eos_token_id=3,
            local_attention=8,
        ),
    ),
}
MAX_LENGTH = 24


def tiny_tokenizer(pad_token_id: int = 0) -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer over WORDS with BERT's special tokens; the pad token has the id 0 or 1."""
    special = ["[PAD]", "[UNK]"] if pad_token_id == 0 else ["[UNK]", "[PAD]"]
    vocabulary = {token: i for i, token in enumerate([*special, "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def save_encoder(folder, config, dtype=torch.float32, kind=transformers.AutoModelForMaskedLM) -> None:
    """Save a tiny random model and its tokenizer in the layout of a Hub repository."""
    torch.manual_seed(0)
    kind.from_config(copy.deepcopy(config)).to(dtype).save_pretrained(folder)  # adds the dtype to the config
    tiny_tokenizer(config.pad_token_id).save_pretrained(folder)


def encode_words(texts: list[str], max_length: int):
    """Tokenize with the tiny tokenizer."""
    return train_bert_hf.make_tokenizer(tiny_tokenizer()).encode(texts, max_length)


def encoder_dataset(frame: pd.DataFrame) -> IMDbDataset:
    """Return a dataset for encoders: padded to each batch's longest review, with an attention mask."""
    tokens = concatenate(encode_words(frame["text"].tolist(), MAX_LENGTH), frame["label"])
    return IMDbDataset(tokens, pad_token_id=0, use_attention_mask=True)


# GPT-2

TINY_GPT2_CONFIG = {"vocab_size": 7, "n_positions": 5, "n_embd": 4, "n_head": 2, "n_layer": 2, "model_type": "gpt2"}


def tiny_gpt2_tensors() -> dict[str, np.ndarray]:
    """Return arrays with the names of a GPT-2 checkpoint, each filled with a different number."""
    shapes = {"wte.weight": (7, 4), "wpe.weight": (5, 4), "ln_f.weight": (4,), "ln_f.bias": (4,)}
    for i in range(2):
        shapes[f"h.{i}.attn.bias"] = (1, 1, 5, 5)
        for layer, (fan_in, fan_out) in {
            "attn.c_attn": (4, 12),
            "attn.c_proj": (4, 4),
            "mlp.c_fc": (4, 16),
            "mlp.c_proj": (16, 4),
        }.items():
            shapes |= {f"h.{i}.{layer}.weight": (fan_in, fan_out), f"h.{i}.{layer}.bias": (fan_out,)}
        for layer in ("ln_1", "ln_2"):
            shapes |= {f"h.{i}.{layer}.weight": (4,), f"h.{i}.{layer}.bias": (4,)}
    shapes["lm_head.weight"] = (7, 4)
    return {name: np.full(shape, number, dtype=np.float32) for number, (name, shape) in enumerate(shapes.items())}


def make_book_gpt():
    """Return a tiny GPTModel with a classification head, and its FinetuneLayers."""
    torch.manual_seed(123)
    sizes = {"vocab_size": 5 + len(WORDS), "context_length": MAX_LENGTH, "emb_dim": 16, "n_heads": 2, "n_layers": 2}
    model = GPTModel({**sizes, "drop_rate": 0.0, "qkv_bias": True})
    return model, train_gpt.replace_head(model, seed=123)


def make_gpt_classifier():
    """Return make_book_gpt's model as a GPTClassifier, and its FinetuneLayers."""
    model, layers = make_book_gpt()
    return GPTClassifier(model), layers


def gpt_dataset(frame: pd.DataFrame) -> IMDbDataset:
    """Return a dataset for GPT: padded to MAX_LENGTH, without an attention mask."""
    tokens = concatenate(encode_words(frame["text"].tolist(), MAX_LENGTH), frame["label"])
    return IMDbDataset(tokens, pad_token_id=0, pad_to=MAX_LENGTH)


# Training


def train_with_adamw(model, pooling, dataset, validation=None, seed=123, **settings) -> TrainState:
    """Train in float32, by default for two epochs of batches of 8."""
    classifier = Classifier(model, pooling, CPU)
    torch.manual_seed(seed)
    optimizers = build_optimizers("adamw", model, learning_rate=1e-3)
    config = TrainConfig(**{"num_epochs": 2, "batch_size": 8} | settings)
    return train_classifier(classifier, optimizers, dataset, validation or dataset, config)


class FirstTokenModel(nn.Module):
    """Model whose logits are 5 for "negative" and the review's first token for "positive"."""

    def forward(self, input_ids):
        first = input_ids[:, 0].float()
        return torch.stack([torch.full_like(first, 5.0), first], dim=1)


def first_token_classifier() -> Classifier:
    """Return a classifier around FirstTokenModel."""
    return Classifier(FirstTokenModel(), lambda model, batch: model(batch.input_ids), CPU)


class LimitedMemoryModel(nn.Module):
    """FirstTokenModel that runs out of memory beyond `capacity` tokens; asserts that a failed batch was freed."""

    def __init__(self, capacity: int, error: Exception | None = None):
        super().__init__()
        self.capacity, self.failed, self.batches = capacity, None, []
        self.error = error or torch.OutOfMemoryError("CUDA out of memory")

    def forward(self, input_ids):
        assert self.failed is None or self.failed() is None, "the failed batch is still in memory"
        activations = input_ids.float()
        self.batches.append((input_ids.numel(), input_ids[:, 0].tolist()))
        if input_ids.numel() > self.capacity:
            self.failed = weakref.ref(activations)
            raise self.error
        return FirstTokenModel()(input_ids)


def limited_memory_classifier(*arguments, device=CPU) -> Classifier:
    """Return a classifier around LimitedMemoryModel(*arguments)."""
    return Classifier(LimitedMemoryModel(*arguments), lambda model, batch: model(batch.input_ids), device)
