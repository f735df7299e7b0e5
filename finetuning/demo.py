"""The DEMO's own room: what `reproduce.py --demo` trains with instead of downloads.

`write_inputs` fills a folder with synthetic reviews and with two models of a tenth of a million
random weights, each beside a tokenizer made from those reviews. All of it is made here: nothing is
downloaded, and nothing is learned in it about real reviews or real models.
"""

import json
import re
from collections import Counter
from itertools import chain

import tiktoken

from finetuning.bpe import END_OF_TEXT, PIECES, write_encoding
from finetuning.demo_reviews import demo_reviews
from finetuning.files import written_whole
from finetuning.reviews import csv_paths, read_reviews

REVIEWS = {"train": 6_000, "validation": 1_000, "test": 2_000}
TOKENS = 64  # as many as either model reads; the longest review has fewer
GPT, ENCODER = "DEMO-gpt", "DEMO-encoder"
ABOUT = """DEMO

Everything in this folder was made by `python reproduce.py --demo` from synthetic reviews that a small
grammar wrote. Its numbers say whether the programs run, and nothing about real reviews or published
models. The folder can be deleted at any time.
"""


def write_inputs(folder):
    """Write what the DEMO needs: three CSV files, and the model folders GPT and ENCODER."""
    (folder / GPT).mkdir(parents=True, exist_ok=True)
    (folder / "DEMO.txt").write_text(ABOUT, encoding="utf-8")
    sets = [demo_reviews(count, seed) for seed, count in enumerate(REVIEWS.values())]
    with written_whole(*csv_paths(folder)) as paths:
        for reviews, path in zip(sets, paths, strict=True):
            reviews.to_csv(path, index=False, lineterminator="\n")
    texts = sets[0]["text"].tolist()
    write_gpt(folder / GPT, texts)
    write_encoder(folder / ENCODER, texts)


def write_gpt(folder, texts):
    """Write a tokenizer of the bytes and all words of `texts`, and the configuration of a small GPT, for train_gpt.py.
    """
    words = Counter(word.encode() for text in texts for word in re.findall(r" ?\w+| ?[^\w\s]+", text))
    tokens = list(dict.fromkeys(chain((bytes([value]) for value in range(256)), sorted(words))))
    write_encoding(tiktoken.Encoding("DEMO", pat_str=PIECES, special_tokens={END_OF_TEXT: len(tokens)},
                                     mergeable_ranks={token: rank for rank, token in enumerate(tokens)}),
                   folder / "tokenizer.tiktoken")
    config = {"vocab_size": len(tokens) + 1, "context_length": TOKENS, "drop_rate": 0.0, "qkv_bias": False,
              "emb_dim": 64, "n_layers": 2, "n_heads": 4}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_encoder(folder, texts):
    """Write a small ModernBERT with random weights and a tokenizer of all words of `texts`, for train_bert_hf.py."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]",
               "mask_token": "[MASK]"}
    words = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    words.normalizer, words.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    words.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=[*special.values()], show_progress=False))
    pad, _, cls, sep, _ = (words.token_to_id(token) for token in special.values())
    words.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]",
                                                         special_tokens=[("[CLS]", cls), ("[SEP]", sep)])
    config = transformers.ModernBertConfig(
        vocab_size=words.get_vocab_size(), hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=128, max_position_embeddings=TOKENS, global_attn_every_n_layers=1, pad_token_id=pad,
        cls_token_id=cls, bos_token_id=cls, sep_token_id=sep, eos_token_id=sep)
    transformers.logging.disable_progress_bar()
    torch.manual_seed(123)
    # A language model, as the published encoders are stored: the classifier's head is the train script's to add.
    transformers.AutoModelForMaskedLM.from_config(config).save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)


def demo_table(records, folder):
    """The DEMO's results as lines of text, the dummy's among them, which says what most training reviews are."""
    train, _, test = (read_reviews(path)["label"] for path in csv_paths(folder))
    lines = [f"\nDEMO results, on {len(test):,} synthetic reviews",
             f"{'':<16}{'parameters':>12}{'test accuracy':>16}{'95% interval':>20}{'seconds':>10}",
             f"{'DEMO-dummy':<16}{0:>12}{(test == train.mode()[0]).mean():>16.2%}"]
    for name, record in records.items():
        low, high = record["test_interval_95"]
        lines.append(f"{name:<16}{record['parameters']['all']:>12,}{record['accuracy']['test']:>16.2%}"
                     f"{f'{low:.2%} to {high:.2%}':>20}{sum(record['seconds'].values()):>10.0f}")
    return "\n".join(lines)
