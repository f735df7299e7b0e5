"""Every sequence classifier of Transformers, as tiny as its configuration allows: right, or refused in one line."""

from functools import partial

import pytest
import torch
from conftest import reviews, tiny_tokenizer
from transformers import AutoModelForSequenceClassification, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

import train_bert_hf
from finetuning.errors import UserError
from finetuning.hub import encoder_of, find_padding_side, set_padding, trial_reviews
from finetuning.loop import Classifier, evaluating, predict
from finetuning.tokens import flatten

# Small values for whatever names a configuration has for its sizes.
WIDTH = dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "dim", "embedding_size", "d_latents"), 16)
INNER = dict.fromkeys(("intermediate_size", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim", "d_inner",
                       "hidden_dim"), 32)
LAYERS = dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers",
                        "num_decoder_layers"), 2)
HEADS = dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads", "encoder_attention_heads",
                       "decoder_attention_heads", "num_key_value_heads"), 2)
HEAD_WIDTH = dict.fromkeys(("head_dim", "d_head", "d_kv", "v_head_dim", "attention_head_size"), 8)
POSITIONS = dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 64)
LOW_RANK = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "rotary_dim": 4}
EXPERTS = {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, "n_routed_experts": 4, "num_experts": 4,
           "num_local_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
OTHERS = {"num_latents": 4, "entity_vocab_size": 8, "entity_emb_size": 8, "max_xpath_tag_unit_embeddings": 256}
SMALL = {"vocab_size": 21} | WIDTH | INNER | LAYERS | HEADS | HEAD_WIDTH | POSITIONS | LOW_RANK | EXPERTS | OTHERS
TOKENS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
HYBRID = {"layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 8, "linear_value_head_dim": 8,
          "linear_num_key_heads": 2, "linear_num_value_heads": 2}
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
# Library code that lets the padding into a prediction; in YOSO it is drawn at random which tokens are attended to.
PADDING = "depend on how much padding a batch has"
REFUSED = dict.fromkeys(["canine", "convbert", "fnet", "funnel", "mobilebert", "nystromformer", "t5gemma", "t5gemma2",
                         "yoso"], PADDING)
UNBUILDABLE = {
    "layoutlmv2": "detectron2",  # a library that PyPI does not have
    "zamba": "tie_weights_keys",  # ties the weights of more layers than a tiny model has
}


def tiny_config(kind, **changes):
    """The smallest configuration of a kind, its parts included."""
    full = kind()
    config = {key: SMALL[key] for key, value in full.to_dict().items() if key in SMALL and not isinstance(value, list)}
    for key in kind.sub_configs:
        if isinstance(getattr(full, key, None), PreTrainedConfig):
            config[key] = tiny_config(type(getattr(full, key))).to_dict()
    return kind(**config | TOKENS | SPECIAL.get(kind.model_type, {}) | changes)


def tiny_model(kind):
    """A classifier with weights so large that its predictions differ clearly from review to review."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(tiny_config(kind, num_labels=2))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def load(kind):
    """A tiny classifier as `load_model` leaves it; functions that pad some reviews, and those of a trial, as one asks.
    """
    model = tiny_model(kind)
    assert sum(parameter.numel() for parameter in model.parameters()) < 1e6
    tokenizer = tiny_tokenizer()
    set_padding("tiny", model, tokenizer)
    tokens = flatten(encoder_of(tokenizer)(reviews(3)["text"].tolist(), 24), [0, 1, 0])
    assert len(set(tokens.lengths)) == 3
    train_bert_hf.replace_output_layer("tiny", model, tokenizer)

    def dataset(tokens, use_attention_mask=True, padding_side="right"):
        return train_bert_hf.dataset(tokens, tokenizer, use_attention_mask, 24, padding_side)
    return model, partial(dataset, tokens), partial(dataset, trial_reviews(tokenizer, 24))


@pytest.mark.parametrize("kind", [pytest.param(kind, id=kind.model_type)
                                  for kind in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING])
def test_predictions_do_not_depend_on_the_batch(kind):
    if kind.model_type in UNBUILDABLE:
        with pytest.raises((ImportError, ValueError), match=UNBUILDABLE[kind.model_type]):
            tiny_model(kind)
        return
    model, dataset, trials = load(kind)
    model.eval()
    if kind.model_type in REFUSED:
        with pytest.raises(UserError, match=REFUSED[kind.model_type]):
            find_padding_side("tiny", model, train_bert_hf.read_logits, trials, True)
        return
    side = find_padding_side("tiny", model, train_bert_hf.read_logits, trials, True)
    assert side == ("left" if kind.model_type == "xlnet" else "right")
    data = dataset(padding_side=side)
    classifier = Classifier(model, train_bert_hf.read_logits, torch.device("cpu"))
    together = predict(data, classifier)
    with evaluating(classifier):
        alone = torch.cat([classifier(data.batch([index])) for index in range(3)])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-4)
    assert together.std(dim=0).min() > 1e-4 or kind.model_type == "mra"
