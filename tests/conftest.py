"""Tiny models, tiny data, and a network that fails when touched."""

import copy
import os
import socket
import sys
import tempfile

# Before anything imports the Hub's client: an empty cache of the tests' own, and no network.
_home = tempfile.TemporaryDirectory()
os.environ["HF_HOME"] = _home.name
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["PYTHONDONTWRITEBYTECODE"] = "1"

from pathlib import Path  # noqa: E402

import pandas as pd  # noqa: E402
import pytest  # noqa: E402
import tiktoken  # noqa: E402
import tiny_gpt as tiny  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers, processors  # noqa: E402
from transformers import (  # noqa: E402
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ModernBertConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

import train_gpt  # noqa: E402
from finetuning import cli  # noqa: E402
from finetuning.records import write_record  # noqa: E402
from finetuning.reviews import SPLITS  # noqa: E402

REPOSITORY = Path(__file__).parent.parent
HUB_CACHE = Path(_home.name) / "hub"
WORDS = ["the", "a", "film", "plot", "cast", "was", "is", "and", "not", "very",
         "good", "great", "fine", "bad", "poor", "dull"]
SIZES = {"vocab_size": 5 + len(WORDS), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 32, "max_position_embeddings": 40}
# One tiny configuration for each architecture in train_bert_hf.MODELS, its dropout as published.
TINY_CONFIGS = {
    "distilbert": DistilBertConfig(vocab_size=SIZES["vocab_size"], dim=16, n_layers=2, n_heads=2, hidden_dim=32,
                                   max_position_embeddings=40),
    "bert": BertConfig(**SIZES),
    "minilm": BertConfig(**SIZES),
    "roberta": RobertaConfig(**SIZES, pad_token_id=1, type_vocab_size=1),
    "deberta-v3-base": DebertaV2Config(
        **SIZES, type_vocab_size=0, relative_attention=True, position_buckets=8, norm_rel_ebd="layer_norm",
        share_att_key=True, pos_att_type=["p2c", "c2p"], position_biased_input=False),
    "modernbert-base": ModernBertConfig(**SIZES, pad_token_id=0, cls_token_id=2, sep_token_id=3, bos_token_id=2,
                                        eos_token_id=3, local_attention=8),
    "modernbert-large": ModernBertConfig(**SIZES, pad_token_id=0, cls_token_id=2, sep_token_id=3, bos_token_id=2,
                                         eos_token_id=3, local_attention=8),
}
transformers.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Connections to anything but this machine fail the test."""
    connect = socket.socket.connect

    def guarded(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            pytest.fail(f"a test reached for the network: {address}")
        return connect(self, address)
    monkeypatch.setattr(socket.socket, "connect", guarded)


def reviews(count, seed=0):
    """A data frame of `count` reviews of 3 to 30 words whose label a bag of words can tell."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high):
        return int(torch.randint(high, (), generator=generator))
    rows = []
    for _ in range(count):
        label = draw(2)
        filler = [WORDS[draw(10)] for _ in range(2 + draw(28))]
        filler.insert(draw(len(filler)), WORDS[10 + draw(3) + 3 * (1 - label)])
        rows.append((" ".join(filler), label))
    return pd.DataFrame(rows, columns=["text", "label"])


@pytest.fixture
def data_dir(tmp_path):
    """A folder with the three CSV files: 48 / 16 / 20 reviews."""
    for seed, (split, count) in enumerate({"train": 48, "validation": 16, "test": 20}.items()):
        reviews(count, seed).to_csv(tmp_path / f"{split}.csv", index=False)
    return tmp_path


def tiny_tokenizer(pad_token_id=0):
    """A word-level tokenizer over WORDS with BERT's special tokens, pad at the given id (0 or 1)."""
    special = ["[PAD]", "[UNK]"] if pad_token_id == 0 else ["[UNK]", "[PAD]"]
    vocabulary = {token: i for i, token in enumerate([*special, "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]",
                                   cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")


def save_encoder(folder, config, dtype=torch.float32, kind=transformers.AutoModelForMaskedLM):
    """Save a tiny random model of `config` with its tokenizer, as a Hub repository would hold them."""
    torch.manual_seed(0)
    kind.from_config(copy.deepcopy(config)).to(dtype).save_pretrained(folder)  # it writes the dtype to the config
    tiny_tokenizer(config.pad_token_id).save_pretrained(folder)


def example_record(**changes):
    """A record of a run that never was, but for what `write_record` adds; `changes` replace values."""
    shares, seconds = dict.fromkeys(SPLITS, 0.75), {"training": 60.0, "evaluation": 30.0}
    return {
        "name": "example-seed123", "command": "python example.py", "arguments": {"data_dir": "."},
        "hardware": "a CPU", "precision": None, "versions": {}, "git_commit": None,
        "data": {f"{split}.csv": split for split in SPLITS}, "parameters": {"all": 2, "trainable": 2},
        "losses": [0.9, 0.8, 0.7, 0.6], "curve": [{"step": 0, "train_loss": 0.9, "validation_loss": 0.95},
                                                  {"step": 2, "train_loss": 0.7, "validation_loss": 0.8}],
        "epochs": [], "accuracy": shares, "reviews": dict.fromkeys(SPLITS, 4), "seconds": seconds,
        "reviews_per_second": seconds, "peak_memory": None, **changes}


def write_example(folder, probabilities=(0.9, 0.25, 1 / 3, 0.1), labels=(1, 0, 1, 0), **changes):
    """Write a record as a run leaves it, with the accuracy that its test predictions give."""
    right = [(probability > 0.5) == label for probability, label in zip(probabilities, labels, strict=True)]
    accuracy = dict.fromkeys(SPLITS, sum(right) / len(right))
    counts = dict.fromkeys(SPLITS, len(right))
    copies = [True, *[False] * (len(right) - 1)]
    write_record(folder, example_record(**{"accuracy": accuracy, "reviews": counts, **changes}),
                 copies, labels, probabilities)


@pytest.fixture
def hub_snapshot():
    """Make a folder in the Hub cache for a repository id, as if it had been downloaded; empty the cache afterwards."""
    made = []

    def make(repository):
        root = HUB_CACHE / f"models--{repository.replace('/', '--')}"
        snapshot = root / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        (root / "refs").mkdir()
        (root / "refs" / "main").write_text("0" * 40)
        made.append(root)
        return snapshot
    yield make
    for root in made:
        for path in sorted(root.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        root.rmdir()


@pytest.fixture
def byte_tokenizer(monkeypatch):
    """Stand in for GPT-2's tokenizer, which has to be downloaded."""
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": tiny.byte_encoding()}.__getitem__)


@pytest.fixture
def tiny_gpt(monkeypatch, byte_tokenizer):
    """Let train_gpt know a tiny model size; returns its name."""
    monkeypatch.setitem(train_gpt.MODEL_CONFIGS, tiny.SIZE, tiny.CONFIG)
    monkeypatch.setitem(train_gpt.BASE_CONFIG, "context_length", tiny.CONTEXT_LENGTH)
    return tiny.SIZE


@pytest.fixture
def failing(monkeypatch, capsys):
    """Run a script's main() as from the command line; return its one line of error after checking status 2."""
    def run(main, *arguments):
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.run(main)
        assert stopped.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        return lines[0]
    return run
