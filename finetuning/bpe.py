"""GPT's byte-pair encoding as a file, in the format of tiktoken: a line for each token, base64 and rank."""

import base64
import hashlib
from pathlib import Path

import tiktoken

from finetuning.errors import UserError
from finetuning.filetypes import refuse_lfs_pointer

# How GPT-2 splits a text before it looks for tokens: contractions, words, numbers, other characters, white space.
PIECES = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
END_OF_TEXT = "<|endoftext|>"


def write_encoding(encoding, path):
    """Write the tokens of a tiktoken.Encoding to a file."""
    ranks = sorted((encoding.encode_single_token(token), token) for token in encoding.token_byte_values())
    Path(path).write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in ranks))


def read_encoding(path, size):
    """The tiktoken.Encoding of a file with `size` tokens, the last of them "<|endoftext|>", which the file leaves out.

    Raises UserError where it is no such file, or holds more tokens than that.
    """
    refuse_lfs_pointer(path)
    try:
        content = Path(path).read_bytes()
        lines = (line.split() for line in content.splitlines())
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no tokenizer in tiktoken's format: {error}") from error
    if not ranks.keys() >= {bytes([value]) for value in range(256)}:
        raise UserError(f"{path} is no tokenizer in tiktoken's format: it lacks some of the 256 bytes")
    if max(ranks.values()) >= size - 1:
        raise UserError(f"{path} holds more tokens than the model's vocabulary of {size}, {END_OF_TEXT} counted")
    name = hashlib.sha256(content + PIECES.encode()).hexdigest()
    return tiktoken.Encoding(name, pat_str=PIECES, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: size - 1})
