"""From CSV files to padded batches and sparse features: reviews, tokenization, batching, n-grams.

Nothing here depends on a model.
"""
