"""Every sequence classifier of Transformers, as tiny as its configuration allows, is padded correctly or refused."""

from functools import partial

import pytest
import torch
import transformers
from helpers import make_reviews
from packaging.version import Version
from tiny_models import tiny_tokenizer
from transformers import AutoModelForSequenceClassification, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from finetuning.data.hf_tokenizer import make_encode
from finetuning.data.tokenization import concatenate
from finetuning.hub_models import replace_output_layer, set_pad_token
from finetuning.model_inspection import example_reviews, find_padding_side
from finetuning.performance.inference import Classifier, inference_context, predict_logits
from finetuning.system.errors import UserError
from train_bert_hf import class_logits, make_dataset

# Small values under all names that configurations use for their sizes.
WIDTH = dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "dim", "embedding_size", "d_latents"), 16)
INNER = dict.fromkeys(
    ("intermediate_size", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim", "d_inner", "hidden_dim"), 32
)
LAYERS = dict.fromkeys(
    (
        "num_hidden_layers",
        "num_layers",
        "n_layer",
        "n_layers",
        "encoder_layers",
        "decoder_layers",
        "num_decoder_layers",
    ),
    2,
)
HEADS = dict.fromkeys(
    (
        "num_attention_heads",
        "num_heads",
        "n_head",
        "n_heads",
        "encoder_attention_heads",
        "decoder_attention_heads",
        "num_key_value_heads",
    ),
    2,
)
HEAD_WIDTH = dict.fromkeys(("head_dim", "d_head", "d_kv", "v_head_dim", "attention_head_size"), 8)
POSITIONS = dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 64)
LOW_RANK = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "rotary_dim": 4}
EXPERTS = {
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
    "n_routed_experts": 4,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
}
OTHERS = {"num_latents": 4, "entity_vocab_size": 8, "entity_emb_size": 8, "max_xpath_tag_unit_embeddings": 256}
SMALL = {"vocab_size": 21} | WIDTH | INNER | LAYERS | HEADS | HEAD_WIDTH | POSITIONS | LOW_RANK | EXPERTS | OTHERS
TOKENS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
HYBRID = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
}
ZAMBA = {"layers_block_type": ["linear_attention", "hybrid"], "use_mamba_kernels": False}
SPECIAL = {
    "axk1": {"head_dim": 4},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "deepseek_v3": {"head_dim": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False, "mamba_dt_rank": 4},
    "layoutlmv3": {"coordinate_size": 3, "shape_size": 2, "visual_embed": False},
    "lilt": {"hidden_size": 24},
    "markuplm": {"max_depth": 2},
    "mistral4": {"head_dim": 4},
    "mobilebert": {"normalization_type": "layer_norm"},
    "qwen3_5_text": HYBRID,
    "qwen3_next": HYBRID,
    "reformer": {"axial_pos_embds": False},
    "roc_bert": {"pronunciation_embed_dim": 8, "shape_embed_dim": 8, "shape_vocab_size": 8},
    "t5": {"decoder_start_token_id": 0},
    "xmod": {"default_language": "en_XX"},
    "zamba": ZAMBA,
    "zamba2": ZAMBA,
}
# Transformers' code for these lets padding change the prediction; YOSO samples which tokens are attended to.
PADDING = "depend on how much padding a batch has"
REFUSED = dict.fromkeys(
    ["canine", "convbert", "fnet", "funnel", "mobilebert", "nystromformer", "t5gemma", "t5gemma2", "yoso"], PADDING
)
if Version(transformers.__version__) < Version("5.23"):
    REFUSED |= dict.fromkeys(["doge", "umt5"], PADDING)
UNBUILDABLE = {
    "layoutlmv2": "detectron2",  # not available from PyPI
    "zamba": "tie_weights_keys",  # shares the weights of more layers than a tiny model has
}


def tiny_config(config_class, **overrides):
    """Return the smallest configuration of a class, including its sub-configurations."""
    default = config_class()
    config = {
        key: SMALL[key] for key, value in default.to_dict().items() if key in SMALL and not isinstance(value, list)
    }
    for key in config_class.sub_configs:
        if isinstance(getattr(default, key, None), PreTrainedConfig):
            config[key] = tiny_config(type(getattr(default, key))).to_dict()
    return config_class(**config | TOKENS | SPECIAL.get(config_class.model_type, {}) | overrides)


def tiny_model(config_class):
    """Return a classifier with weights large enough that predictions clearly differ between reviews."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(tiny_config(config_class, num_labels=2))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    assert sum(parameter.numel() for parameter in model.parameters()) < 1e6
    return model


def prepare(model):
    """Prepare a model as `load_pretrained` does; return functions that pad three reviews and the example reviews."""
    tokenizer = tiny_tokenizer()
    set_pad_token("tiny", model, tokenizer)
    encoded = concatenate(make_encode(tokenizer)(make_reviews(3)["text"].tolist(), 24), [0, 1, 0])
    assert len(set(encoded.lengths)) == 3
    replace_output_layer("tiny", model, tokenizer, spec=None)
    pad_reviews, pad_examples = (
        partial(make_dataset, texts, tokenizer, 24) for texts in (encoded, example_reviews(tokenizer, 24))
    )
    return pad_reviews, pad_examples


@pytest.mark.parametrize(
    "config_class", [pytest.param(kind, id=kind.model_type) for kind in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING]
)
def test_find_padding_side_makes_predictions_independent_of_the_batch(config_class):
    model_type = config_class.model_type
    if model_type in UNBUILDABLE:
        with pytest.raises((ImportError, ValueError), match=UNBUILDABLE[model_type]):
            tiny_model(config_class)
        return
    if model_type == "cohere_compass_text" and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("this version of Transformers cannot run it")
    model = tiny_model(config_class)
    make_reviews, make_examples = prepare(model)
    model.eval()
    if model_type in REFUSED:
        with pytest.raises(UserError, match=REFUSED[model_type]):
            find_padding_side("tiny", model, class_logits, make_examples, use_attention_mask=True)
        return
    side = find_padding_side("tiny", model, class_logits, make_examples, use_attention_mask=True)
    assert side == ("left" if model_type == "xlnet" else "right")
    dataset = make_reviews(use_attention_mask=True, padding_side=side)
    classifier = Classifier(model, class_logits, torch.device("cpu"))
    together = predict_logits(dataset, classifier)
    with inference_context(classifier):
        alone = torch.cat([classifier(dataset.collate([index])) for index in range(3)])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-4)
    assert together.std(dim=0).min() > 1e-4 or model_type == "mra"
