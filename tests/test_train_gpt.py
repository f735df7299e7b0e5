import json
import os
import re

import pytest
import tiktoken
import torch
from conftest import reviews
from transformers import GPT2Config, GPT2LMHeadModel

import train_gpt
from finetuning import records
from finetuning.batches import IMDbDataset
from finetuning.bpe import write_encoding
from finetuning.errors import UserError
from finetuning.gpt_classifier import GPTClassifier
from finetuning.tokens import flatten
from previous_chapters import GPTModel

FINAL_LINES = [r"Training completed in \d+\.\d\d minutes\.", "", r"Evaluating on the full datasets \.\.\.", "",
               r"Training accuracy: \d+\.\d\d%", r"Validation accuracy: \d+\.\d\d%", r"Test accuracy: \d+\.\d\d%"]


def test_the_whole_run(tiny_gpt, data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["--model_size", tiny_gpt, "--weights", "random", "--trainable_layers", "all", "--context_length", "32",
               "--precision", "fp32"]
    printed = []
    for _ in range(2):
        train_gpt.main(command)
        printed.append(capsys.readouterr().out.splitlines())
    assert [line for line in printed[0] if "minutes" not in line] == [
        line for line in printed[1] if "minutes" not in line]
    for line, pattern in zip(printed[0][-7:], FINAL_LINES, strict=True):
        assert re.fullmatch(pattern, line), line
    assert torch.get_float32_matmul_precision() == "highest"  # no TF32 unasked
    record = records.read_record("results/gpt2-tiny-0M-all-context_length_32-weights_random-precision_fp32-seed123")
    assert record["parameters"]["all"] == record["parameters"]["trainable"]
    assert (len(record["losses"]), record["reviews"]) == (6, {"train": 48, "validation": 16, "test": 20})
    assert f"Test accuracy: {record['accuracy']['test']:.2%}" == printed[0][-1]
    assert record["precision"] == {"used": "fp32", "why": "as asked"}
    assert record["command"].startswith("python ")
    assert set(record["data"]) == {"train.csv", "validation.csv", "test.csv"}


def test_pretrained_weights_come_from_the_hub_by_id(tiny_gpt, data_dir, tmp_path, hub_snapshot, monkeypatch):
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(n_positions=64, n_embd=8, n_head=2, n_layer=2))
    snapshot = hub_snapshot("someone/tiny")
    gpt2.transformer.save_pretrained(snapshot)
    monkeypatch.setitem(train_gpt.download_and_load_gpt2.__globals__["REPOSITORIES"], "0M", "someone/tiny")
    model = train_gpt.instantiate_model(tiny_gpt)
    assert torch.equal(model.tok_emb.weight, gpt2.transformer.wte.weight)
    train_gpt.main(["--model_size", tiny_gpt, "--data_dir", str(data_dir), "--output_dir", str(tmp_path / "run"),
                    "--max_steps", "1", "--context_length", "16"])
    name = records.read_record(tmp_path / "run")["name"]
    assert name == "gpt2-tiny-0M-last_block-context_length_16-max_steps_1-seed123"


def test_a_checkpoint_of_another_size_is_refused(tiny_gpt, data_dir, hub_snapshot, monkeypatch, failing):
    snapshot = hub_snapshot("someone/tiny")
    GPT2LMHeadModel(GPT2Config(n_positions=64, n_embd=16, n_head=2, n_layer=2)).transformer.save_pretrained(snapshot)
    monkeypatch.setitem(train_gpt.download_and_load_gpt2.__globals__["REPOSITORIES"], "0M", "someone/tiny")
    message = failing(train_gpt.main, "--model_size", tiny_gpt, "--data_dir", data_dir)
    assert "does not fit gpt2-tiny (0M)" in message


def test_the_random_state_of_the_published_experiment(tiny_gpt):
    model = train_gpt.instantiate_model(tiny_gpt, "random", seed=123)
    torch.manual_seed(123)
    expected = GPTModel(train_gpt.BASE_CONFIG | train_gpt.MODEL_CONFIGS[tiny_gpt])
    assert torch.equal(model.trf_blocks[1].ff.layers[0].weight, expected.trf_blocks[1].ff.layers[0].weight)
    torch.rand(7)
    train_gpt.replace_head(model, seed=123)
    torch.manual_seed(123)
    assert torch.equal(model.out_head.weight, torch.nn.Linear(8, 2).weight)


@pytest.fixture
def logits_and_batch(tiny_gpt):
    """A model, a padded batch of reviews of 3, 1 and 5 tokens, and the logits at all positions."""
    model = train_gpt.instantiate_model(tiny_gpt, "random").eval()
    train_gpt.replace_head(model, 0)
    tokens = flatten([[5, 6, 7], [8], [1, 2, 3, 4, 5]], [1, 0, 1])
    batch = IMDbDataset(tokens, 50256, pad_to=6).batch([0, 1, 2])
    with torch.no_grad():
        return GPTClassifier(model), batch, model(batch.input_ids)


@pytest.mark.parametrize(("position", "indices"), [("last", [5, 5, 5]), ("first", [0, 0, 0]), ("flexible", [2, 0, 4])])
def test_where_the_class_is_read(logits_and_batch, position, indices):
    model, batch, logits = logits_and_batch
    with torch.no_grad():
        read = train_gpt.TOKEN_POSITIONS[position](model, batch)
    torch.testing.assert_close(read, logits[[0, 1, 2], indices])


