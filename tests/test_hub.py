import importlib.metadata
import os
import sys

import pytest
from conftest import TINY_CONFIGS, WORDS, save_encoder, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AddedToken, CanineTokenizer, CTRLTokenizer, PreTrainedTokenizerFast

import train_bert_hf
from finetuning import hub
from finetuning.errors import UserError
from finetuning.files import sha256
from finetuning.hub import check_cached_weights, encoder_of, fingerprint


@pytest.mark.skipif(sys.platform == "win32", reason="links take rights on Windows")
def test_weights_that_a_disk_has_changed_are_noticed(hub_snapshot):
    """One bit, within a file that still is a whole one."""
    snapshot = hub_snapshot("someone/bert")
    save_encoder(snapshot, TINY_CONFIGS["bert"])
    weights = snapshot / "model.safetensors"
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir()
    stored = weights.rename(blobs / sha256(weights))
    weights.symlink_to(os.path.relpath(stored, snapshot))
    train_bert_hf.load_model("someone/bert", seed=1)
    content = stored.read_bytes()
    stored.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=f"model.safetensors of someone/bert .* is damaged .*; delete {stored}"):
        train_bert_hf.load_model("someone/bert", seed=1)


def test_without_a_cache_there_is_nothing_to_check(hub_snapshot):
    check_cached_weights("someone/absent")
    snapshot = hub_snapshot("someone/copied")
    (snapshot / "model.safetensors").write_bytes(b"a cache without links names no digest")
    check_cached_weights("someone/copied")


LETTERS = ["</", "s>", *"<>/[]abcdefghijklmnopqrstuvwxyzSEP"]


def tokenizer_of(kind, folder):
    """A tiny tokenizer of each kind that the models of the table have, and a slow one; "</s>" is a special token."""
    special = ["<pad>", "<unk>", "</s>"]
    vocabulary = {token: number for number, token in enumerate([*special, "\u2581", "\u0120", *LETTERS])}
    if kind == "slow":
        (folder / "vocab.json").write_text('{"<unk>": 0, "a</w>": 1, "</s></w>": 2, "<@@": 3, "/@@": 4, "s@@": 5}')
        (folder / "merges.txt").write_text("#version: 0.2\n")
        return CTRLTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), eos_token="</s>")
    backend = Tokenizer({
        "unigram": lambda: models.Unigram([(token, 0.0 if token in special else -5.0) for token in vocabulary], 1),
        "wordpiece": lambda: models.WordPiece(vocabulary | {f"##{token}": 50 + number for token, number in
                                                            vocabulary.items()}, unk_token="<unk>"),
        "bpe": lambda: models.BPE(vocabulary, [], unk_token="<unk>")}[kind]())
    backend.pre_tokenizer = {"unigram": pre_tokenizers.Metaspace, "wordpiece": pre_tokenizers.BertPreTokenizer,
                             "bpe": pre_tokenizers.ByteLevel}[kind]()
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", eos_token="</s>")


@pytest.mark.parametrize("kind", ["unigram", "wordpiece", "bpe", "slow"])
def test_a_special_token_in_a_review_is_text(kind, tmp_path):
    tokenizer = tokenizer_of(kind, tmp_path)
    special = tokenizer.eos_token_id
    assert special in tokenizer("a </s> b")["input_ids"]
    encode = encoder_of(tokenizer)
    for text in ("a </s> b", "a</s>b", "</s>", "</s></s>"):
        ids, = encode([text], 64)
        assert ids
        assert special not in ids
    plain = "a bad see / less < more"
    assert encode([plain], None) == [tokenizer(plain)["input_ids"]]


def test_added_tokens_that_are_not_special_stay_whole(tmp_path):
    for kind in ("bpe", "slow"):
        tokenizer = tokenizer_of(kind, tmp_path)
        tokenizer.add_tokens([AddedToken("abc", normalized=False)])
        assert tokenizer.convert_tokens_to_ids("abc") in encoder_of(tokenizer)(["a abc b"], None)[0]


def test_a_character_that_is_special_by_itself_is_left_alone():
    """CANINE's special tokens are characters that no text has."""
    assert encoder_of(CanineTokenizer())(["ab"], None) == [[0xE000, 97, 98, 0xE001]]


def test_the_fingerprint_covers_what_changes_the_ids(tmp_path, monkeypatch):
    def changed(change):
        tokenizer = tiny_tokenizer()
        change(tokenizer)
        return fingerprint(tokenizer)

    found = [fingerprint(tiny_tokenizer()), changed(lambda tokenizer: setattr(tokenizer, "truncation_side", "left")),
             changed(lambda tokenizer: setattr(tokenizer, "split_special_tokens", True)),
             changed(lambda tokenizer: tokenizer.add_tokens(["abc"])),
             changed(lambda tokenizer: tokenizer.add_special_tokens({"additional_special_tokens": ["film"]}))]
    for merges in ("a b\n", "b a\n"):  # of a slow tokenizer, which has its merges in a file
        (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}")
        (tmp_path / "vocab.json").write_text('{"<unk>": 0, "a</w>": 1}')
        found.append(fingerprint(CTRLTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))))
    version = importlib.metadata.version
    for changed_library in hub.TOKENIZER_LIBRARIES:
        monkeypatch.setattr(importlib.metadata, "version",
                            lambda library, other=changed_library: "99" if library == other else version(library))
        found.append(fingerprint(tiny_tokenizer()))
    assert len(set(found)) == len(found)


def test_the_fingerprint_does_not_depend_on_the_folder_or_the_last_call(tmp_path):
    found = set()
    for name in ("a", "b"):
        tiny_tokenizer().save_pretrained(tmp_path / name)
        tokenizer = train_bert_hf.AutoTokenizer.from_pretrained(tmp_path / name)
        found.add(fingerprint(tokenizer))
        encoder_of(tokenizer)([" ".join(WORDS)], 5)
        found.add(fingerprint(tokenizer))
    assert len(found) == 1
