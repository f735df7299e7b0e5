import re

import pandas as pd
import pytest
import torch
import transformers
from helpers import FINAL_LOG_PATTERNS, load_task
from safetensors.torch import load_file
from tiny_models import TINY_CONFIGS, TINY_SIZES, save_encoder, tiny_tokenizer
from transformers import AutoModelForSequenceClassification

import train_bert_hf
from finetuning.data.batching import IMDbDataset
from finetuning.data.hf_tokenizer import make_encode
from finetuning.data.tokenization import concatenate
from finetuning.performance.inference import Classifier, predict_logits
from finetuning.reporting import records
from finetuning.reporting.saved_models import read_settings
from finetuning.system.errors import UserError

QUICK = ["--context_length", "24", "--precision", "fp32"]


def command(model, data_dir, output_dir, *options):
    return ["--model", str(model), "--data_dir", str(data_dir), "--output_dir", str(output_dir), *QUICK, *options]


def recorded_probabilities(run_folder):
    """Return the test probabilities that a run recorded."""
    return records.read_predictions(run_folder, records.read_record(run_folder))["probability"].tolist()


@pytest.mark.parametrize("name", train_bert_hf.MODELS)
def test_main_finetunes_each_published_model_reproducibly(name, data_dir, tmp_path, hub_snapshot, capsys):
    save_encoder(hub_snapshot(train_bert_hf.MODELS[name].hub_id), TINY_CONFIGS[name])
    logs = []
    for _ in range(2):
        train_bert_hf.main(command(name, data_dir, tmp_path / "run"))
        logs.append([line for line in capsys.readouterr().out.splitlines() if "minutes" not in line])
    assert logs[0] == logs[1]
    for line, pattern in zip(logs[0][-6:], FINAL_LOG_PATTERNS[1:], strict=True):
        assert re.fullmatch(pattern, line), line
    record = records.read_record(tmp_path / "run")
    assert record["name"] == f"{name}-all-context_length_24-precision_fp32-seed123"
    assert len(record["losses"]) == 6
    assert len(set(record["losses"])) == 6


def test_saved_model_of_the_table_names_its_hub_id_as_base_model(data_dir, tmp_path, hub_snapshot):
    save_encoder(hub_snapshot(train_bert_hf.MODELS["bert"].hub_id), TINY_CONFIGS["bert"])
    train_bert_hf.main(command("bert", data_dir, tmp_path / "run", "--max_steps", "1", "--save_model"))
    _, settings = read_settings(tmp_path / "run")
    assert settings["base_model"] == "google-bert/bert-base-uncased"


@pytest.mark.parametrize(("model", "mask", "expected"), [("bert", "true", True), ("bert", "false", False),
                                                          ("electra", "true", False)])  # fmt: skip
def test_only_models_of_the_table_that_mask_padding_skip_it(model, mask, expected, data_dir, tmp_path, hub_snapshot):
    """A model outside the table may pool padding positions."""
    save_encoder(hub_snapshot(train_bert_hf.MODELS["bert"].hub_id), TINY_CONFIGS["bert"])
    save_encoder(tmp_path / "electra", transformers.ElectraConfig(**TINY_SIZES | {"embedding_size": 16}))
    name = model if model in train_bert_hf.MODELS else tmp_path / model
    arguments = ["--model", name, "--data_dir", data_dir, "--use_attention_mask", mask, *QUICK]
    task, *_ = load_task(train_bert_hf, *arguments)
    assert task.skip_padding == expected


@pytest.mark.parametrize("mode", ["all", "last_block", "last_layer"])
def test_main_finetunes_a_local_folder_of_another_architecture(mode, data_dir, tmp_path):
    save_encoder(tmp_path / "electra", transformers.ElectraConfig(**TINY_SIZES | {"embedding_size": 16}))
    options = ["--trainable_layers", mode, "--max_steps", "2"]
    train_bert_hf.main(command(tmp_path / "electra", data_dir, tmp_path / "run", *options))
    record = records.read_record(tmp_path / "run")
    assert record["name"] == f"electra-{mode}-context_length_24-max_steps_2-precision_fp32-seed123"
    assert (record["parameters"]["trainable"] == record["parameters"]["total"]) == (mode == "all")


def test_main_overrides_the_head_and_settings_of_another_classifier(tmp_path, data_dir, capsys):
    """The other one is a multi-label classifier whose label 0 is positive and which returns tuples."""
    config = transformers.BertConfig(
        **TINY_SIZES,
        id2label={0: "POSITIVE", 1: "NEGATIVE"},
        return_dict=False,
        problem_type="multi_label_classification",
        output_hidden_states=True,
    )
    model, run = tmp_path / "model", tmp_path / "run"
    save_encoder(model, config, kind=AutoModelForSequenceClassification)
    train_bert_hf.main(command(model, data_dir, run, "--max_steps", "1", "--save_model"))
    assert "Randomly initialized layers: classifier\n" in capsys.readouterr().err
    saved = transformers.AutoConfig.from_pretrained(run / "model")
    assert (saved.problem_type, saved.num_labels) == ("single_label_classification", 2)
    assert saved.id2label == {0: "negative", 1: "positive"}
    loaded, _ = train_bert_hf.load_pretrained(str(model), seed=123)
    stored = load_file(model / "model.safetensors")
    changed = {key for key, tensor in loaded.state_dict().items() if not torch.equal(tensor, stored[key])}
    assert changed == {"classifier.weight", "classifier.bias"}
    classify = transformers.pipeline("text-classification", str(run / "model"), top_k=None)
    text = pd.read_csv(data_dir / "test.csv")["text"][0]
    scores = {result["label"]: result["score"] for result in classify([text], truncation=True)[0]}
    assert scores["positive"] == pytest.approx(recorded_probabilities(run)[0], abs=1e-6)


