import re

import pandas as pd
import pytest
import torch
import transformers
from conftest import SIZES, TINY_CONFIGS, save_encoder, tiny_tokenizer
from safetensors.torch import load_file, save_file
from test_train_gpt import FINAL_LINES
from transformers import AutoModelForSequenceClassification

import train_bert_hf
from finetuning import records, saved
from finetuning.batches import IMDbDataset
from finetuning.errors import UserError
from finetuning.loop import Classifier, predict
from finetuning.saved import read_settings
from finetuning.tokens import flatten

QUICK = ["--context_length", "24", "--precision", "fp32"]


@pytest.mark.parametrize("name", train_bert_hf.MODELS)
def test_each_model_of_the_table_by_its_hub_id(name, data_dir, tmp_path, hub_snapshot, capsys):
    save_encoder(hub_snapshot(train_bert_hf.MODELS[name].hub_id), TINY_CONFIGS[name])
    command = ["--model", name, "--data_dir", str(data_dir), "--output_dir", str(tmp_path / "run"), *QUICK]
    printed = []
    for _ in range(2):
        train_bert_hf.main(command)
        printed.append([line for line in capsys.readouterr().out.splitlines() if "minutes" not in line])
    assert printed[0] == printed[1]
    for line, pattern in zip(printed[0][-6:], FINAL_LINES[1:], strict=True):
        assert re.fullmatch(pattern, line), line
    record = records.read_record(tmp_path / "run")
    assert record["name"] == f"{name}-all-context_length_24-precision_fp32-seed123"
    assert len(record["losses"]) == 6
    assert len(set(record["losses"])) == 6


def test_a_saved_model_of_the_table_names_its_hub_id_as_base_model(data_dir, tmp_path, hub_snapshot):
    save_encoder(hub_snapshot(train_bert_hf.MODELS["bert"].hub_id), TINY_CONFIGS["bert"])
    train_bert_hf.main(["--model", "bert", "--data_dir", str(data_dir), "--output_dir", str(tmp_path / "run"),
                        "--max_steps", "1", "--save_model", *QUICK])
    _, settings = saved.read_settings(tmp_path / "run")
    assert settings["base_model"] == "google-bert/bert-base-uncased"


@pytest.mark.parametrize("mode", ["all", "last_block", "last_layer"])
def test_a_local_folder_of_a_model_that_is_not_in_the_table(mode, data_dir, tmp_path):
    config = transformers.ElectraConfig(vocab_size=21, hidden_size=16, embedding_size=16, num_hidden_layers=2,
                                        num_attention_heads=2, intermediate_size=32, max_position_embeddings=32)
    save_encoder(tmp_path / "electra", config)
    train_bert_hf.main(["--model", str(tmp_path / "electra"), "--trainable_layers", mode, "--data_dir", str(data_dir),
                        "--output_dir", str(tmp_path / "run"), "--max_steps", "2", *QUICK])
    record = records.read_record(tmp_path / "run")
    assert record["name"] == f"electra-{mode}-context_length_24-max_steps_2-precision_fp32-seed123"
    assert (record["parameters"]["trainable"] == record["parameters"]["all"]) == (mode == "all")


def test_weights_stored_in_half_precision_are_loaded_as_float32(tmp_path):
    save_encoder(tmp_path, TINY_CONFIGS["deberta-v3-base"], dtype=torch.float16)
    assert load_file(tmp_path / "model.safetensors")["deberta.embeddings.word_embeddings.weight"].dtype == torch.float16
    model, _ = train_bert_hf.load_model(str(tmp_path), seed=123)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_the_seed_decides_the_new_layers_and_the_checkpoint_the_others(tmp_path, capsys):
    save_encoder(tmp_path, TINY_CONFIGS["distilbert"])
    first, second, other = (train_bert_hf.load_model(str(tmp_path), seed)[0].state_dict() for seed in (123, 123, 7))
    stored = load_file(tmp_path / "model.safetensors")
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name])
        assert torch.equal(tensor, other[name]) == (name not in {
            "pre_classifier.weight", "classifier.weight", "classifier.bias"})
        if name in stored:
            assert torch.equal(tensor, stored[name])
    assert "New layers: classifier, pre_classifier" in capsys.readouterr().err


@pytest.mark.parametrize("name", train_bert_hf.MODELS)
def test_the_new_head_is_the_published_one(name, hub_snapshot):
    """Every weight is that of the published code, which draws its random numbers in this order."""
    hub_id = train_bert_hf.MODELS[name].hub_id
    save_encoder(hub_snapshot(hub_id), TINY_CONFIGS[name])
    torch.manual_seed(123)
    published = AutoModelForSequenceClassification.from_pretrained(hub_id, num_labels=2)
    if name == "roberta":
        published.classifier.out_proj = torch.nn.Linear(published.config.hidden_size, 2)
    elif name != "distilbert":
        published.classifier = torch.nn.Linear(published.config.hidden_size, 2)
    torch.manual_seed(5)  # which is of no account
    model, _ = train_bert_hf.load_model(name, seed=123)
    expected, found = published.state_dict(), model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())
    assert all(module.p == published.get_submodule(path).p for path, module in model.named_modules()
               if isinstance(module, torch.nn.Dropout))


