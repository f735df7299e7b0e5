import json
import os
import re

import pytest
import tiktoken
import torch
from helpers import FINAL_LOG_PATTERNS, load_task, make_reviews, tiny_gpt_flags
from transformers import GPT2Config, GPT2LMHeadModel

import train_gpt
from finetuning.data.batching import IMDbDataset
from finetuning.data.tiktoken_bpe import dump_tiktoken_bpe
from finetuning.data.tokenization import concatenate
from finetuning.performance import cpu_kernels
from finetuning.performance.gpt_classifier import GPTClassifier
from finetuning.reporting import records
from finetuning.system.errors import UserError
from gpt_download import REPOSITORIES
from previous_chapters import GPTModel


def test_main_prints_the_published_lines_and_writes_a_record(tiny_gpt, data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["--model_size", tiny_gpt, "--weights", "random", "--trainable_layers", "all"]
    logs = []
    for _ in range(2):
        train_gpt.main([*command, "--context_length", "32", "--precision", "fp32"])
        logs.append(capsys.readouterr().out.splitlines())
    first, second = ([line for line in log if "minutes" not in line] for log in logs)
    assert first == second
    for line, pattern in zip(logs[0][-7:], FINAL_LOG_PATTERNS, strict=True):
        assert re.fullmatch(pattern, line), line
    assert torch.get_float32_matmul_precision() == "highest"  # TF32 is off by default
    record = records.read_record("results/gpt2-tiny-0M-all-context_length_32-weights_random-precision_fp32-seed123")
    assert record["parameters"]["total"] == record["parameters"]["trainable"]
    assert (len(record["losses"]), record["reviews"]) == (6, {"train": 48, "validation": 16, "test": 20})
    assert f"Test accuracy: {record['accuracy']['test']:.2%}" == logs[0][-1]
    assert record["precision"] == {"dtype": "fp32", "reason": "as requested"}
    assert record["command"].startswith("python ")
    assert set(record["data"]) == {"train.csv", "validation.csv", "test.csv"}


def test_order_of_reviews_depends_on_the_seed_alone(tiny_gpt, data_dir, tmp_path, monkeypatch):
    """Random numbers drawn while the model is built do not change the batches."""
    replace_head, losses = train_gpt.replace_head, []
    for num_draws in (0, 7):

        def replace_head_and_draw(model, seed, num_draws=num_draws):
            layers = replace_head(model, seed)
            torch.rand(num_draws)
            return layers

        monkeypatch.setattr(train_gpt, "replace_head", replace_head_and_draw)
        train_gpt.main([*tiny_gpt_flags(tiny_gpt, data_dir, tmp_path / str(num_draws)), "--precision", "fp32"])
        losses.append(records.read_record(tmp_path / str(num_draws))["losses"])
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 6


def test_main_loads_pretrained_weights_by_hub_id(tiny_gpt, data_dir, tmp_path, hub_snapshot, monkeypatch):
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(n_positions=64, n_embd=8, n_head=2, n_layer=2))
    gpt2.transformer.save_pretrained(hub_snapshot("someone/tiny"))
    monkeypatch.setitem(REPOSITORIES, "0M", "someone/tiny")
    model = train_gpt.instantiate_model(tiny_gpt)
    assert torch.equal(model.tok_emb.weight, gpt2.transformer.wte.weight)
    folders = ["--data_dir", str(data_dir), "--output_dir", str(tmp_path / "run")]
    train_gpt.main(["--model_size", tiny_gpt, *folders, "--max_steps", "1", "--context_length", "16"])
    name = records.read_record(tmp_path / "run")["name"]
    assert name == "gpt2-tiny-0M-last_block-context_length_16-max_steps_1-seed123"


def test_main_refuses_a_checkpoint_of_another_size(tiny_gpt, data_dir, hub_snapshot, monkeypatch, failing):
    gpt2 = GPT2LMHeadModel(GPT2Config(n_positions=64, n_embd=16, n_head=2, n_layer=2))
    gpt2.transformer.save_pretrained(hub_snapshot("someone/tiny"))
    monkeypatch.setitem(REPOSITORIES, "0M", "someone/tiny")
    message = failing(train_gpt.main, "--model_size", tiny_gpt, "--data_dir", data_dir)
    assert "does not fit gpt2-tiny (0M)" in message


