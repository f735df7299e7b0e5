"""What comes from the Hugging Face Hub, checked before anything is trained: weights, adapters, tokenizers."""

import contextlib
import hashlib
import importlib.metadata
import json
import re
import tempfile
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import try_to_load_from_cache
from transformers.utils.peft_utils import find_adapter_config_file

from finetuning.errors import UserError
from finetuning.files import sha256
from finetuning.filetypes import EMPTY, LFS_POINTER, SIGNATURES, ZEROS, file_kind, folder_kind
from finetuning.layers import trial_copy
from finetuning.tokens import flatten

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
OTHER_WEIGHTS = ("*.h5", "*.msgpack", "*.ckpt*", "*.onnx", "*.gguf", "*.pt", "*.pth")
VOCABULARIES = ("vocab.txt", "vocab.json", "merges.txt", "*.model")  # of tokenizers without tokenizer.json
NOT_A_MODELS = {EMPTY, ZEROS, *(SIGNATURES[magic] for magic in (LFS_POINTER, b"<html", b"<?xml"))}
DIGEST = re.compile("[0-9a-f]{64}")
TOKENIZER_LIBRARIES = ("transformers", "tokenizers", "sentencepiece")
# What a tokenizer's files hold of where it was loaded from and how it was called last.
PASSING = {"tokenizer.json": {"truncation", "padding"},
           "tokenizer_config.json": {"is_local", "local_files_only", "name_or_path"}}
EXAMPLE = "A film to remember, with a plot that holds and a cast that is a joy to watch."
TRIALS = 5  # reviews to try a model with
TOLERANCE = 1e-4  # of logits, between a review alone and in a padded batch


def check_cached_weights(repository):
    """Raise UserError if a repository's cached weights are damaged; where none are cached there is nothing to check.

    The cache stores a large file under the SHA-256 that the Hub tells of it. A download is compared
    with its size only, and a disk may lose bits later.
    """
    for filename in WEIGHTS:
        cached = try_to_load_from_cache(repository, filename)
        if not isinstance(cached, str):
            continue
        stored = Path(cached).resolve()
        if DIGEST.fullmatch(stored.name) and sha256(stored) != stored.name:
            raise UserError(f"{filename} of {repository} in the Hugging Face cache is damaged (its SHA-256 differs); "
                            f"delete {stored} and run again")


def check_model_folder(folder):
    """Raise UserError if a folder lacks a model's files, or if one of those that would be read is something else."""
    path, refusal = Path(folder), f"cannot load --model {folder}: "
    if path.is_file():
        raise UserError(f"{refusal}it is a file; name the folder that it is in")
    if (path / "adapter_config.json").is_file():  # `refuse_adapter` says more
        return
    if not (path / "config.json").is_file():
        inside = [f"; did you mean {config.parent}?" for config in sorted(path.glob("*/config.json"))[:1]]
        raise UserError(f"{refusal}it has no config.json; it is {folder_kind(path)}{''.join(inside)}")
    weights = weight_files(path)
    if not weights:
        others = sorted(file.name for pattern in OTHER_WEIGHTS for file in path.glob(pattern))
        raise UserError(f"{refusal}it has no {' or '.join(WEIGHTS)}{', only ' * bool(others)}{', '.join(others)}")
    whole = path / "tokenizer.json"
    tokenizer = [whole] if whole.is_file() else [file for pattern in VOCABULARIES for file in path.glob(pattern)]
    for file in (path / "config.json", *weights, *tokenizer):
        kind = file_kind(file)
        if kind in NOT_A_MODELS or (file.suffix == ".bin" and kind not in ("a zip file", "a pickle")):
            raise UserError(f"{refusal}{file.name} is {kind or 'no PyTorch file'}")


def weight_files(folder):
    """Return the file of weights in a folder that Transformers prefers, or its shards."""
    for name in WEIGHTS:
        stem, suffix = name.split(".")
        if (folder / name).is_file():
            return [folder / name]
        if shards := sorted(folder.glob(f"{stem}-*-of-*.{suffix}")):
            return shards
    return []


def refuse_adapter(name, source):
    """Raise UserError if a repository or folder holds an adapter, which changes what the weights compute."""
    if find_adapter_config_file(source):
        raise UserError(f"cannot load --model {name}: it holds an adapter (adapter_config.json); merge it into its "
                        "base model (merge_and_unload of peft), or name the base model instead")