def test_the_last_real_token_is_the_same_with_the_padding_left_out(logits_and_batch):
    """A CPU leaves the padding out, a GPU computes it and does not look at it."""
    model, batch, logits = logits_and_batch
    with torch.no_grad():
        padded = model(batch.input_ids, batch.lengths[:, None] - 1)[:, 0]
        torch.testing.assert_close(train_gpt.read_last_real(model, batch), padded)


def test_averages_skip_the_padding_only_with_flexible(logits_and_batch):
    model, batch, logits = logits_and_batch
    with torch.no_grad():
        torch.testing.assert_close(train_gpt.AVERAGES["last"](model, batch), logits.mean(dim=1))
        torch.testing.assert_close(train_gpt.AVERAGES["first"](model, batch), logits.mean(dim=1))
        real = torch.stack([logits[0, :3].mean(0), logits[1, :1].mean(0), logits[2, :5].mean(0)])
        torch.testing.assert_close(train_gpt.AVERAGES["flexible"](model, batch), real)


@pytest.mark.parametrize(("flags", "length"), [
    ([], 40), (["--average_embeddings"], 40), (["--trainable_token_pos", "first", "--average_embeddings"], 40),
    (["--trainable_token_pos", "first"], None), (["--trainable_token_pos", "flexible"], None),
    (["--trainable_token_pos", "flexible", "--average_embeddings"], None)])
def test_padding_reaches_the_full_length_where_the_class_is_read_from_it(
        tiny_gpt, data_dir, flags, length):
    *_, train, validation, test = train_gpt.build(train_gpt.parse_args(
        ["--model_size", tiny_gpt, "--weights", "random", "--data_dir", str(data_dir), "--context_length", "40",
         *flags]))
    assert {dataset.pad_to for dataset in (train, validation, test)} == {length}


def test_context_lengths(tiny_gpt, data_dir, failing):
    command = ["--model_size", tiny_gpt, "--weights", "random", "--data_dir", str(data_dir), "--context_length"]
    texts = reviews(48)["text"]
    (data_dir / "train.csv").write_text("text,label\n" + "".join(f"{text[:50]},{i % 2}\n"
                                                                     for i, text in enumerate(texts)))
    for value, longest in (("30", 30), ("longest_training_example", 50), ("model_context_length", 50)):
        *_, train, validation, test = train_gpt.build(train_gpt.parse_args([*command, value]))
        assert train.lengths.max() == longest
    assert "65 is more than the 64 tokens" in failing(train_gpt.main, *command, "65")


def test_a_review_that_spells_out_a_special_token_is_text(byte_tokenizer):
    encode = train_gpt.wrap(train_gpt.load_encoding()).encode
    assert encode(["<|endoftext|>", "ab"], None) == [list(b"<|endoftext|>"), [97, 98]]
    assert encode(["abc"], 2) == [[97, 98]]


@pytest.mark.skipif("TIKTOKEN_CACHE_DIR" not in os.environ, reason="TIKTOKEN_CACHE_DIR names no cached tokenizer")
def test_the_real_tokenizer():
    assert train_gpt.wrap(train_gpt.load_encoding()).encode(["Hello, I am"], None) == [[15496, 11, 314, 716]]


def test_no_tokenizer_and_no_network(monkeypatch):
    def unreachable(name):
        raise ConnectionError("no network")
    monkeypatch.setattr("tiktoken.get_encoding", unreachable)
    with pytest.raises(UserError, match="TIKTOKEN_CACHE_DIR"):
        train_gpt.load_encoding()


def test_published_defaults():
    args = train_gpt.parse_args([])
    assert (args.model_size, args.weights, args.trainable_layers, args.trainable_token_pos) == (
        "gpt2-small (124M)", "pretrained", "last_block", "last")
    assert (args.context_length, args.num_epochs, args.learning_rate, args.batch_size, args.seed) == (
        256, 1, 5e-5, 8, 123)
    assert (args.eval_freq, args.eval_iter, args.average_embeddings, args.optimizer) == (50, 20, False, "adamw")
    assert json.loads(json.dumps(vars(args)))  # a record can hold them


def test_a_gpt_of_ones_own(data_dir, tmp_path, failing, capsys):
    """A folder with a configuration and a tokenizer takes the place of a published size."""
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**train_gpt.BASE_CONFIG, "vocab_size": 257, "context_length": 64,
                                                    "emb_dim": 8, "n_layers": 2, "n_heads": 2}))
    write_encoding(tiktoken.Encoding("bytes", pat_str=".", mergeable_ranks={bytes([i]): i for i in range(256)},
                                     special_tokens={}), folder / "tokenizer.tiktoken")
    command = ["--model_size", str(folder), "--data_dir", str(data_dir), "--output_dir", str(tmp_path / "run"),
               "--context_length", "32"]
    train_gpt.main([*command, "--weights", "random"])
    capsys.readouterr()
    assert records.read_record(tmp_path / "run")["name"] == "own-last_block-context_length_32-weights_random-seed123"
    assert "add --weights random" in failing(train_gpt.main, *command)
    config = json.loads((folder / "config.json").read_text())
    for damaged in ({}, [], {**config, "n_heads": 3}, {**config, "vocab_size": "many"}, {**config, "drop_rate": 2}):
        (folder / "config.json").write_text(json.dumps(damaged))
        assert "config.json is no GPT's configuration" in failing(train_gpt.main, *command)
    (folder / "config.json").unlink()
    assert "invalid choice" in failing(train_gpt.main, *command)
