import math

import numpy as np
import pytest
from sklearn.base import clone

from finetuning.data.ngrams import NBLogCountRatio, tokenize


def test_tokenize_splits_words_and_punctuation_and_drops_line_breaks():
    assert tokenize("Not bad, at<br />ALL! It's") == ["not", "bad", ",", "at", "all", "!", "it", "'", "s"]


def test_vocabulary_too_large_for_64_bit_keys_is_refused():
    """Keys have base 4, three words and the unknown word: 4**31 is less than 2**63, 4**32 is more."""
    NBLogCountRatio(min_df=1, ngram_range=(1, 31)).fit(["a b", "c"], [1, 0])
    with pytest.raises(ValueError, match="3 distinct words are too many for n-grams of 32 words"):
        NBLogCountRatio(min_df=1, ngram_range=(1, 32)).fit(["a b", "c"], [1, 0])


def test_log_count_ratios_and_features_match_a_hand_computation():
    ngrams = NBLogCountRatio(min_df=1)
    features = ngrams.fit_transform(["good film", "bad film film"], [1, 0]).toarray()
    # In order of occurrence: good, film, bad, good film, bad film, film film, bad film film. With
    # one added to each count, the positive text has 2 2 1 2 1 1 1 of 10, the negative 1 2 2 1 2 2 2 of 12.
    counts = np.array([[2, 2, 1, 2, 1, 1, 1], [1, 2, 2, 1, 2, 2, 2]]) / [[10], [12]]
    weights = np.log(counts[0] / counts[1])
    assert ngrams.log_count_ratio_ == pytest.approx(weights, rel=1e-5)
    assert ngrams.log_count_ratio_[0] == pytest.approx(math.log(2.4))
    expected = np.array([[1, 1, 0, 1, 0, 0, 0], [0, 1, 1, 0, 1, 1, 1]]) * weights  # twice "film" counts once
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert features == pytest.approx(expected, rel=1e-5)


def test_min_df_drops_rare_ngrams():
    ngrams = NBLogCountRatio(min_df=2)
    features = ngrams.fit_transform(["a b c", "a b d", "e e e"], [1, 0, 0])
    assert features.shape == (3, 3)  # a, b, a b; "e" occurs three times, but in one text
    assert features[2].nnz == 0


def test_transform_ignores_unseen_ngrams():
    ngrams = NBLogCountRatio(min_df=1)
    train = ngrams.fit_transform(["a b c", "c b"], [1, 0])
    same, other, empty = ngrams.transform(["a b c", "a new b c", "unheard of"])
    assert (same != train[0]).nnz == 0
    # "a new b c" holds a, b, c and "b c"; not "a b", whose words are not adjacent.
    assert other.nnz == 4
    assert empty.nnz == 0


def test_ngrams_do_not_cross_text_boundaries():
    ngrams = NBLogCountRatio(min_df=1)
    ngrams.fit_transform(["a b", "c", "d e"], [1, 0, 1])
    assert ngrams.get_feature_names_out().tolist() == ["a", "b", "c", "d", "e", "a b", "d e"]


def test_ngram_range_limits_the_number_of_words():
    ngrams = NBLogCountRatio(min_df=1, ngram_range=(2, 3)).fit(["a b c"], [1])
    assert ngrams.get_feature_names_out().tolist() == ["a b", "b c", "a b c"]


def test_get_params_and_clone_follow_the_estimator_api():
    ngrams = clone(NBLogCountRatio(min_df=5, alpha=0.5))
    assert ngrams.get_params() == {"min_df": 5, "alpha": 0.5, "ngram_range": (1, 3)}