def check_finite(name, model):
    """Raise UserError if weights of the checkpoint are not finite numbers."""
    for path, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise UserError(f"the checkpoint of --model {name} is damaged: {path} holds NaN or infinite numbers")


def set_padding(name, model, tokenizer):
    """Let model and tokenizer agree on the token to pad with; raises UserError if there is none."""
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise UserError(f"cannot load --model {name}: its tokenizer has neither a pad nor an eos token to fill up "
                        "batches with")
    for config in {id(config): config for config in (model.config, model.config.get_text_config())}.values():
        config.pad_token_id = tokenizer.pad_token_id


def encoder_of(tokenizer):
    """Return the tokenizer's `encode` of a Tokenizer, for which "[SEP]" in a review is text like any other."""
    def tokenize(texts, **settings):
        # In slow tokenizers this would also take apart added tokens that are not special.
        return tokenizer(texts, split_special_tokens=tokenizer.is_fast, return_attention_mask=False,
                         return_token_type_ids=False, **settings)["input_ids"]
    special = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    # A vocabulary made by SentencePiece holds them as pieces of text, too: a space breaks them up.
    whole = [token for token, number in special.items()
             if len(token) > 1 and number in tokenize(token, add_special_tokens=False)]
    pattern = re.compile("|".join(f"{re.escape(token[0])}(?={re.escape(token[1:])})" for token in whole))

    def encode(texts, max_length):
        if whole:
            texts = [pattern.sub(r"\g<0> ", text) for text in texts]
        return tokenize(texts, truncation=max_length is not None, max_length=max_length)
    return encode


def fingerprint(tokenizer):
    """Return a SHA-256 of all that a Hugging Face tokenizer's results depend on: its files and the libraries."""
    # What was set after loading is not in the files.
    digest = hashlib.sha256(f"{tokenizer.truncation_side} {tokenizer.split_special_tokens} ".encode())
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            content = path.read_bytes()
            if path.name in PASSING:
                settings = json.loads(content)
                content = json.dumps({key: settings[key] for key in settings.keys() - PASSING[path.name]},
                                     sort_keys=True).encode()
            digest.update(path.name.encode() + content)
    for library in TOKENIZER_LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            digest.update(f"{library} {importlib.metadata.version(library)}".encode())
    return digest.hexdigest()


def trial_reviews(tokenizer, context_length):
    """Return the Tokens of a few reviews to try a model with, from a few words to `context_length` tokens."""
    words = EXAMPLE.split() * context_length
    counts = np.geomspace(4, max(4, context_length), TRIALS).astype(int)
    texts = [" ".join(words[:count]) for count in counts]
    return flatten(encoder_of(tokenizer)(texts, context_length), [0] * len(texts))


@contextlib.contextmanager
def trial_of(name):
    """Turn whatever another architecture raises when it is tried into one line."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        if "memory" in str(error) or "could not create a primitive" in str(error):
            raise  # out of memory on a CPU, about which more can be said
        raise UserError(f"--model {name} cannot classify reviews: {type(error).__name__}: {error}") from error


def find_padding_side(name, model, read_logits, dataset, use_attention_mask):
    """Return the side on which padding leaves a model's predictions as they are: "right" where it can be.

    `dataset(use_attention_mask=..., padding_side=...)` returns a few reviews of different lengths.
    Raises UserError if they cannot be classified, or if neither side will do while the batches are
    padded to different lengths.
    """
    with trial_of(name):
        with trial_copy(model) as trial:
            read_logits(trial.train(), dataset().batch(range(TRIALS)))
        for side in ("right", "left"):
            if ignores_padding(model, read_logits, dataset(use_attention_mask=True, padding_side=side)):
                return side
        if not ignores_padding(model, read_logits, dataset(use_attention_mask=False)):
            raise UserError(f"--model {name} cannot be used: its prediction for a review changes from one time to the "
                            "next, or with the other reviews of the batch")
    if use_attention_mask:
        raise UserError(f"the predictions of --model {name} depend on how much padding a batch has; with "
                        "--use_attention_mask false all batches have the same length")
    return "right"


def ignores_padding(model, read_logits, reviews):
    """Whether a model's logits are the same for each review alone and for all in one batch."""
    indices = range(len(reviews))
    with trial_copy(model) as trial:
        together = read_logits(trial.eval(), reviews.batch(indices))
    with trial_copy(model) as trial:
        alone = torch.cat([read_logits(trial.eval(), reviews.batch([index])) for index in indices])
    return torch.allclose(alone, together, rtol=TOLERANCE, atol=TOLERANCE)
