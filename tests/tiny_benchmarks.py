"""A small benchmark: its flags, and seconds as an implementation reports them."""

FLAGS = ["--steps", "3", "--reviews", "10", "--context_length", "16", "--precision", "fp32", "--device", "cpu"]


def measured(**parts):
    return {"run": 1.0, "step": 1.0, "review": 1.0, "tokenizing": 1.0, "peak_memory": 100} | parts
