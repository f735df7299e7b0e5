import train_gpt
from benchmarks import scaling


def test_scaling_measures_reviews_and_steps(byte_tokenizer, tiny_gpt, data_dir, monkeypatch):
    monkeypatch.setitem(train_gpt.MODEL_CONFIGS, "gpt2-small (124M)", train_gpt.MODEL_CONFIGS[tiny_gpt])
    args = scaling.parse_args(["--data_dir", str(data_dir), "--precision", "fp32"])
    row = scaling.measure_reviews(args, 100)  # the 48 reviews of the training set, twice and 4 of them
    assert row["reviews"] == 100
    assert min(row["tokenizing"], row["cached"], row["batching"]) > 0
    assert scaling.measure_step(args, 16)["step"] > 0