def test_main_pads_a_model_that_reads_the_last_token_on_the_left(tmp_path, data_dir):
    config = transformers.XLNetConfig(
        vocab_size=21, d_model=16, n_layer=2, n_head=2, d_inner=32, pad_token_id=0, initializer_range=0.5
    )
    save_encoder(tmp_path / "model", config, kind=transformers.AutoModelForCausalLM)
    train_bert_hf.main(command(tmp_path / "model", data_dir, tmp_path / "run", "--max_steps", "2", "--save_model"))
    recorded = recorded_probabilities(tmp_path / "run")
    folder, settings = read_settings(tmp_path / "run")
    assert settings["padding_side"] == "left"
    model, pooling, to_dataset = train_bert_hf.load_finetuned(folder, settings)
    classifier = Classifier(model, pooling, torch.device("cpu"))
    texts = pd.read_csv(data_dir / "test.csv")["text"].tolist()
    together = predict_logits(to_dataset(texts), classifier)
    alone = torch.cat([predict_logits(to_dataset([text]), classifier) for text in texts])
    for logits in (together, alone):
        assert logits.softmax(dim=-1)[:, 1].tolist() == pytest.approx(recorded, abs=1e-5)
    assert torch.tensor(recorded).std() > 1e-3
    assert transformers.AutoTokenizer.from_pretrained(folder).padding_side == "left"


def test_main_refuses_a_model_that_ignores_the_mask_unless_lengths_are_equal(tmp_path, data_dir):
    save_encoder(tmp_path / "model", transformers.FNetConfig(**TINY_SIZES, initializer_range=0.5))
    arguments = command(tmp_path / "model", data_dir, tmp_path / "run", "--max_steps", "1")
    with pytest.raises(UserError, match="depend on how much padding a batch has; with --use_attention_mask false"):
        train_bert_hf.main(arguments)
    assert not (tmp_path / "run").exists()
    train_bert_hf.main([*arguments, "--use_attention_mask", "false"])


def test_main_refuses_bf16_for_a_model_that_does_not_support_it(tmp_path, data_dir):
    config = transformers.DebertaConfig(**TINY_SIZES, relative_attention=True, pos_att_type=["c2p", "p2c"])
    save_encoder(tmp_path / "model", config)
    arguments = command(tmp_path / "model", data_dir, tmp_path / "run", "--max_steps", "1")
    with pytest.raises(UserError, match=r"does not compute in bf16 .*; use --precision fp32"):
        train_bert_hf.main([*arguments, "--precision", "bf16"])
    train_bert_hf.main(arguments)


def test_main_reports_a_truncated_checkpoint_in_one_line(tmp_path, data_dir, failing):
    save_encoder(tmp_path / "model", TINY_CONFIGS["bert"])
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    message = failing(train_bert_hf.main, "--model", tmp_path / "model", "--data_dir", data_dir)
    assert f"cannot load --model {tmp_path / 'model'}" in message


def test_main_pads_to_the_full_length_without_an_attention_mask(data_dir, tmp_path):
    save_encoder(tmp_path / "model", TINY_CONFIGS["bert"])
    for mask, pad_to in (("true", None), ("false", 24)):
        options = ["--model", tmp_path / "model", "--data_dir", data_dir, "--use_attention_mask", mask]
        *_, test = load_task(train_bert_hf, *options, *QUICK)
        assert (test.pad_to, test.use_attention_mask) == (pad_to, mask == "true")


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_class_logits_do_not_depend_on_masked_padding(name):
    config = TINY_CONFIGS[name]
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    encode = make_encode(tiny_tokenizer(config.pad_token_id))
    ids = encode(["a film", "the plot was very good and fine", "a dull cast"], 24)

    def logits(indices=(0, 1, 2), **padding):
        batch = IMDbDataset(concatenate(ids, [0, 1, 0]), config.pad_token_id, **padding).collate(indices)
        with torch.no_grad():
            return train_bert_hf.class_logits(model, batch)

    longest = logits(use_attention_mask=True)
    torch.testing.assert_close(longest, logits(use_attention_mask=True, pad_to=24))
    assert (longest - logits(pad_to=24))[0].abs().max() > 1e-6  # without the mask, attention includes the padding
    torch.testing.assert_close(logits([0], use_attention_mask=True), longest[:1])


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_class_logits_in_bf16_are_close_to_fp32(name):
    config = TINY_CONFIGS[name]
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    ids = make_encode(tiny_tokenizer(config.pad_token_id))(["a good film", "the plot was very dull"], 24)
    dataset = IMDbDataset(concatenate(ids, [1, 0]), config.pad_token_id, use_attention_mask=True)
    logits = [
        predict_logits(dataset, Classifier(model, train_bert_hf.class_logits, torch.device("cpu"), precision))
        for precision in ("fp32", "bf16")
    ]
    torch.testing.assert_close(*logits, rtol=0, atol=0.02)
    assert not torch.equal(*logits)


def test_parse_args_has_the_published_defaults():
    args = train_bert_hf.parse_args([])
    assert (args.model, args.trainable_layers, args.use_attention_mask) == ("distilbert", "all", "true")
    assert (args.context_length, args.num_epochs, args.learning_rate) == (256, 1, 5e-6)
    assert (args.batch_size, args.seed) == (8, 123)
    assert (args.eval_freq, args.eval_iter, args.optimizer) == (50, 20, "adamw")