def test_random_weights_and_head_are_those_of_the_published_code(tiny_gpt):
    model = train_gpt.instantiate_model(tiny_gpt, "random", seed=123)
    torch.manual_seed(123)
    expected = GPTModel(train_gpt.BASE_CONFIG | train_gpt.MODEL_CONFIGS[tiny_gpt])
    assert torch.equal(model.trf_blocks[1].ff.layers[0].weight, expected.trf_blocks[1].ff.layers[0].weight)
    torch.rand(7)
    train_gpt.replace_head(model, seed=123)
    torch.manual_seed(123)
    assert torch.equal(model.out_head.weight, torch.nn.Linear(8, 2).weight)


@pytest.fixture
def pooling_case(tiny_gpt):
    """A GPTClassifier, a padded batch of reviews of 3, 1 and 5 tokens, and the book model's logits at all positions."""
    model = train_gpt.instantiate_model(tiny_gpt, "random").eval()
    train_gpt.replace_head(model, 0)
    encoded = concatenate([[5, 6, 7], [8], [1, 2, 3, 4, 5]], [1, 0, 1])
    batch = IMDbDataset(encoded, 50256, pad_to=6).collate([0, 1, 2])
    with torch.no_grad():
        yield GPTClassifier(model), batch, model(batch.input_ids)


@pytest.mark.parametrize(("position", "indices"), [("last", [5, 5, 5]), ("first", [0, 0, 0]), ("flexible", [2, 0, 4])])
def test_pooling_returns_the_logits_of_the_chosen_token(pooling_case, position, indices):
    model, batch, logits = pooling_case
    torch.testing.assert_close(train_gpt.POOLING[position, False](model, batch), logits[[0, 1, 2], indices])


def test_last_non_padding_logits_of_packed_and_padded_batches_are_equal(pooling_case, monkeypatch):
    """Batches are packed on a CPU and padded on a GPU."""
    model, batch, _ = pooling_case
    padded = model(batch.input_ids, batch.lengths[:, None] - 1)[:, 0]
    for multiple in (1, 64):  # without and with filler
        monkeypatch.setattr(cpu_kernels, "ROW_MULTIPLE", multiple)
        torch.testing.assert_close(train_gpt.last_non_padding_logits(model, batch), padded)


def test_pooling_averages_only_non_padding_tokens_with_flexible(pooling_case):
    model, batch, logits = pooling_case
    torch.testing.assert_close(train_gpt.POOLING["last", True](model, batch), logits.mean(dim=1))
    torch.testing.assert_close(train_gpt.POOLING["first", True](model, batch), logits.mean(dim=1))
    expected = torch.stack([logits[0, :3].mean(0), logits[1, :1].mean(0), logits[2, :5].mean(0)])
    torch.testing.assert_close(train_gpt.POOLING["flexible", True](model, batch), expected)


@pytest.mark.parametrize(
    ("flags", "length"),
    [
        ([], 40),
        (["--average_embeddings"], 40),
        (["--trainable_token_pos", "first", "--average_embeddings"], 40),
        (["--trainable_token_pos", "first"], None),
        (["--trainable_token_pos", "flexible"], None),
        (["--trainable_token_pos", "flexible", "--average_embeddings"], None),
    ],
)
def test_main_pads_to_the_full_length_only_if_pooling_reads_the_padding(tiny_gpt, data_dir, flags, length):
    options = ["--model_size", tiny_gpt, "--weights", "random", "--data_dir", data_dir, "--context_length", "40"]
    _, train, validation, test = load_task(train_gpt, *options, *flags)
    assert {dataset.pad_to for dataset in (train, validation, test)} == {length}


def test_main_truncates_reviews_to_the_context_length(tiny_gpt, data_dir, failing):
    command = ["--model_size", tiny_gpt, "--weights", "random", "--data_dir", data_dir, "--context_length"]
    rows = [f"{text[:50]},{i % 2}\n" for i, text in enumerate(make_reviews(48)["text"])]
    (data_dir / "train.csv").write_text("text,label\n" + "".join(rows))
    for value, longest in (("30", 30), ("longest_training_example", 50), ("model_context_length", 50)):
        _, train, *_ = load_task(train_gpt, *command, value)
        assert train.lengths.max() == longest
    assert "65 is more than the 64 tokens" in failing(train_gpt.main, *command, "65")


