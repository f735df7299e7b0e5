"""The published protocol as a plain PyTorch loop, as most people would write it.

Speed is measured against it, and the project's own loop is tested against it: attention scores
materialised, every review padded to the full context, logits of all positions, unfused AdamW in
float32, reviews taken one at a time from a data frame, batch 8 for training and evaluation.
"""

import math

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset


class ReferenceDataset(Dataset):
    """Reviews as (input ids, attention mask, label), padded to `length` tokens."""

    def __init__(self, frame, encode, length, pad_token_id):
        self.frame = frame
        self.token_ids = [encode([text], length)[0] for text in frame["text"]]
        self.length = length
        self.pad_token_id = pad_token_id

    def __len__(self):
        return len(self.frame)

    def __getitem__(self, index):
        ids = self.token_ids[index]
        padding = self.length - len(ids)
        return (torch.tensor(ids + [self.pad_token_id] * padding), torch.tensor([1] * len(ids) + [0] * padding),
                torch.tensor(self.frame.iloc[index]["label"]))


def materialize_attention(gpt):
    """Let a GPTModel compute its attention scores as a matrix, mask them, and take the softmax."""
    def attend(queries, keys, values, positions=None):
        scores = queries @ keys.transpose(-2, -1) / math.sqrt(queries.shape[-1])
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        return scores.masked_fill(future, -torch.inf).softmax(dim=-1) @ values
    for block in gpt.trf_blocks:
        block.att.attend = attend


def gpt_logits(position):
    """How to read a GPTModel's class logits: at the "last" or "first" position, or their "average"."""
    pick = {"last": lambda logits: logits[:, -1], "first": lambda logits: logits[:, 0],
            "average": lambda logits: logits.mean(dim=1)}[position]
    return lambda model, input_ids, attention_mask: pick(model(input_ids))


def encoder_logits(model, input_ids, attention_mask):
    """The class logits of a Hugging Face encoder."""
    return model(input_ids=input_ids, attention_mask=attention_mask).logits


def train(model, read_logits, dataset, *, num_epochs=1, batch_size=8, learning_rate, seed=123):
    """Train; return the loss of every update."""
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.1)
    loader = DataLoader(dataset, batch_size=batch_size, shuffle=True, drop_last=True)
    losses = []
    model.train()
    for _ in range(num_epochs):
        for input_ids, attention_mask, labels in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(read_logits(model, input_ids, attention_mask), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def evaluate(model, read_logits, dataset, batch_size=8):
    """Return (mean loss, accuracy)."""
    loss = correct = 0
    model.eval()
    with torch.no_grad():
        for input_ids, attention_mask, labels in DataLoader(dataset, batch_size=batch_size):
            logits = read_logits(model, input_ids, attention_mask)
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            correct += (logits.argmax(dim=-1) == labels).sum().item()
    model.train()
    return loss / len(dataset), correct / len(dataset)
