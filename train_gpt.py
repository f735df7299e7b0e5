"""Fine-tune GPT-2 on the IMDb movie reviews.

    python train_gpt.py --trainable_layers all --num_epochs 1

runs experiment 1 of the README, "124M GPT-2 Baseline", published with 91.88% test accuracy: AdamW,
learning rate 5e-5, 256 tokens, logits of the last token.

Experiment: Sebastian Raschka, "Build a Large Language Model (From Scratch)", bonus material to chapter 6,
https://github.com/rasbt/LLMs-from-scratch
"""

import json
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import tiktoken
import torch
from requests import RequestException
from safetensors.torch import load_file, save_file
from torch import nn

from finetuning import cli
from finetuning.data.batching import IMDbDataset, length_buckets
from finetuning.data.reviews import NUM_CLASSES
from finetuning.data.tiktoken_bpe import dump_tiktoken_bpe, load_tiktoken_bpe
from finetuning.data.tokenization import Tokenizer, concatenate, load_encoded_splits
from finetuning.experiment import Task, finetune, start_run
from finetuning.performance.gpt_classifier import (
    GPTClassifier,
    first_token_logits,
    last_non_padding_logits,
    last_token_logits,
    masked_mean_logits,
    mean_logits,
)
from finetuning.system.errors import UserError
from finetuning.system.network import misconfigured_variable
from finetuning.trainable_layers import FinetuneLayers, set_trainable
from gpt_download import download_and_load_gpt2
from previous_chapters import GPTModel, load_weights_into_gpt

BASE_CONFIG = {"vocab_size": 50257, "context_length": 1024, "drop_rate": 0.0, "qkv_bias": True}
MODEL_CONFIGS = {
    "gpt2-small (124M)": {"emb_dim": 768, "n_layers": 12, "n_heads": 12},
    "gpt2-medium (355M)": {"emb_dim": 1024, "n_layers": 24, "n_heads": 16},
    "gpt2-large (774M)": {"emb_dim": 1280, "n_layers": 36, "n_heads": 20},
    "gpt2-xl (1558M)": {"emb_dim": 1600, "n_layers": 48, "n_heads": 25},
}
# Keys of a configuration that must be 1 or more.
SIZES = ("vocab_size", "context_length", "emb_dim", "n_heads", "n_layers")
# The files of a model folder; one given to --model_size needs no weights.
CONFIG, TOKENIZER, WEIGHTS = "config.json", "tokenizer.tiktoken", "model.safetensors"


def main(argv: Sequence[str] | None = None) -> None:
    """Fine-tune a GPT."""
    args = parse_args(argv)
    with start_run(args, run_name(args)) as run:
        config, encoding = load_config(args.model_size), load_encoding(args.model_size)
        model = instantiate_model(args.model_size, args.weights, args.seed, args.models_dir)
        layers = replace_head(model, args.seed)
        set_trainable(model, args.trainable_layers, layers)

        tokenizer = make_tokenizer(encoding)
        splits, context_length = load_encoded_splits(
            args.data_dir, tokenizer, args.context_length, config["context_length"]
        )
        settings = {
            "trainable_token_pos": args.trainable_token_pos,
            "average_embeddings": args.average_embeddings,
            "context_length": context_length,
        }
        pad_to = padded_length(**settings) or (length_buckets(context_length) if args.compile else None)
        datasets = [IMDbDataset(reviews, tokenizer.pad_token_id, pad_to) for reviews in splits]

        pooling = POOLING[args.trainable_token_pos, args.average_embeddings]
        task = Task(GPTClassifier(model), layers.head, pooling, save=partial(save, model, config, encoding, settings))
        finetune(run, task, *datasets)


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """Parse the command line."""
    parser = cli.ArgumentParser(description="Fine-tune GPT-2 on the IMDb movie reviews.")
    add = cli.add_model_arguments(parser, trainable_layers="last_block").add_argument
    sizes = f"{', '.join(MODEL_CONFIGS)}, or a folder with {CONFIG} and {TOKENIZER} (needs --weights random)"
    add("--model_size", type=model_size, default="gpt2-small (124M)", metavar="SIZE", help=sizes)
    add("--weights", choices=["pretrained", "random"], default="pretrained", help="initial weights")
    add("--models_dir", type=cli.user_path, help="folder for downloaded weights (default: the Hugging Face cache)")
    add(
        "--trainable_token_pos",
        choices=["last", "first", "flexible"],
        default="last",
        help="token whose logits classify the review; last: the last one, which may be padding; flexible: the last "
        "non-padding token",
    )
    average = "average the logits of all tokens instead; with flexible, of the non-padding tokens"
    add("--average_embeddings", action="store_true", help=average)
    cli.add_training_arguments(parser, learning_rate=5e-5)
    cli.add_run_arguments(parser)
    return parser.parse_args(argv)


def model_size(text: str) -> str:
    """Parse a name in MODEL_CONFIGS or the path of a model folder."""
    text = cli.user_path(text)
    if text not in MODEL_CONFIGS and not (Path(text) / CONFIG).is_file():
        names = ", ".join(MODEL_CONFIGS)
        raise ArgumentTypeError(f"invalid choice: {text!r} is neither {names} nor a folder with {CONFIG}")
    return text


