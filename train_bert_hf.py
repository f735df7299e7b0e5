"""Fine-tune BERT or one of its successors on the movie reviews.

    python train_bert_hf.py --trainable_layers all --num_epochs 1 --model bert

gives the published BERT row: AdamW, learning rate 5e-6, 256 tokens, padding masked.

Experiment: Sebastian Raschka, "Build a Large Language Model (From Scratch)", bonus material to chapter 6,
https://github.com/rasbt/LLMs-from-scratch
"""

import sys
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import NamedTuple

import torch
import transformers
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from finetuning.batches import IMDbDataset, few_lengths
from finetuning.cli import (
    ArgumentParser,
    add_model_arguments,
    add_run_arguments,
    add_training_arguments,
    note,
    run,
    user_path,
)
from finetuning.errors import UserError
from finetuning.experiment import run_experiment
from finetuning.hub import (
    EXAMPLE,
    check_cached_weights,
    check_finite,
    check_model_folder,
    encoder_of,
    find_padding_side,
    fingerprint,
    refuse_adapter,
    set_padding,
    trial_of,
    trial_reviews,
)
from finetuning.layers import (
    OutputLayers,
    find_output_layer,
    find_output_layers,
    head_of,
    modules_in_order,
    set_trainable,
)
from finetuning.network import wrong_setting
from finetuning.reviews import LABELS
from finetuning.tokens import Tokenizer, flatten, load_tokens

NUM_CLASSES = len(LABELS)
# What the configuration of a checkpoint may ask for and a classifier of reviews does not have.
CONFIG = {"problem_type": "single_label_classification", "return_dict": True, "output_attentions": False,
          "output_hidden_states": False}
NO_LIMIT = 2**30  # tokens; what tokenizers write for "no limit", 1e30, is more than they accept themselves


class Encoder(NamedTuple):
    """A published model and the names of its last layers."""

    hub_id: str
    head: str  # the output layer
    between: tuple[str, ...]  # what stands between the last block and the output layer, or its classification head
    blocks: str  # the list of transformer blocks
    new_head: bool = True  # whether the published code replaces the library's output layer


MODELS = {
    "distilbert": Encoder("distilbert/distilbert-base-uncased",
                          "classifier", ("pre_classifier",), "distilbert.transformer.layer", new_head=False),
    "bert": Encoder("google-bert/bert-base-uncased",
                    "classifier", ("bert.pooler",), "bert.encoder.layer"),
    "roberta": Encoder("FacebookAI/roberta-large",
                       "classifier.out_proj", (), "roberta.encoder.layer"),
    "deberta-v3-base": Encoder("microsoft/deberta-v3-base",
                               "classifier", ("pooler",), "deberta.encoder.layer"),
    "modernbert-base": Encoder("answerdotai/ModernBERT-base",
                               "classifier", ("model.final_norm", "head"), "model.layers"),
    "modernbert-large": Encoder("answerdotai/ModernBERT-large",
                                "classifier", ("model.final_norm", "head"), "model.layers"),
    "minilm": Encoder("sentence-transformers/all-MiniLM-L6-v2",
                      "classifier", ("bert.pooler",), "bert.encoder.layer"),
}


def main(argv=None):
    args = parse_args(argv)
    run_experiment(args, run_name(args), build)


def build(args):
    """What `args` describe: (model, head, read_logits, save, training set, validation set, test set)."""
    model, tokenizer = load_model(args.model, args.seed)
    layers = output_layers(args.model, model, tokenizer)
    set_trainable(model, args.trainable_layers, layers)

    check_context_length(args.context_length, model, tokenizer)
    sets, length = load_tokens(args.data_dir, wrap(tokenizer), args.context_length, longest_input(model, tokenizer))
    settings = {"use_attention_mask": args.use_attention_mask == "true", "context_length": length,
                "padding_side": "right"}
    if args.model not in MODELS:
        trials = trial_reviews(tokenizer, length)
        settings["padding_side"] = find_padding_side(
            args.model, model, read_logits, lambda **padding: dataset(trials, tokenizer, **settings | padding),
            settings["use_attention_mask"])
    datasets = [dataset(tokens, tokenizer, **settings, few=args.compile) for tokens in sets]
    return model, layers.head, read_logits, partial(save, model, tokenizer, settings), *datasets


