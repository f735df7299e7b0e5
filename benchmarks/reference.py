"""The published protocol as a plain fp32 PyTorch loop, which speed and correctness are compared with.

Attention scores are materialized, GPT-2's layer norm and GELU are computed by their formulas as in
the book, every review is padded to the full context, logits are computed at all positions, AdamW is
not fused, reviews are read one at a time from a data frame, and batches are of eight reviews in
training and in evaluation. The data preparation and the scikit-learn baselines are here in the same
plain form.
"""

import math
import os
import tarfile
import time
from collections.abc import Callable
from types import MethodType

import pandas as pd
import torch
import torch.nn.functional as F
from sklearn.dummy import DummyClassifier
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.utils.data import DataLoader, Dataset

from previous_chapters import GELU, LayerNorm, MultiHeadAttention


class ReferenceDataset(Dataset):
    """Reviews as (input ids, attention mask, label), padded to `length` tokens."""

    def __init__(self, frame: pd.DataFrame, encode: Callable, length: int, pad_token_id: int):
        self.frame = frame
        self.token_ids = [encode([text], length)[0] for text in frame["text"]]
        self.length = length
        self.pad_token_id = pad_token_id

    def __len__(self):
        return len(self.frame)

    def __getitem__(self, index):
        """Return one review."""
        ids = self.token_ids[index]
        padding = self.length - len(ids)
        return (
            torch.tensor(ids + [self.pad_token_id] * padding),
            torch.tensor([1] * len(ids) + [0] * padding),
            torch.tensor(self.frame.iloc[index]["label"]),
        )


def use_eager_ops(gpt: nn.Module) -> None:
    """Replace a GPTModel's attention, layer norm and GELU by their formulas, operation by operation."""

    def attention(self, x):
        queries, keys, values = (self.split_heads(linear(x)) for linear in (self.W_query, self.W_key, self.W_value))
        scores = queries @ keys.transpose(-2, -1) / math.sqrt(queries.shape[-1])
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        context = scores.masked_fill(future, -torch.inf).softmax(dim=-1) @ values
        return self.out_proj(context.transpose(1, 2).flatten(2))

    def gelu(x):
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def norm(self, x):
        variance, mean = torch.var_mean(x, dim=-1, keepdim=True, correction=0)
        return self.scale * (x - mean) / torch.sqrt(variance + self.eps) + self.shift

    for module in gpt.modules():
        if isinstance(module, MultiHeadAttention):
            module.forward = MethodType(attention, module)
        elif isinstance(module, LayerNorm):
            module.forward = MethodType(norm, module)
        elif isinstance(module, GELU):
            module.forward = gelu


def gpt_logits(position: str) -> Callable:
    """Return the pooling of a GPTModel: its logits at the "last" or "first" position, or their "average"."""
    pool = {
        "last": lambda logits: logits[:, -1],
        "first": lambda logits: logits[:, 0],
        "average": lambda logits: logits.mean(dim=1),
    }[position]
    return lambda model, input_ids, attention_mask: pool(model(input_ids))


def encoder_logits(model, input_ids, attention_mask):
    """Return the class logits of a Hugging Face encoder."""
    return model(input_ids=input_ids, attention_mask=attention_mask).logits


def train(
    model: nn.Module,
    pooling: Callable,
    dataset: Dataset,
    *,
    learning_rate: float,
    num_epochs: int = 1,
    batch_size: int = 8,
    max_steps: int | None = None,
    seed: int = 123,
    shuffle: bool = True,
) -> tuple[list[float], list[float]]:
    """Train; return the loss and the seconds of each step."""
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.1)
    loader = DataLoader(dataset, batch_size=batch_size, shuffle=shuffle, drop_last=True)
    losses, seconds = [], []
    device = next(model.parameters()).device
    model.train()
    started = time.perf_counter()
    for _ in range(num_epochs):
        for batch in loader:
            input_ids, attention_mask, labels = (tensor.to(device) for tensor in batch)
            optimizer.zero_grad()
            loss = F.cross_entropy(pooling(model, input_ids, attention_mask), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            seconds.append(time.perf_counter() - started)
            started = time.perf_counter()
            if len(losses) == max_steps:
                return losses, seconds
    return losses, seconds


def evaluate(model: nn.Module, pooling: Callable, dataset: Dataset, batch_size: int = 8) -> tuple[float, float]:
    """Return (mean loss, accuracy)."""
    loss = correct = 0
    device = next(model.parameters()).device
    model.eval()
    with torch.no_grad():
        for batch in DataLoader(dataset, batch_size=batch_size):
            input_ids, attention_mask, labels = (tensor.to(device) for tensor in batch)
            logits = pooling(model, input_ids, attention_mask)
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            correct += (logits.argmax(dim=-1) == labels).sum().item()
    model.train()
    return loss / len(dataset), correct / len(dataset)


def prepare(archive: str, data_dir: str) -> None:
    """Extract the archive, read 50,000 files, one review at a time, and write the three CSV files."""
    with tarfile.open(archive) as file:
        file.extractall(data_dir, filter="data")
    folder = os.path.join(data_dir, "aclImdb")
    rows = []
    for half in ("test", "train"):
        for kind, label in (("pos", 1), ("neg", 0)):
            directory = os.path.join(folder, half, kind)
            for name in sorted(os.listdir(directory)):
                with open(os.path.join(directory, name), encoding="utf-8") as file:
                    rows.append({"text": file.read(), "label": label})
    reviews = pd.DataFrame(rows)
    for _ in range(2):
        reviews = reviews.sample(frac=1, random_state=123).reset_index(drop=True)
    reviews[:35_000].to_csv(os.path.join(data_dir, "train.csv"), index=False)
    reviews[35_000:40_000].to_csv(os.path.join(data_dir, "validation.csv"), index=False)
    reviews[40_000:].to_csv(os.path.join(data_dir, "test.csv"), index=False)


def logistic_regression(data_dir: str) -> None:
    """Fit both scikit-learn baselines with the published settings and score them on the three sets."""
    frames = [pd.read_csv(os.path.join(data_dir, f"{split}.csv")) for split in ("train", "validation", "test")]
    vectorizer = CountVectorizer()
    features = [vectorizer.fit_transform(frames[0]["text"])]
    features += [vectorizer.transform(frame["text"]) for frame in frames[1:]]
    for model in (DummyClassifier(strategy="most_frequent"), LogisticRegression(max_iter=1000)):
        model.fit(features[0], frames[0]["label"])
        for x, frame in zip(features, frames, strict=True):
            model.score(x, frame["label"])
