"""Fine-tune GPT-2 on the movie reviews.

    python train_gpt.py --trainable_layers all --num_epochs 1

gives the published GPT-2 row: AdamW, learning rate 5e-5, 256 tokens, the class read at the last one.

Experiment: Sebastian Raschka, "Build a Large Language Model (From Scratch)", bonus material to chapter 6,
https://github.com/rasbt/LLMs-from-scratch
"""

import json
from argparse import ArgumentTypeError
from functools import partial
from pathlib import Path

import tiktoken
import torch
from requests import RequestException
from safetensors.torch import load_file, save_file
from torch import nn

from finetuning.batches import IMDbDataset, few_lengths
from finetuning.bpe import read_encoding, write_encoding
from finetuning.cli import (
    ArgumentParser,
    add_model_arguments,
    add_run_arguments,
    add_training_arguments,
    run,
    user_path,
)
from finetuning.errors import UserError
from finetuning.experiment import run_experiment
from finetuning.gpt_classifier import GPTClassifier
from finetuning.layers import OutputLayers, set_trainable
from finetuning.network import wrong_setting
from finetuning.reviews import LABELS
from finetuning.runtime import is_compiled
from finetuning.tokens import Tokenizer, flatten, load_tokens
from gpt_download import download_and_load_gpt2
from previous_chapters import GPTModel, load_weights_into_gpt

BASE_CONFIG = {"vocab_size": 50257, "context_length": 1024, "drop_rate": 0.0, "qkv_bias": True}
MODEL_CONFIGS = {
    "gpt2-small (124M)": {"emb_dim": 768, "n_layers": 12, "n_heads": 12},
    "gpt2-medium (355M)": {"emb_dim": 1024, "n_layers": 24, "n_heads": 16},
    "gpt2-large (774M)": {"emb_dim": 1280, "n_layers": 36, "n_heads": 20},
    "gpt2-xl (1558M)": {"emb_dim": 1600, "n_layers": 48, "n_heads": 25},
}
NUM_CLASSES = len(LABELS)
# What a model folder holds, one that --save_model leaves as well as one for --model_size.
CONFIG, TOKENIZER, WEIGHTS = "config.json", "tokenizer.tiktoken", "model.safetensors"


def main(argv=None):
    args = parse_args(argv)
    run_experiment(args, run_name(args), build)


def build(args):
    """What `args` describe: (model, head, read_logits, save, training set, validation set, test set)."""
    config, encoding = load_config(args.model_size), load_encoding(args.model_size)
    tokenizer = wrap(encoding)
    model = instantiate_model(args.model_size, args.weights, args.seed, args.models_dir)
    layers = replace_head(model, args.seed)
    set_trainable(model, args.trainable_layers, layers)

    sets, length = load_tokens(args.data_dir, tokenizer, args.context_length, limit=model.pos_emb.num_embeddings)
    settings = {"trainable_token_pos": args.trainable_token_pos, "average_embeddings": args.average_embeddings,
                "context_length": length}
    read_logits, pad_to = reading(**settings)
    if args.compile:
        pad_to = pad_to or few_lengths(length)
    datasets = [IMDbDataset(tokens, tokenizer.pad_token_id, pad_to) for tokens in sets]
    return GPTClassifier(model), layers.head, read_logits, partial(save, model, config, encoding, settings), *datasets


def reading(trainable_token_pos, average_embeddings, context_length):
    """How the class is read: (read_logits, how many tokens a review is padded to; None where that changes nothing)."""
    readers = AVERAGES if average_embeddings else TOKEN_POSITIONS
    # Causal attention never looks ahead, so padding only matters where the class is read from it.
    reads_padding = trainable_token_pos == "last" or (average_embeddings and trainable_token_pos != "flexible")
    return readers[trainable_token_pos], context_length if reads_padding else None


def save(model, config, encoding, settings, folder):
    """Write the files of a trained model to a folder; returns what else they mean."""
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_encoding(encoding, folder / TOKENIZER)
    save_file(model.state_dict(), folder / WEIGHTS)
    return {"family": "gpt", **settings}


def load_saved(folder, settings):
    """A model that `save` wrote: (model, read_logits, a function of a list of texts that returns their IMDbDataset)."""
    with torch.device("meta"):  # no random weights to be drawn and thrown away
        model = GPTModel(load_config(folder))
        replace_head(model, seed=0)
    model.load_state_dict(load_file(folder / WEIGHTS), assign=True)
    tokenizer, length = wrap(load_encoding(folder)), settings["context_length"]
    read_logits, pad_to = reading(settings["trainable_token_pos"], settings["average_embeddings"], length)
    return GPTClassifier(model), read_logits, lambda texts: IMDbDataset(
        flatten(tokenizer.encode(texts, length), [0] * len(texts)), tokenizer.pad_token_id, pad_to)


def parse_args(argv=None):
    parser = ArgumentParser(description="Fine-tune GPT-2 on the IMDb movie reviews.")
    model = add_model_arguments(parser, trainable_layers="last_block")
    model.add_argument("--model_size", type=model_size, default="gpt2-small (124M)", metavar="SIZE",
                       help=f"{', '.join(MODEL_CONFIGS)}, or, for random weights, a folder with {CONFIG} and "
                            f"{TOKENIZER}")
    model.add_argument("--weights", choices=["pretrained", "random"], default="pretrained", help="where to start from")
    model.add_argument("--models_dir", type=user_path,
                       help="folder for the downloaded weights (default: the Hugging Face cache)")
    model.add_argument("--trainable_token_pos", choices=list(TOKEN_POSITIONS), default="last",
                       help="token the class is read at; last: of the padded row, flexible: of the review itself")
    model.add_argument("--average_embeddings", action="store_true",
                       help="average over all tokens instead; with flexible, over those of the review itself")
    add_training_arguments(parser, learning_rate=5e-5)
    add_run_arguments(parser)
    return parser.parse_args(argv)