def dataset(tokens, tokenizer, use_attention_mask, context_length, padding_side="right", few=False):
    """Tokens as an IMDbDataset, padded as the model reads them, if possible to a `few` lengths only."""
    # Under a mask, padding to the batch's longest review is the same computation as padding to the full length.
    pad_to = context_length if not use_attention_mask else few_lengths(context_length) if few else None
    return IMDbDataset(tokens, tokenizer.pad_token_id, pad_to, use_attention_mask, padding_side)


def save(model, tokenizer, settings, folder):
    """Write the files of a trained model to a folder, as transformers reads them; returns what else they mean.

    The tokenizer's `model_max_length` becomes the number of tokens trained with, so that a
    `transformers.pipeline` cuts a review there if it is called with `truncation=True`.
    """
    transformers.logging.disable_progress_bar()  # of a file or two
    model.save_pretrained(folder)
    # What a pipeline needs to read texts as they were read here.
    habits = {"model_max_length": settings["context_length"], "padding_side": settings["padding_side"],
              "split_special_tokens": tokenizer.is_fast}
    tokenizer.init_kwargs |= habits
    for key, value in habits.items():
        setattr(tokenizer, key, value)
    tokenizer.save_pretrained(folder)
    return {"family": "encoder", "base_model": model.name_or_path, **settings}


def load_saved(folder, settings):
    """A model that `save` wrote: (model, read_logits, a function of a list of texts that returns their IMDbDataset)."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    encode, length = encoder_of(tokenizer), settings["context_length"]
    return model, read_logits, lambda texts: dataset(
        flatten(encode(texts, length), [0] * len(texts)), tokenizer, settings["use_attention_mask"], length,
        settings.get("padding_side", "right"))


def parse_args(argv=None):
    parser = ArgumentParser(description="Fine-tune a BERT-like encoder on the IMDb movie reviews.")
    model = add_model_arguments(parser, trainable_layers="all")
    model.add_argument("--model", type=user_path, default="distilbert",
                       help=f"{', '.join(MODELS)}, or any Hub id or folder of a model that can classify sequences")
    model.add_argument("--use_attention_mask", choices=["true", "false"], default="true",
                       help="false: attend to the padding, too")
    add_training_arguments(parser, learning_rate=5e-6)
    add_run_arguments(parser)
    return parser.parse_args(argv)


def run_name(args):
    """The run's name: model, layers, what differs from the defaults, seed."""
    model = Path(args.model).resolve().name if Path(args.model).is_dir() else args.model.replace("/", "-")
    return "-".join([model, args.trainable_layers, *args.variants, f"seed{args.seed}"])


def load_model(name, seed):
    """Load `(model, tokenizer)` by a name in MODELS, a Hub id or a folder, the model with a new output layer.

    Raises UserError if there is no such model, the Hub cannot be reached, files are damaged, or
    weights are missing that only pretraining can give.
    """
    source = MODELS[name].hub_id if name in MODELS else name
    transformers.logging.set_verbosity_error()  # what matters of its warnings, our own lines say
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    if name not in MODELS and Path(name).exists():
        check_model_folder(name)
    try:
        refuse_adapter(name, source)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        torch.manual_seed(seed)
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            source, **CONFIG, id2label=dict(enumerate(LABELS)),
            label2id={name: label for label, name in enumerate(LABELS)}, trust_remote_code=False,
            ignore_mismatched_sizes=True, output_loading_info=True,
            dtype=torch.float32)  # whatever precision the file is stored in
    except UnpicklingError as error:
        raise UserError(f"cannot load --model {name}: its weights are a pickle of more than tensors, which could run "
                        "code and is not loaded") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError, SafetensorError,
            HfHubHTTPError) as error:
        if not Path(source).is_dir() and (problem := wrong_setting(error, "hub")):
            raise UserError(f"cannot load --model {name}: {problem}") from error
        if "trust_remote_code" in str(error):
            raise UserError(f"cannot load --model {name}: it needs code of its own, which is never run here") from error
        known = "" if name in MODELS or Path(name).exists() else f"; it is none of {', '.join(MODELS)}"
        raise UserError(f"cannot load --model {name}{known}: {error}") from error
    if not Path(source).is_dir():
        check_cached_weights(source)
    check_tokenizer(name, tokenizer, getattr(model.config.get_text_config(), "vocab_size", None))
    set_padding(name, model, tokenizer)
    new = {*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])}
    check_new_layers(name, model, new)
    new |= replace_output_layer(name, model, tokenizer)
    check_finite(name, model)
    note(f"New layers: {', '.join(sorted({key.rpartition('.')[0] for key in new}))}")
    return model, tokenizer


