"""From CSV files to padded batches and sparse features: reviews, tokenization, batching, n-grams.

Nothing here knows a model or a device.
"""
