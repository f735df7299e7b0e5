"""N-gram features weighted by the naive Bayes log-count ratio (Wang & Manning, 2012)."""

import re
from collections.abc import Iterable
from itertools import chain

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import sparse
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.preprocessing import normalize

TOKEN_PATTERN = re.compile(r"\w+|[^\w\s]")  # words and single punctuation marks


class NBLogCountRatio(TransformerMixin, BaseEstimator):
    """Binary n-gram features, weighted by the log-count ratio of the two classes and scaled to unit length.

    The weight of an n-gram is log((p / sum(p)) / (q / sum(q))). The arrays p and q (n-grams,) hold the
    number of positive and of negative texts that contain it, plus `alpha`.

    Parameters
    ----------
    min_df : smallest number of training texts that an n-gram must occur in
    alpha : smoothing parameter, added to every count
    ngram_range : (smallest, largest) number of words in an n-gram

    Attributes
    ----------
    vocabulary_ : dict of word -> id, counted from 1
    ngram_keys_ : pandas Index (n-grams,) of int64, see `_keys`
    log_count_ratio_ : array (n-grams,) of float32
    """

    def __init__(self, min_df: int = 2, alpha: float = 1.0, ngram_range: tuple[int, int] = (1, 3)):
        self.min_df = min_df
        self.alpha = alpha
        self.ngram_range = ngram_range

    def fit(self, texts: Iterable[str], labels: ArrayLike) -> "NBLogCountRatio":
        """Fit the vocabulary and weights to texts with labels 0 or 1."""
        self.fit_transform(texts, labels)
        return self

    def fit_transform(self, texts: Iterable[str], labels: ArrayLike) -> sparse.csr_matrix:
        """Fit as `fit` does; return the features of the training texts, sparse (texts, n-grams) float32."""
        words = [tokenize(text) for text in texts]
        self.vocabulary_ = {word: index for index, word in enumerate(dict.fromkeys(chain.from_iterable(words)), 1)}
        rows, keys = self._keys(words)
        columns, ngrams = pd.factorize(keys)
        present = incidence(rows, columns, (len(words), len(ngrams)))
        frequent = np.flatnonzero(np.bincount(present.indices, minlength=len(ngrams)) >= self.min_df)
        self.ngram_keys_ = pd.Index(ngrams[frequent])
        present = present[:, frequent]
        positive = np.asarray(labels) == 1
        counts = [
            self.alpha + np.asarray(present[rows_of_class].sum(axis=0)).ravel()
            for rows_of_class in (positive, ~positive)
        ]
        self.log_count_ratio_ = np.log(counts[0] / counts[0].sum() / (counts[1] / counts[1].sum())).astype(np.float32)
        return self._weight(present)

    def transform(self, texts: Iterable[str]) -> sparse.csr_matrix:
        """Return the features of texts, sparse (texts, n-grams) float32; unseen n-grams are ignored."""
        words = [tokenize(text) for text in texts]
        rows, keys = self._keys(words)
        columns = self.ngram_keys_.get_indexer(keys)
        known = columns >= 0
        return self._weight(incidence(rows[known], columns[known], (len(words), len(self.ngram_keys_))))

    def get_feature_names_out(self, input_features: None = None) -> np.ndarray:
        """Return the n-grams, their words separated by spaces, as an array (n-grams,) of str objects."""
        words = np.array(["", *self.vocabulary_], dtype=object)
        names, keys = np.full(len(self.ngram_keys_), "", dtype=object), self.ngram_keys_.to_numpy()
        for _ in range(self.ngram_range[1]):
            keys, ids = np.divmod(keys, len(words))
            names = np.where(ids > 0, words[ids] + np.where(names == "", "", " ") + names, names)
        return names

    def _keys(self, words):
        """Return all n-grams as two arrays: row of the text, int32, and key, int64.

        The key is a number whose digits to the base vocabulary size + 1 are the ids of the n-gram's
        words, so that n-grams of different lengths have different keys.
        """
        shortest, longest = self.ngram_range
        base = len(self.vocabulary_) + 1
        if base**longest >= 2**63:
            raise ValueError(f"{base - 1:,} distinct words are too many for n-grams of {longest} words")
        ids = np.fromiter((self.vocabulary_.get(word, 0) for word in chain.from_iterable(words)), dtype=np.int64)
        text = np.repeat(np.arange(len(words), dtype=np.int32), [len(text) for text in words])
        rows, keys = [], []
        key, known = np.zeros_like(ids), np.ones(len(ids), dtype=bool)
        for length in range(1, longest + 1):
            last = ids[length - 1 :]
            key = key[: len(last)] * base + last
            known = known[: len(last)] & (last > 0) & (text[: len(last)] == text[length - 1 :])
            if length >= shortest:
                rows.append(text[: len(last)][known])
                keys.append(key[known])
        return np.concatenate(rows), np.concatenate(keys)

    def _weight(self, present):
        return normalize(present.multiply(self.log_count_ratio_).tocsr(), copy=False)


def tokenize(text: str) -> list[str]:
    """Return the lower-cased words and punctuation marks of a review, without its HTML line breaks."""
    return TOKEN_PATTERN.findall(text.replace("<br />", " ").lower())


def incidence(rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int]) -> sparse.csr_matrix:
    """Return a sparse csr matrix, float32, that is 1 wherever a (row, column) pair occurs at least once."""
    matrix = sparse.csr_matrix((np.ones(len(rows), dtype=np.float32), (rows, columns)), shape=shape)
    matrix.data[:] = 1
    return matrix