def replace_output_layer(name, model, tokenizer):
    """Put a new output layer in place of the library's or the checkpoint's, where it is published so.

    From `torch.manual_seed` to this the random numbers drawn are those of the published code, so that the new layer is
    the published one. Returns the names of its parameters.
    """
    if name in MODELS and not MODELS[name].new_head:
        return set()
    if name in MODELS:
        path = MODELS[name].head
    else:
        with trial_of(name):
            path = find_output_layer(model, modules_in_order(model, **example(model, tokenizer)), NUM_CLASSES)
    old = model.get_submodule(path)
    model.set_submodule(path, nn.Linear(old.in_features, NUM_CLASSES, bias=old.bias is not None))
    return {f"{path}.weight"}


def example(model, tokenizer):
    """Return a review as the model reads it, with its mask."""
    ids = torch.tensor(encoder_of(tokenizer)([EXAMPLE], longest_input(model, tokenizer)))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def check_tokenizer(name, tokenizer, embeddings):
    """Refuse a tokenizer that knows no words, which is what some load as without their files, or of another model."""
    vocabulary = tokenizer.get_vocab()
    if len(vocabulary) <= len(tokenizer.all_special_ids):
        raise UserError(f"cannot load --model {name}: its tokenizer has no vocabulary; are its files missing?")
    if embeddings is not None and max(vocabulary.values()) >= embeddings:
        raise UserError(f"cannot load --model {name}: its tokenizer is of another model; it knows "
                        f"{max(vocabulary.values()) + 1:,} tokens, the model {embeddings:,}")


def check_new_layers(name, model, new):
    """Raise UserError if transformer blocks or embeddings are among the parameters that the checkpoint did not give."""
    pretrained = tuple(f"{path}." for path, module in model.named_modules()
                       if isinstance(module, (nn.ModuleList, nn.Embedding))
                       or type(module).__name__.endswith("Embedding"))  # I-BERT has its own
    lacking = sorted(key for key in new if key.startswith(pretrained))
    if lacking:
        raise UserError(f"the checkpoint of --model {name} is incomplete or does not fit its configuration: "
                        f"{len(lacking)} parameters, such as {lacking[0]}, are missing or of another shape")


def output_layers(name, model, tokenizer=None):
    """The model's OutputLayers: from MODELS, or found with the tokenizer's help where the model is not in it."""
    if name not in MODELS:
        blocks = getattr(model.config.get_text_config(), "num_hidden_layers", None)
        with trial_of(name):
            return find_output_layers(model, modules_in_order(model, **example(model, tokenizer)), blocks, NUM_CLASSES)
    encoder = MODELS[name]
    return OutputLayers(head_of(model, encoder.head), [model.get_submodule(path) for path in encoder.between],
                        model.get_submodule(encoder.blocks)[-1])


def check_context_length(context_length, model, tokenizer):
    """Raise UserError if more tokens are asked for than the tokenizer allows, although the model can read more."""
    allowed = tokenizer.model_max_length
    if allowed < longest_input(model) and isinstance(context_length, int) and context_length > allowed:
        raise UserError(f"--context_length {context_length} is more than the {allowed} tokens this model's tokenizer "
                        "allows (model_max_length in its tokenizer_config.json)")


def longest_input(model, tokenizer=None):
    """The most tokens the model can read, and the tokenizer allows if there is one."""
    limits = [0 if tokenizer is None else tokenizer.model_max_length,
              getattr(model.config, "max_position_embeddings", None) or 0]
    for path, module in model.named_modules():
        if path.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa counts positions from behind its padding index.
            limits.append(module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1))
    return min(limit for limit in [*limits, NO_LIMIT] if limit > 0)


def wrap(tokenizer):
    """A Hugging Face tokenizer as a Tokenizer; cutting a review keeps the special tokens at its ends."""
    return Tokenizer(encoder_of(tokenizer), fingerprint(tokenizer), tokenizer.pad_token_id)


def read_logits(model, batch):
    """The model's class logits: (batch, classes); raises UserError if the model does not compute in bf16."""
    try:
        return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    except (RuntimeError, TypeError) as error:
        if "BFloat16" not in str(error):
            raise
        raise UserError(f"this model does not compute in bf16 ({error}); use --precision fp32") from error


if __name__ == "__main__":
    run(main)
