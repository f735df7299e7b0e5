"""What the train scripts share: reading reviews, batching, the training loop, records.

Imports run one way: the scripts import this package, never the reverse.
"""
