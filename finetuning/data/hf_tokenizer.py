"""Hugging Face tokenizers: encode reviews as plain text, and fingerprint everything their token ids depend on."""

import contextlib
import hashlib
import importlib.metadata
import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from finetuning.data.tokenization import Tokenizer

LIBRARIES = ("transformers", "tokenizers", "sentencepiece")
# Entries of a tokenizer's files that depend on where it was loaded from or how it was last called.
VOLATILE_KEYS = {
    "tokenizer.json": {"truncation", "padding"},
    "tokenizer_config.json": {"is_local", "local_files_only", "name_or_path"},
}


def make_tokenizer(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """Return a Hugging Face tokenizer as a Tokenizer."""
    return Tokenizer(make_encode(tokenizer), fingerprint(tokenizer), tokenizer.pad_token_id)


def make_encode(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[str], int | None], list[list[int]]]:
    """Return a function (texts, max_length) -> token ids that encodes "[SEP]" in a review as ordinary text.

    Truncation keeps the special tokens that the tokenizer adds at both ends.
    """

    def tokenize(texts, **options):
        return tokenizer(
            texts,
            # In slow tokenizers this would also split added tokens that are not special.
            split_special_tokens=tokenizer.is_fast,
            return_attention_mask=False,
            return_token_type_ids=False,
            **options,
        )["input_ids"]

    special = {token.content: id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    # SentencePiece vocabularies also hold special tokens as ordinary pieces; a space after the first character
    # prevents the match.
    unsplit = [
        token for token, id_ in special.items() if len(token) > 1 and id_ in tokenize(token, add_special_tokens=False)
    ]
    pattern = re.compile("|".join(f"{re.escape(token[0])}(?={re.escape(token[1:])})" for token in unsplit))

    def encode(texts, max_length):
        if unsplit:
            texts = [pattern.sub(r"\g<0> ", text) for text in texts]
        return tokenize(texts, truncation=max_length is not None, max_length=max_length)

    return encode


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a SHA-256 of everything the token ids depend on: settings, files and library versions."""
    # Settings changed after loading are not in the files.
    digest = hashlib.sha256(f"{tokenizer.truncation_side} {tokenizer.split_special_tokens} ".encode())
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            content = path.read_bytes()
            if path.name in VOLATILE_KEYS:
                settings = json.loads(content)
                stable = {key: settings[key] for key in settings.keys() - VOLATILE_KEYS[path.name]}
                content = json.dumps(stable, sort_keys=True).encode()
            digest.update(path.name.encode() + content)
    for library in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            digest.update(f"{library} {importlib.metadata.version(library)}".encode())
    return digest.hexdigest()
