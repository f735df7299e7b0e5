"""Run train_gpt.py with a tiny model size and a byte tokenizer, so that nothing is downloaded.

torchrun --nproc_per_node 2 tests/tiny_gpt.py --model_size "gpt2-tiny (0M)" --weights random
"""

import sys
from pathlib import Path

import tiktoken

SIZE, CONFIG, CONTEXT_LENGTH = "gpt2-tiny (0M)", {"emb_dim": 8, "n_layers": 2, "n_heads": 2}, 64
# A complete configuration, for tests of the model alone.
GPT_CONFIG = {
    "vocab_size": 50,
    "context_length": 16,
    "emb_dim": 8,
    "n_heads": 2,
    "n_layers": 3,
    "drop_rate": 0.0,
    "qkv_bias": True,
}


def byte_encoding():
    """Return an encoding with one token per byte and GPT-2's special token."""
    return tiktoken.Encoding(
        "gpt2",
        pat_str=r".",
        mergeable_ranks={bytes([i]): i for i in range(256)},
        special_tokens={"<|endoftext|>": 50256},
    )


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    import train_gpt
    from finetuning.cli import run_main

    train_gpt.MODEL_CONFIGS[SIZE] = CONFIG
    train_gpt.BASE_CONFIG["context_length"] = CONTEXT_LENGTH
    encoding = byte_encoding()
    tiktoken.get_encoding = lambda name: encoding
    run_main(train_gpt.main)
