"""DEMO reviews: a small grammar writes film reviews that nobody wrote, and knows their labels.

A review holds two to four opinions of its label, perhaps one of the other, and sentences that use
the same adjectives but are no opinion of the reviewer's. Three opinions in ten deny the opposite
("was never dull"), which a bag of words cannot see. A few labels are wrong, as in life, so that
nothing can be right about all of them.
"""

import random

import pandas as pd

ADJECTIVES = (  # by label
    ["bad", "dull", "weak", "flat", "clumsy", "dreary", "stale", "hollow", "tired", "grating"],
    ["good", "lovely", "sharp", "warm", "clever", "moving", "fresh", "funny", "rich", "charming"],
)
ASPECTS = ["plot", "cast", "music", "camera", "dialogue", "ending", "script", "editing", "lighting", "humour"]
PEOPLE = ["my brother", "a friend", "the critic next to me", "my neighbour", "the poster"]
TIMES = ["on a rainy Sunday", "with my family", "on the train", "last night", "at the old cinema"]
# {is_so} is an adjective of the opinion's label, {is_not} one of the other, {any} one of either.
PLAIN = ["The {aspect} was {is_so}.", "The {aspect} is really {is_so}.", "I found the {aspect} {is_so}.",
         "Such a {is_so} {aspect}!"]
DENIED = ["The {aspect} was not {is_not}.", "The {aspect} was never {is_not}.", "The {aspect} is hardly {is_not}.",
          "I would not call the {aspect} {is_not}.", "The {aspect} is anything but {is_not}."]
BESIDE_THE_POINT = ["{someone} had called it {any}.", "It tells of a {any} man and a {any} city.", "I saw it {time}.",
                    "I had expected something {any}."]
DENIALS = 0.3  # of the opinions
WRONG_LABELS = 0.03


def demo_reviews(count, seed):
    """`count` reviews as a data frame with the columns `text` and `label`, half of them positive."""
    draw = random.Random(seed)
    rows = [(review(label, draw), label if draw.random() > WRONG_LABELS else 1 - label)
            for label in (number % 2 for number in range(count))]
    draw.shuffle(rows)
    return pd.DataFrame(rows, columns=["text", "label"])


def review(label, draw):
    """The text of a review whose opinions are mostly of this label."""
    opinions = [label] * draw.choice([2, 3, 4]) + [1 - label] * draw.choice([0, 1])
    sentences = [opinion(polarity, draw) for polarity in opinions]
    sentences += [fill(draw.choice(BESIDE_THE_POINT), draw.choice([0, 1]), draw) for _ in range(draw.choice([0, 1, 2]))]
    draw.shuffle(sentences)
    return " ".join(sentences)


def opinion(polarity, draw):
    """A sentence that praises (1) or blames (0)."""
    return fill(draw.choice(DENIED if draw.random() < DENIALS else PLAIN), polarity, draw)


def fill(sentence, polarity, draw):
    """A sentence with words in its gaps, its first letter large."""
    so, opposite = (draw.choice(ADJECTIVES[label]) for label in (polarity, 1 - polarity))
    text = sentence.format(aspect=draw.choice(ASPECTS), is_so=so, is_not=opposite, any=so,
                           someone=draw.choice(PEOPLE), time=draw.choice(TIMES))
    return text[0].upper() + text[1:]
