"""N-grams weighted by naive Bayes, the features of a strong linear classifier (Wang & Manning, 2012)."""

import re
from itertools import chain

import numpy as np
import pandas as pd
from scipy import sparse
from sklearn.preprocessing import normalize

TOKEN = re.compile(r"\w+|[^\w\s]")  # words, and punctuation marks one by one
LONGEST = 3


class NaiveBayesNgrams:
    """Which n-grams of up to three words a text holds, weighted by how much they tell of its class.

    A text becomes a row of unit length with, for each of its n-grams, the log-ratio of the
    n-gram's share in the positive and in the negative training texts. N-grams that fewer than
    `min_texts` training texts hold are left out; `smoothing` is added to every count.
    """

    def __init__(self, min_texts=2, smoothing=1.0):
        self.min_texts = min_texts
        self.smoothing = smoothing

    def fit_transform(self, texts, labels):
        """Learn n-grams and weights; return the texts' features, sparse (texts, n-grams) float32."""
        words = [tokenize(text) for text in texts]
        self.vocabulary = {word: number for number, word in enumerate(dict.fromkeys(chain.from_iterable(words)), 1)}
        rows, keys = self._ngrams(words)
        columns, ngrams = pd.factorize(keys)
        held = incidence(rows, columns, (len(words), len(ngrams)))
        frequent = np.flatnonzero(np.bincount(held.indices, minlength=len(ngrams)) >= self.min_texts)
        self.ngrams = pd.Index(ngrams[frequent])
        held = held[:, frequent]
        positive = np.asarray(labels) == 1
        shares = [self.smoothing + np.asarray(held[texts_of_class].sum(axis=0)).ravel()
                  for texts_of_class in (positive, ~positive)]
        self.weights = np.log(shares[0] / shares[0].sum() / (shares[1] / shares[1].sum())).astype(np.float32)
        return self._weighted(held)

    def transform(self, texts):
        """The features of other texts; n-grams that the training texts do not hold count for nothing."""
        words = [tokenize(text) for text in texts]
        rows, keys = self._ngrams(words)
        columns = self.ngrams.get_indexer(keys)
        known = columns >= 0
        return self._weighted(incidence(rows[known], columns[known], (len(words), len(self.ngrams))))

    def learned(self):
        """What `restored` needs: (list of words, {name: array})."""
        return [*self.vocabulary], {"ngrams": self.ngrams.to_numpy(), "weights": self.weights}

    @classmethod
    def restored(cls, words, ngrams, weights):
        """The object that has `learned` this."""
        self = cls()
        self.vocabulary = {word: number for number, word in enumerate(words, 1)}
        self.ngrams, self.weights = pd.Index(ngrams), weights
        return self

    def names(self, columns):
        """The n-grams of these columns, their words separated by spaces."""
        words, base = [*self.vocabulary], len(self.vocabulary) + 1

        def spelled(key):
            key, number = divmod(key, base)
            return f"{spelled(key)} {words[number - 1]}".lstrip() if number else ""
        return [spelled(key) for key in self.ngrams[columns].tolist()]

    def _ngrams(self, words):
        """All n-grams as (number of the text, key), one array each.

        With words numbered from 1, the digits of a key to the base vocabulary size + 1 are an
        n-gram's words, so that n-grams of different lengths have different keys.
        """
        base = len(self.vocabulary) + 1
        if base**LONGEST >= 2**63:
            raise ValueError(f"a vocabulary of {base - 1:,} words is too large for 64-bit keys")
        numbers = np.fromiter((self.vocabulary.get(word, 0) for word in chain.from_iterable(words)), dtype=np.int64)
        text = np.repeat(np.arange(len(words), dtype=np.int32), [len(text) for text in words])
        rows, keys = [], []
        key, known = np.zeros_like(numbers), np.ones(len(numbers), dtype=bool)
        for length in range(1, LONGEST + 1):
            following = numbers[length - 1:]
            key = key[:len(following)] * base + following
            known = known[:len(following)] & (following > 0) & (text[:len(following)] == text[length - 1:])
            rows.append(text[:len(following)][known])
            keys.append(key[known])
        return np.concatenate(rows), np.concatenate(keys)

    def _weighted(self, held):
        return normalize(held.multiply(self.weights).tocsr(), copy=False)


def tokenize(text):
    """The lower-cased words and punctuation marks of a review, without its HTML line breaks."""
    return TOKEN.findall(text.replace("<br />", " ").lower())


def incidence(rows, columns, shape):
    """A sparse matrix (csr, float32) that is 1 where a pair of row and column occurs, however often."""
    matrix = sparse.csr_matrix((np.ones(len(rows), dtype=np.float32), (rows, columns)), shape=shape)
    matrix.data[:] = 1
    return matrix