def test_tokenizer_reads_special_tokens_in_a_review_as_text(byte_tokenizer):
    encode = train_gpt.make_tokenizer(train_gpt.load_encoding()).encode
    assert encode(["<|endoftext|>", "ab"], None) == [list(b"<|endoftext|>"), [97, 98]]
    assert encode(["abc"], 2) == [[97, 98]]


@pytest.mark.skipif("TIKTOKEN_CACHE_DIR" not in os.environ, reason="TIKTOKEN_CACHE_DIR names no cached tokenizer")
def test_tokenizer_returns_the_published_ids():
    assert train_gpt.make_tokenizer(train_gpt.load_encoding()).encode(["Hello, I am"], None) == [[15496, 11, 314, 716]]


def test_load_encoding_without_network_names_the_cache_variable(monkeypatch):
    def unreachable(name):
        raise ConnectionError("no network")

    monkeypatch.setattr("tiktoken.get_encoding", unreachable)
    with pytest.raises(UserError, match="TIKTOKEN_CACHE_DIR"):
        train_gpt.load_encoding()


def test_parse_args_has_the_published_defaults():
    args = train_gpt.parse_args([])
    assert (args.model_size, args.weights, args.trainable_layers) == ("gpt2-small (124M)", "pretrained", "last_block")
    assert (args.trainable_token_pos, args.average_embeddings) == ("last", False)
    assert (args.context_length, args.num_epochs, args.learning_rate) == (256, 1, 5e-5)
    assert (args.batch_size, args.seed) == (8, 123)
    assert (args.eval_freq, args.eval_iter, args.optimizer) == (50, 20, "adamw")


def test_parsed_arguments_are_serializable_as_json():
    assert json.loads(json.dumps(vars(train_gpt.parse_args([]))))


@pytest.fixture
def model_folder(data_dir):
    """A model folder as --model_size accepts it: a configuration and a tokenizer of single bytes."""
    folder = data_dir / "own"
    folder.mkdir()
    size = {"vocab_size": 257, "context_length": 64, "emb_dim": 8, "n_layers": 2, "n_heads": 2}
    (folder / "config.json").write_text(json.dumps(train_gpt.BASE_CONFIG | size))
    ranks = {bytes([i]): i for i in range(256)}
    encoding = tiktoken.Encoding("bytes", pat_str=".", mergeable_ranks=ranks, special_tokens={})
    dump_tiktoken_bpe(encoding, folder / "tokenizer.tiktoken")
    return folder


def test_main_trains_a_model_folder_from_random_weights(model_folder, data_dir, tmp_path):
    folders = ["--model_size", str(model_folder), "--data_dir", str(data_dir), "--output_dir", str(tmp_path / "run")]
    train_gpt.main([*folders, "--context_length", "32", "--weights", "random"])
    assert records.read_record(tmp_path / "run")["name"] == "own-last_block-context_length_32-weights_random-seed123"


def test_main_refuses_a_model_folder_without_published_weights(model_folder, data_dir, failing):
    command = ["--model_size", model_folder, "--data_dir", data_dir, "--output_dir", data_dir / "run"]
    assert "add --weights random" in failing(train_gpt.main, *command)


def test_main_refuses_a_model_folder_with_an_invalid_configuration(model_folder, data_dir, failing):
    command = ["--model_size", model_folder, "--data_dir", data_dir, "--output_dir", data_dir / "run"]
    path = model_folder / "config.json"
    config = json.loads(path.read_text())
    changes = (
        {"n_heads": 3},
        {"n_heads": 2.0},
        {"vocab_size": "many"},
        {"drop_rate": 2},
        *({key: 0} for key in train_gpt.SIZES),
    )
    for invalid in ({}, [], *({**config, **change} for change in changes)):
        path.write_text(json.dumps(invalid))
        assert "config.json is not a valid GPT configuration" in failing(train_gpt.main, *command)
    path.unlink()
    assert "invalid choice" in failing(train_gpt.main, *command)