def run_name(args: Namespace) -> str:
    """Return the run's name: model, trainable layers, arguments that differ from the defaults, seed."""
    folder = Path(args.model_size)
    model = folder.resolve().name if folder.is_dir() else args.model_size.replace(" (", "-").rstrip(")")
    return "-".join([model, args.trainable_layers, *args.overrides, f"seed{args.seed}"])


def load_config(model_size: str | Path) -> dict:
    """Return the configuration of a published size or of a model folder; raise UserError if it is invalid."""
    if str(model_size) in MODEL_CONFIGS:
        return BASE_CONFIG | MODEL_CONFIGS[str(model_size)]
    path = Path(model_size) / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if too_small := [key for key in SIZES if config[key] < 1]:
            raise ValueError(f"{', '.join(too_small)} must be 1 or more")
        with torch.device("meta"):  # checks the configuration without allocating memory
            GPTModel(config)(torch.zeros(1, 1, dtype=torch.long))
        return config
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise UserError(f"{path} is not a valid GPT configuration: {error!r}") from error


def load_encoding(model_size: str | Path = "gpt2-small (124M)") -> tiktoken.Encoding:
    """Return the tokenizer of a model folder, else GPT-2's; raise UserError if it cannot be downloaded."""
    if model_size not in MODEL_CONFIGS:
        return load_tiktoken_bpe(Path(model_size) / TOKENIZER, load_config(model_size)["vocab_size"])
    try:
        return tiktoken.get_encoding("gpt2")
    except (RequestException, OSError, ValueError) as error:
        reason = misconfigured_variable(error, "requests") or type(error).__name__
        raise UserError(
            f"cannot download GPT-2's tokenizer ({reason}); connect once, or set TIKTOKEN_CACHE_DIR to a folder "
            "that holds it"
        ) from error


def instantiate_model(model_size, weights="pretrained", seed=123, models_dir=None):
    """Return a GPTModel with published weights, or with random ones drawn from the seed."""
    config = load_config(model_size)
    if weights == "random":
        torch.manual_seed(seed)
        return GPTModel(config)
    if model_size not in MODEL_CONFIGS:
        raise UserError(f"there are no published weights for --model_size {model_size}; add --weights random")
    _, params = download_and_load_gpt2(model_size.split("(")[1].rstrip(")"), models_dir)
    model = GPTModel(config)
    try:
        load_weights_into_gpt(model, params)
    except ValueError as error:
        raise UserError(f"the checkpoint does not fit {model_size}: {error}") from error
    return model


def replace_head(model: GPTModel, seed: int) -> FinetuneLayers:
    """Replace the output layer by a new one, hidden size -> classes; return the model's last layers."""
    torch.manual_seed(seed)
    model.out_head = nn.Linear(model.out_head.in_features, NUM_CLASSES)
    return FinetuneLayers(model.out_head, pooler_and_norm=[model.final_norm], last_block=model.trf_blocks[-1])


def make_tokenizer(encoding: tiktoken.Encoding) -> Tokenizer:
    """Return a tiktoken encoding as a Tokenizer that pads with "<|endoftext|>"."""

    def encode(texts, max_length):
        # "<|endoftext|>" in a review is ordinary text.
        return [ids[:max_length] for ids in encoding.encode_ordinary_batch(texts)]

    fingerprint = f"tiktoken {tiktoken.__version__} {encoding.name} {encoding.n_vocab}"
    return Tokenizer(encode, fingerprint, encoding.eot_token)


def padded_length(trainable_token_pos: str, average_embeddings: bool, context_length: int) -> int | None:
    """Return the length to pad reviews to, or None if the logits do not depend on the padding."""
    # Causal attention: the logits of a token do not depend on padding after it.
    reads_padding = trainable_token_pos == "last" or (average_embeddings and trainable_token_pos == "first")
    return context_length if reads_padding else None


# (--trainable_token_pos, --average_embeddings) -> how the model's outputs are pooled to class logits
POOLING = {
    ("last", False): last_token_logits,
    ("first", False): first_token_logits,
    ("flexible", False): last_non_padding_logits,
    ("last", True): mean_logits,
    ("first", True): mean_logits,
    ("flexible", True): masked_mean_logits,
}


def save(model: GPTModel, config: dict, encoding: tiktoken.Encoding, settings: dict, folder: Path) -> dict:
    """Save weights, configuration and tokenizer; return the settings that `load_finetuned` needs."""
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    dump_tiktoken_bpe(encoding, folder / TOKENIZER)
    save_file(model.state_dict(), folder / WEIGHTS)
    return {"model_type": "gpt", **settings}


def load_finetuned(folder: Path, settings: dict) -> tuple[nn.Module, Callable, Callable[[list[str]], IMDbDataset]]:
    """Load a saved model; return (model, pooling, function that turns a list of texts into an IMDbDataset)."""
    with torch.device("meta"):  # skips the initialization of weights that are loaded next
        model = GPTModel(load_config(folder))
        replace_head(model, seed=0)
    model.load_state_dict(load_file(folder / WEIGHTS), assign=True)
    tokenizer, context_length = make_tokenizer(load_encoding(folder)), settings["context_length"]
    token_pos, average = settings["trainable_token_pos"], settings["average_embeddings"]

    def to_dataset(texts):
        reviews = concatenate(tokenizer.encode(texts, context_length), [0] * len(texts))
        return IMDbDataset(reviews, tokenizer.pad_token_id, padded_length(token_pos, average, context_length))

    return GPTClassifier(model), POOLING[token_pos, average], to_dataset


if __name__ == "__main__":
    cli.run_main(main)