def test_the_head_and_the_habits_of_a_finished_classifier_are_not_kept(tmp_path, data_dir, capsys):
    """One of several labels at once, label 0 the positive one, that returns tuples of all hidden states."""
    config = transformers.BertConfig(**SIZES, id2label={0: "POSITIVE", 1: "NEGATIVE"}, return_dict=False,
                                     problem_type="multi_label_classification", output_hidden_states=True)
    save_encoder(tmp_path / "model", config, kind=AutoModelForSequenceClassification)
    train_bert_hf.main(["--model", str(tmp_path / "model"), "--data_dir", str(data_dir), "--max_steps", "1",
                        "--output_dir", str(tmp_path / "run"), "--save_model", *QUICK])
    assert "New layers: classifier\n" in capsys.readouterr().err
    saved = transformers.AutoConfig.from_pretrained(tmp_path / "run" / "model")
    assert (saved.problem_type, saved.num_labels) == ("single_label_classification", 2)
    assert saved.id2label == {0: "negative", 1: "positive"}
    model, _ = train_bert_hf.load_model(str(tmp_path / "model"), seed=123)
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, stored[key])} == {
        "classifier.weight", "classifier.bias"}
    recorded = records.read_predictions(tmp_path / "run", records.read_record(tmp_path / "run"))["probability"]
    classify = transformers.pipeline("text-classification", str(tmp_path / "run" / "model"), top_k=None)
    text = pd.read_csv(data_dir / "test.csv")["text"][0]
    assert {row["label"]: row["score"] for row in classify([text], truncation=True)[0]}["positive"] == pytest.approx(
        recorded[0], abs=1e-6)


def test_a_model_that_reads_the_last_token_is_padded_on_the_left(tmp_path, data_dir):
    config = transformers.XLNetConfig(vocab_size=21, d_model=16, n_layer=2, n_head=2, d_inner=32, pad_token_id=0,
                                      initializer_range=0.5)
    save_encoder(tmp_path / "model", config, kind=transformers.AutoModelForCausalLM)
    train_bert_hf.main(["--model", str(tmp_path / "model"), "--data_dir", str(data_dir), "--max_steps", "2",
                        "--output_dir", str(tmp_path / "run"), "--save_model", *QUICK])
    recorded = records.read_predictions(tmp_path / "run", records.read_record(tmp_path / "run"))["probability"]
    folder, settings = read_settings(tmp_path / "run")
    assert settings["padding_side"] == "left"
    model, read_logits, dataset = train_bert_hf.load_saved(folder, settings)
    classifier = Classifier(model, read_logits, torch.device("cpu"))
    texts = pd.read_csv(data_dir / "test.csv")["text"].tolist()
    for found in (predict(dataset(texts), classifier),
                  torch.cat([predict(dataset([text]), classifier) for text in texts])):
        assert found.softmax(dim=-1)[:, 1].tolist() == pytest.approx(recorded.tolist(), abs=1e-5)
    assert recorded.std() > 1e-3
    assert transformers.AutoTokenizer.from_pretrained(folder).padding_side == "left"


def test_a_model_that_reads_the_padding_is_refused_but_without_a_mask(tmp_path, data_dir, failing):
    save_encoder(tmp_path / "model", transformers.FNetConfig(**SIZES, initializer_range=0.5))
    command = ["--model", tmp_path / "model", "--data_dir", data_dir, "--max_steps", "1", "--output_dir",
               tmp_path / "run", *QUICK]
    with pytest.raises(UserError, match="depend on how much padding a batch has; with --use_attention_mask false"):
        train_bert_hf.main([str(argument) for argument in command])
    assert not (tmp_path / "run").exists()
    train_bert_hf.main([str(argument) for argument in [*command, "--use_attention_mask", "false"]])


def test_a_model_that_does_not_compute_in_bf16(tmp_path, data_dir):
    save_encoder(tmp_path / "model", transformers.DebertaConfig(
        **SIZES, relative_attention=True, pos_att_type=["c2p", "p2c"]))
    command = ["--model", str(tmp_path / "model"), "--data_dir", str(data_dir), "--max_steps", "1", "--output_dir",
               str(tmp_path / "run"), "--context_length", "24", "--precision"]
    with pytest.raises(UserError, match="does not compute in bf16 .*; use --precision fp32"):
        train_bert_hf.main([*command, "bf16"])
    train_bert_hf.main([*command, "fp32"])


