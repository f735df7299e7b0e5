"""GPT's byte-pair encoding in tiktoken's file format: a line per token, base64 and rank."""

import base64
import hashlib
from pathlib import Path

import tiktoken

from finetuning.system.errors import UserError
from finetuning.system.filetypes import refuse_lfs_pointer

# GPT-2's pre-tokenization: contractions, words, numbers, other characters, whitespace.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
END_OF_TEXT = "<|endoftext|>"


def dump_tiktoken_bpe(encoding: tiktoken.Encoding, path: str | Path) -> None:
    """Write the tokens of an encoding, without its special tokens, to a file."""
    ranks = sorted((encoding.encode_single_token(token), token) for token in encoding.token_byte_values())
    Path(path).write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in ranks))


def load_tiktoken_bpe(path: str | Path, vocab_size: int) -> tiktoken.Encoding:
    """Load an encoding from a file; the last id of the vocabulary becomes "<|endoftext|>".

    Raises UserError if the file has another format or more tokens than `vocab_size`.
    """
    refuse_lfs_pointer(path)
    try:
        content = Path(path).read_bytes()
        lines = (line.split() for line in content.splitlines())
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a tokenizer in tiktoken's format: {error}") from error
    if not ranks.keys() >= {bytes([value]) for value in range(256)}:
        raise UserError(f"{path} is not a tokenizer in tiktoken's format: some of the 256 bytes are missing")
    if len(set(ranks.values())) < len(ranks) or min(ranks.values()) < 0:
        raise UserError(f"{path} is not a tokenizer in tiktoken's format: ranks are repeated or negative")
    if max(ranks.values()) >= vocab_size - 1:
        raise UserError(f"{path} has more tokens than the model's vocabulary of {vocab_size}, including {END_OF_TEXT}")
    name = hashlib.sha256(content + GPT2_PATTERN.encode()).hexdigest()
    return tiktoken.Encoding(
        name, pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: vocab_size - 1}
    )
