import importlib.metadata

import pytest
from helpers import WORDS
from tiny_models import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AddedToken, AutoTokenizer, CanineTokenizer, CTRLTokenizer, PreTrainedTokenizerFast

from finetuning.data import hf_tokenizer
from finetuning.data.hf_tokenizer import fingerprint, make_encode

LETTERS = ["</", "s>", *"<>/[]abcdefghijklmnopqrstuvwxyzSEP"]


def build_tokenizer(kind, folder):
    """Return a tiny tokenizer with the special token "</s>": one of the three kinds in MODELS, or a slow one."""
    special = ["<pad>", "<unk>", "</s>"]
    vocabulary = {token: id_ for id_, token in enumerate([*special, "\u2581", "\u0120", *LETTERS])}
    if kind == "slow":
        (folder / "vocab.json").write_text('{"<unk>": 0, "a</w>": 1, "</s></w>": 2, "<@@": 3, "/@@": 4, "s@@": 5}')
        (folder / "merges.txt").write_text("#version: 0.2\n")
        return CTRLTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), eos_token="</s>")
    if kind == "unigram":
        model = models.Unigram([(token, 0.0 if token in special else -5.0) for token in vocabulary], 1)
        pre_tokenizer = pre_tokenizers.Metaspace()
    elif kind == "wordpiece":
        continued = {f"##{token}": 50 + id_ for token, id_ in vocabulary.items()}
        model = models.WordPiece(vocabulary | continued, unk_token="<unk>")
        pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    else:
        model, pre_tokenizer = models.BPE(vocabulary, [], unk_token="<unk>"), pre_tokenizers.ByteLevel()
    backend = Tokenizer(model)
    backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", eos_token="</s>")


@pytest.mark.parametrize("kind", ["unigram", "wordpiece", "bpe", "slow"])
def test_encode_reads_special_tokens_in_a_review_as_text(kind, tmp_path):
    tokenizer = build_tokenizer(kind, tmp_path)
    special = tokenizer.eos_token_id
    assert special in tokenizer("a </s> b")["input_ids"]
    encode = make_encode(tokenizer)
    for text in ("a </s> b", "a</s>b", "</s>", "</s></s>"):
        (ids,) = encode([text], 64)
        assert ids
        assert special not in ids
    plain = "a bad see / less < more"
    assert encode([plain], None) == [tokenizer(plain)["input_ids"]]


@pytest.mark.parametrize("kind", ["bpe", "slow"])
def test_encode_does_not_split_added_tokens_that_are_not_special(kind, tmp_path):
    tokenizer = build_tokenizer(kind, tmp_path)
    tokenizer.add_tokens([AddedToken("abc", normalized=False)])
    assert tokenizer.convert_tokens_to_ids("abc") in make_encode(tokenizer)(["a abc b"], None)[0]


def test_encode_ignores_special_tokens_of_a_single_character():
    """CANINE's special tokens are private-use characters, which no text contains."""
    assert make_encode(CanineTokenizer())(["ab"], None) == [[0xE000, 97, 98, 0xE001]]


def test_encode_keeps_the_special_tokens_when_it_truncates():
    encode = make_encode(tiny_tokenizer())
    assert encode(["the a film plot"], None) == [[2, 5, 6, 7, 8, 3]]
    assert encode(["the a film plot"], 4) == [[2, 5, 6, 3]]


def test_fingerprint_changes_with_settings_files_and_libraries(tmp_path, monkeypatch):
    def changed(change):
        tokenizer = tiny_tokenizer()
        change(tokenizer)
        return fingerprint(tokenizer)

    fingerprints = [
        fingerprint(tiny_tokenizer()),
        changed(lambda tokenizer: setattr(tokenizer, "truncation_side", "left")),
        changed(lambda tokenizer: setattr(tokenizer, "split_special_tokens", True)),
        changed(lambda tokenizer: tokenizer.add_tokens(["abc"])),
        changed(lambda tokenizer: tokenizer.add_special_tokens({"additional_special_tokens": ["film"]})),
    ]
    for merges in ("a b\n", "b a\n"):  # a slow tokenizer stores its merges in a file
        (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}")
        (tmp_path / "vocab.json").write_text('{"<unk>": 0, "a</w>": 1}')
        fingerprints.append(fingerprint(CTRLTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))))
    version = importlib.metadata.version
    for changed_library in hf_tokenizer.LIBRARIES:

        def patched_version(library, changed_library=changed_library):
            return "99" if library == changed_library else version(library)

        monkeypatch.setattr(importlib.metadata, "version", patched_version)
        fingerprints.append(fingerprint(tiny_tokenizer()))
    assert len(set(fingerprints)) == len(fingerprints)


def test_fingerprint_ignores_the_folder_and_the_last_call(tmp_path):
    fingerprints = set()
    for name in ("a", "b"):
        tiny_tokenizer().save_pretrained(tmp_path / name)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        fingerprints.add(fingerprint(tokenizer))
        make_encode(tokenizer)([" ".join(WORDS)], 5)
        fingerprints.add(fingerprint(tokenizer))
    assert len(fingerprints) == 1