def model_size(text):
    """Parse a name in MODEL_CONFIGS or the path of a model folder."""
    text = user_path(text)
    if text not in MODEL_CONFIGS and not (Path(text) / CONFIG).is_file():
        raise ArgumentTypeError(f"invalid choice: {text!r}, which is none of {', '.join(MODEL_CONFIGS)}, nor a folder "
                                f"with {CONFIG} and {TOKENIZER}")
    return text


def run_name(args):
    """The run's name: model, layers, what differs from the defaults, seed."""
    model = (Path(args.model_size).resolve().name if Path(args.model_size).is_dir()
             else args.model_size.replace(" (", "-").rstrip(")"))
    return "-".join([model, args.trainable_layers, *args.variants, f"seed{args.seed}"])


def load_config(model_size):
    """The configuration of one of MODEL_CONFIGS, or of a model folder; raises UserError where that is damaged."""
    if model_size in MODEL_CONFIGS:
        return BASE_CONFIG | MODEL_CONFIGS[model_size]
    path = Path(model_size) / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        with torch.device("meta"):  # a trial that takes no memory
            GPTModel(config)
        return config
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise UserError(f"{path} is no GPT's configuration: {error!r}") from error


def load_encoding(model_size="gpt2-small (124M)"):
    """The tiktoken.Encoding of a model folder, else GPT-2's; raises UserError if that cannot be downloaded."""
    if model_size not in MODEL_CONFIGS:
        return read_encoding(Path(model_size) / TOKENIZER, load_config(model_size)["vocab_size"])
    try:
        return tiktoken.get_encoding("gpt2")
    except (RequestException, OSError, ValueError) as error:
        reason = wrong_setting(error, "requests") or type(error).__name__
        raise UserError(f"cannot get GPT-2's tokenizer ({reason}); it is downloaded once, "
                        "or found in the folder that TIKTOKEN_CACHE_DIR names") from error


def wrap(encoding):
    """A tiktoken.Encoding as a Tokenizer that pads with "<|endoftext|>"."""
    def encode(texts, max_length):
        # A review that spells out "<|endoftext|>" is text like any other.
        return [ids[:max_length] for ids in encoding.encode_ordinary_batch(texts)]
    fingerprint = f"tiktoken {tiktoken.__version__} {encoding.name} {encoding.n_vocab}"
    return Tokenizer(encode, fingerprint, encoding.eot_token)


def instantiate_model(model_size, weights="pretrained", seed=123, models_dir=None):
    """A GPTModel of one of MODEL_CONFIGS with published or random weights, or of a model folder with random ones."""
    config = load_config(model_size)
    if weights == "random":
        torch.manual_seed(seed)
        return GPTModel(config)
    if model_size not in MODEL_CONFIGS:
        raise UserError(f"there are no published weights for --model_size {model_size}; add --weights random")
    settings, params = download_and_load_gpt2(model_size.split("(")[1].rstrip(")"), models_dir)
    model = GPTModel(config)
    try:
        load_weights_into_gpt(model, params)
    except ValueError as error:
        raise UserError(f"the checkpoint does not fit {model_size}: {error}") from error
    return model


def replace_head(model, seed):
    """Give the model a new output layer, hidden size -> classes; return its OutputLayers."""
    torch.manual_seed(seed)
    model.out_head = nn.Linear(model.out_head.in_features, NUM_CLASSES)
    return OutputLayers(model.out_head, between=[model.final_norm], last_block=model.trf_blocks[-1])


def read_first(model, batch):
    """Logits at each review's first token, which sees no other: (batch, classes)."""
    return model(batch.input_ids, torch.zeros_like(batch.lengths[:, None]))[:, 0]


def read_last(model, batch):
    """Logits at the last token of each padded row, as published: (batch, classes)."""
    return model(batch.input_ids, torch.full_like(batch.lengths[:, None], batch.input_ids.shape[1] - 1))[:, 0]


def read_last_real(model, batch):
    """Logits at the last token of each review: (batch, classes)."""
    if batch.input_ids.device.type != "cpu" or is_compiled(model):
        return model(batch.input_ids, batch.lengths[:, None] - 1)[:, 0]
    # A CPU gains by leaving out the padding; a GPU would rather have few large operations, a compiled model few shapes.
    real = torch.arange(batch.input_ids.shape[1]) < batch.lengths[:, None]
    return model(batch.input_ids[real][None], batch.lengths.cumsum(0)[None] - 1, batch.lengths.tolist())[0]


def average_all(model, batch):
    """Logits averaged over each padded row, as published: (batch, classes)."""
    return model(batch.input_ids).mean(dim=1)


def average_real(model, batch):
    """Logits averaged over the tokens of each review: (batch, classes)."""
    logits = model(batch.input_ids)
    real = torch.arange(logits.shape[1], device=logits.device) < batch.lengths[:, None]
    return (logits * real[..., None]).sum(dim=1) / batch.lengths[:, None]


TOKEN_POSITIONS = {"last": read_last, "first": read_first, "flexible": read_last_real}
AVERAGES = {"last": average_all, "first": average_all, "flexible": average_real}


if __name__ == "__main__":
    run(main)