def test_embeddings_of_a_class_of_their_own(tmp_path):
    save_encoder(tmp_path, transformers.IBertConfig(**SIZES, pad_token_id=1))
    model, _ = train_bert_hf.load_model(str(tmp_path), seed=123)
    assert not isinstance(model.get_input_embeddings(), torch.nn.Embedding)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["ibert.embeddings.word_embeddings.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="ibert.embeddings.word_embeddings.weight, are missing"):
        train_bert_hf.load_model(str(tmp_path), seed=123)


def test_a_head_of_another_size_is_replaced(tmp_path):
    config = transformers.BertConfig(**TINY_CONFIGS["bert"].to_dict() | {"num_labels": 3})
    save_encoder(tmp_path, config, kind=transformers.AutoModelForSequenceClassification)
    model, _ = train_bert_hf.load_model(str(tmp_path), seed=123)
    assert model.classifier.weight.shape == (2, 16)


@pytest.mark.parametrize("change", ["missing", "misshapen"])
def test_a_checkpoint_without_some_pretrained_weights_is_refused(tmp_path, change):
    save_encoder(tmp_path, TINY_CONFIGS["bert"])
    tensors = load_file(tmp_path / "model.safetensors")
    name = "bert.encoder.layer.1.output.dense.weight"
    tensor = tensors.pop(name)
    if change == "misshapen":
        tensors[name] = tensor[:8].clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=name):
        train_bert_hf.load_model(str(tmp_path), seed=123)


def test_a_truncated_checkpoint_is_refused(tmp_path, data_dir, failing):
    save_encoder(tmp_path / "model", TINY_CONFIGS["bert"])
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    message = failing(train_bert_hf.main, "--model", tmp_path / "model", "--data_dir", data_dir)
    assert f"cannot load --model {tmp_path / 'model'}" in message


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_padding_under_the_mask_changes_nothing(name):
    config = TINY_CONFIGS[name]
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    ids = train_bert_hf.wrap(tiny_tokenizer(config.pad_token_id)).encode(
        ["a film", "the plot was very good and fine", "a dull cast"], 24)

    def logits(**padding):
        batch = IMDbDataset(flatten(ids, [0, 1, 0]), config.pad_token_id, **padding).batch([0, 1, 2])
        with torch.no_grad():
            return train_bert_hf.read_logits(model, batch)
    longest = logits(use_attention_mask=True)
    torch.testing.assert_close(longest, logits(use_attention_mask=True, pad_to=24))
    assert (longest - logits(pad_to=24))[0].abs().max() > 1e-6  # without the mask, padding is attended to
    alone = IMDbDataset(flatten(ids, [0, 1, 0]), config.pad_token_id, use_attention_mask=True).batch([0])
    with torch.no_grad():
        torch.testing.assert_close(train_bert_hf.read_logits(model, alone), longest[:1])


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_bf16_arithmetic_stays_close_to_fp32(name):
    config = TINY_CONFIGS[name]
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    ids = train_bert_hf.wrap(tiny_tokenizer(config.pad_token_id)).encode(["a good film", "the plot was very dull"], 24)
    dataset = IMDbDataset(flatten(ids, [1, 0]), config.pad_token_id, use_attention_mask=True)
    logits = [predict(dataset, Classifier(model, train_bert_hf.read_logits, torch.device("cpu"), precision))
              for precision in ("fp32", "bf16")]
    torch.testing.assert_close(*logits, rtol=0, atol=0.02)
    assert not torch.equal(*logits)


def test_without_the_mask_reviews_are_padded_to_the_full_length(data_dir, tmp_path):
    save_encoder(tmp_path / "model", TINY_CONFIGS["bert"])
    for mask, pad_to in (("true", None), ("false", 24)):
        *_, test = train_bert_hf.build(train_bert_hf.parse_args(
            ["--model", str(tmp_path / "model"), "--data_dir", str(data_dir), "--use_attention_mask", mask, *QUICK]))
        assert (test.pad_to, test.use_attention_mask) == (pad_to, mask == "true")


@pytest.mark.parametrize(("name", "limit"), [("bert", 40), ("distilbert", 40), ("roberta", 38),
                                             ("deberta-v3-base", 40), ("modernbert-base", 40)])
def test_the_longest_input(name, limit):
    """RoBERTa's first position comes after its padding index, 1, so that two of 40 are lost."""
    config = TINY_CONFIGS[name]
    model = AutoModelForSequenceClassification.from_config(config).eval()
    tokenizer = tiny_tokenizer(config.pad_token_id)
    assert train_bert_hf.longest_input(model, tokenizer) == limit
    model(input_ids=torch.full((1, limit), 7))
    tokenizer.model_max_length = 30
    assert train_bert_hf.longest_input(model, tokenizer) == 30


def test_cutting_a_review_keeps_its_special_tokens():
    encode = train_bert_hf.wrap(tiny_tokenizer()).encode
    assert encode(["the a film plot"], None) == [[2, 5, 6, 7, 8, 3]]
    assert encode(["the a film plot"], 4) == [[2, 5, 6, 3]]


def test_published_defaults():
    args = train_bert_hf.parse_args([])
    assert (args.model, args.trainable_layers, args.use_attention_mask) == ("distilbert", "all", "true")
    assert (args.context_length, args.num_epochs, args.learning_rate, args.batch_size, args.seed) == (
        256, 1, 5e-6, 8, 123)
    assert (args.eval_freq, args.eval_iter, args.optimizer) == (50, 20, "adamw")
