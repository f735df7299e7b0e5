import base64
import os

import pytest
import tiktoken

from finetuning.data.tiktoken_bpe import dump_tiktoken_bpe, load_tiktoken_bpe
from finetuning.system.errors import UserError

BYTES = [bytes([value]) for value in range(256)]


def write(path, tokens):
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)))
    return path


def test_loaded_encoding_uses_known_tokens_and_bytes_otherwise(tmp_path):
    encoding = load_tiktoken_bpe(write(tmp_path / "tokens", [*BYTES, b"good", b" film"]), 300)
    assert encoding.encode_ordinary("good film goodé") == [256, 257, *b" good\xc3\xa9"]
    assert (encoding.eot_token, encoding.n_vocab) == (299, 300)


def test_dump_and_load_round_trip(tmp_path):
    first = load_tiktoken_bpe(write(tmp_path / "tokens", [*BYTES, b"good", b" film"]), 259)
    dump_tiktoken_bpe(first, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "tokens").read_bytes()
    assert load_tiktoken_bpe(tmp_path / "again", 259).name == first.name
    # A file with other tokens is another tokenizer, even if it has as many of them.
    assert load_tiktoken_bpe(write(tmp_path / "tokens", [*BYTES, b"good", b" film!"]), 259).name != first.name


@pytest.mark.skipif("TIKTOKEN_CACHE_DIR" not in os.environ, reason="TIKTOKEN_CACHE_DIR names no cached tokenizer")
def test_dump_and_load_preserve_gpt2s_encoding(tmp_path):
    gpt2 = tiktoken.get_encoding("gpt2")
    dump_tiktoken_bpe(gpt2, tmp_path / "tokens")
    copy = load_tiktoken_bpe(tmp_path / "tokens", gpt2.n_vocab)
    texts = ["Hello, I'm here!  Don't\n\n wait ...\t", "naïve café 映画 🎬 x=1;  <br />1990s", "<|endoftext|> \r\n", ""]
    assert copy.encode_ordinary_batch(texts) == gpt2.encode_ordinary_batch(texts)
    assert copy.eot_token == gpt2.eot_token == 50256


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "some of the 256 bytes are missing"), ("not base64\n", "not a tokenizer"), ("YQ== 1 2\n", "not a tokenizer")],
)
def test_load_refuses_files_of_another_format(content, message, tmp_path):
    (tmp_path / "tokens").write_text(content)
    with pytest.raises(UserError, match=message):
        load_tiktoken_bpe(tmp_path / "tokens", 300)


@pytest.mark.parametrize("rank", [0, -1])
def test_load_refuses_repeated_or_negative_ranks(rank, tmp_path):
    path = write(tmp_path / "tokens", BYTES)
    path.write_text(path.read_text() + f"Z29vZA== {rank}\n")  # "good"
    with pytest.raises(UserError, match="ranks are repeated or negative"):
        load_tiktoken_bpe(path, 300)


def test_load_refuses_more_tokens_than_the_vocabulary(tmp_path):
    with pytest.raises(UserError, match="more tokens than the model's vocabulary of 257"):
        load_tiktoken_bpe(write(tmp_path / "tokens", [*BYTES, b"good"]), 257)
