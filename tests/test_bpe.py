import base64
import os

import pytest
import tiktoken

from finetuning.bpe import read_encoding, write_encoding
from finetuning.errors import UserError

BYTES = [bytes([value]) for value in range(256)]


def write(path, tokens):
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)))
    return path


def test_pieces_are_found_and_all_else_is_bytes(tmp_path):
    encoding = read_encoding(write(tmp_path / "tokens", [*BYTES, b"good", b" film"]), 300)
    assert encoding.encode_ordinary("good film goodé") == [256, 257, *b" good\xc3\xa9"]
    assert (encoding.eot_token, encoding.n_vocab) == (299, 300)


def test_what_is_written_is_read(tmp_path):
    first = read_encoding(write(tmp_path / "tokens", [*BYTES, b"good", b" film"]), 259)
    write_encoding(first, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "tokens").read_bytes()
    assert read_encoding(tmp_path / "again", 259).name == first.name
    # Another file is another tokenizer, also where it has as many tokens.
    assert read_encoding(write(tmp_path / "tokens", [*BYTES, b"good", b" film!"]), 259).name != first.name


@pytest.mark.skipif("TIKTOKEN_CACHE_DIR" not in os.environ, reason="TIKTOKEN_CACHE_DIR names no cached tokenizer")
def test_gpt2s_own_encoding_survives(tmp_path):
    gpt2 = tiktoken.get_encoding("gpt2")
    write_encoding(gpt2, tmp_path / "tokens")
    copy = read_encoding(tmp_path / "tokens", gpt2.n_vocab)
    texts = ["Hello, I'm here!  Don't\n\n wait ...\t", "naïve café 映画 🎬 x=1;  <br />1990s", "<|endoftext|> \r\n", ""]
    assert copy.encode_ordinary_batch(texts) == gpt2.encode_ordinary_batch(texts)
    assert copy.eot_token == gpt2.eot_token == 50256


@pytest.mark.parametrize(("content", "message"), [
    ("", "lacks some of the 256 bytes"), ("not base64\n", "no tokenizer"), ("YQ== 1 2\n", "no tokenizer")])
def test_another_file_is_refused(content, message, tmp_path):
    (tmp_path / "tokens").write_text(content)
    with pytest.raises(UserError, match=message):
        read_encoding(tmp_path / "tokens", 300)


def test_a_tokenizer_for_a_larger_vocabulary_is_refused(tmp_path):
    with pytest.raises(UserError, match="more tokens than the model's vocabulary of 257"):
        read_encoding(write(tmp_path / "tokens", [*BYTES, b"good"]), 257)
