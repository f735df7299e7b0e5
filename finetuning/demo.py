"""The synthetic demo behind `reproduce.py --demo`: reviews from a small grammar and two tiny models.

`write_inputs` fills a folder with three CSV files and two models with random weights, each with a
tokenizer built from the reviews. Nothing is downloaded. A demo result shows that the programs work
and says nothing about real reviews or published models.
"""

import json
import random
import re
from collections import Counter
from itertools import chain

import pandas as pd
import tiktoken

from finetuning.bpe import END_OF_TEXT, PIECES, write_encoding
from finetuning.files import written_whole
from finetuning.reviews import csv_paths, read_reviews

REVIEWS = {"train": 6_000, "validation": 1_000, "test": 2_000}
TOKENS = 64  # context length of both models; every review is shorter
GPT, ENCODER = "DEMO-gpt", "DEMO-encoder"
ABOUT = """DEMO

Everything in this folder was written by `python reproduce.py --demo`, from synthetic reviews that a small
grammar generated. The results show that the programs work and say nothing about real reviews or published
models. You can delete the folder at any time.
"""

ADJECTIVES = (  # by label
    ["bad", "dull", "weak", "flat", "clumsy", "dreary", "stale", "hollow", "tired", "grating"],
    ["good", "lovely", "sharp", "warm", "clever", "moving", "fresh", "funny", "rich", "charming"],
)
ASPECTS = ["plot", "cast", "music", "camera", "dialogue", "ending", "script", "editing", "lighting", "humour"]
PEOPLE = ["my brother", "a friend", "the critic next to me", "my neighbour", "the poster"]
TIMES = ["on a rainy Sunday", "with my family", "on the train", "last night", "at the old cinema"]
# {is_so} is an adjective of the opinion's label, {is_not} one of the other label, {any} one of either.
AFFIRMED = ["The {aspect} was {is_so}.", "The {aspect} is really {is_so}.", "I found the {aspect} {is_so}.",
            "Such a {is_so} {aspect}!"]
NEGATED = ["The {aspect} was not {is_not}.", "The {aspect} was never {is_not}.", "The {aspect} is hardly {is_not}.",
           "I would not call the {aspect} {is_not}.", "The {aspect} is anything but {is_not}."]
NEUTRAL = ["{someone} had called it {any}.", "It tells of a {any} man and a {any} city.", "I saw it {time}.",
           "I had expected something {any}."]
NEGATED_FRACTION = 0.3  # of the opinions; a bag of words cannot resolve a negation
LABEL_NOISE = 0.03


def demo_reviews(count: int, seed: int) -> pd.DataFrame:
    """Generate `count` reviews, half of them positive, as a data frame with the columns `text` and `label`.

    A review holds two to four opinions of its label, perhaps one of the other label, and neutral
    sentences with the same adjectives. Some labels are wrong, so that no model reaches 100%.
    """
    rng = random.Random(seed)
    rows = [(review(label, rng), label if rng.random() > LABEL_NOISE else 1 - label)
            for label in (number % 2 for number in range(count))]
    rng.shuffle(rows)
    return pd.DataFrame(rows, columns=["text", "label"])


def review(label, rng):
    """Generate the text of a review in which most opinions have this label."""
    labels = [label] * rng.choice([2, 3, 4]) + [1 - label] * rng.choice([0, 1])
    sentences = [fill(rng.choice(NEGATED if rng.random() < NEGATED_FRACTION else AFFIRMED), label, rng)
                 for label in labels]
    sentences += [fill(rng.choice(NEUTRAL), rng.choice([0, 1]), rng) for _ in range(rng.choice([0, 1, 2]))]
    rng.shuffle(sentences)
    return " ".join(sentences)


def fill(template, label, rng):
    """Fill a sentence template and capitalize the sentence."""
    same, opposite = (rng.choice(ADJECTIVES[which]) for which in (label, 1 - label))
    text = template.format(aspect=rng.choice(ASPECTS), is_so=same, is_not=opposite, any=same,
                           someone=rng.choice(PEOPLE), time=rng.choice(TIMES))
    return text[0].upper() + text[1:]


def write_inputs(folder):
    """Write the demo's three CSV files and the model folders GPT and ENCODER."""
    (folder / GPT).mkdir(parents=True, exist_ok=True)
    (folder / "DEMO.txt").write_text(ABOUT, encoding="utf-8")
    splits = [demo_reviews(count, seed) for seed, count in enumerate(REVIEWS.values())]
    with written_whole(*csv_paths(folder)) as paths:
        for reviews, path in zip(splits, paths, strict=True):
            reviews.to_csv(path, index=False, lineterminator="\n")
    texts = splits[0]["text"].tolist()
    write_gpt(folder / GPT, texts)
    write_encoder(folder / ENCODER, texts)


def write_gpt(folder, texts):
    """Write the config of a tiny GPT and a tokenizer of single bytes and all words of `texts`, for train_gpt.py."""
    words = Counter(word.encode() for text in texts for word in re.findall(r" ?\w+| ?[^\w\s]+", text))
    tokens = list(dict.fromkeys(chain((bytes([value]) for value in range(256)), sorted(words))))
    encoding = tiktoken.Encoding("DEMO", pat_str=PIECES, special_tokens={END_OF_TEXT: len(tokens)},
                                 mergeable_ranks={token: rank for rank, token in enumerate(tokens)})
    write_encoding(encoding, folder / "tokenizer.tiktoken")
    config = {"vocab_size": len(tokens) + 1, "context_length": TOKENS, "drop_rate": 0.0, "qkv_bias": False,
              "emb_dim": 64, "n_layers": 2, "n_heads": 4}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_encoder(folder, texts):
    """Write a tiny ModernBERT with random weights and a tokenizer of all words of `texts`, for train_bert_hf.py."""
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
    # A masked language model, as published encoders are stored; the train script adds the classification head.
    transformers.AutoModelForMaskedLM.from_config(config).save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)


def demo_table(records, folder):
    """Return the demo's results as a text table, with a dummy that always predicts the majority class."""
    train, _, test = (read_reviews(path)["label"] for path in csv_paths(folder))
    lines = [f"\nDEMO results, on {len(test):,} synthetic reviews",
             f"{'':<16}{'parameters':>12}{'test accuracy':>16}{'95% interval':>20}{'seconds':>10}",
             f"{'DEMO-dummy':<16}{0:>12}{(test == train.mode()[0]).mean():>16.2%}"]
    for name, record in records.items():
        low, high = record["test_interval_95"]
        lines.append(f"{name:<16}{record['parameters']['all']:>12,}{record['accuracy']['test']:>16.2%}"
                     f"{f'{low:.2%} to {high:.2%}':>20}{sum(record['seconds'].values()):>10.0f}")
    return "\n".join(lines)
