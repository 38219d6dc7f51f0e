"""Configs of transformers and the GPT's: published ones, what is refused, and where the tensors lie."""

from pathlib import Path

import pytest
import torch

from moe_ext.checkpoint import named_tensors
from moe_ext.config import ConfigError, ModelConfig, MoEConfig, load
from moe_ext.hf import families
from moe_ext.hf.families import FAMILIES
from moe_ext.model import GPT

transformers = pytest.importorskip("transformers")
RECIPES = Path(__file__).parents[1] / "recipes"
DEFAULT = {"attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02, "tie_word_embeddings": False,
           "torch_dtype": "bfloat16", "transformers_version": "4.52.3", "use_cache": True}

# The fields of config.json as published, which are in the manner of transformers 4.
PUBLISHED = {
    "qwen3_30b_a3b": {
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False,
        "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128,
        "hidden_size": 2048, "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48,
        "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32,
        "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4,
        "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001, "sliding_window": None, "use_sliding_window": False, "vocab_size": 151936},
    "olmoe_1b_7b": {
        "model_type": "olmoe", "architectures": ["OlmoeForCausalLM"], "attention_bias": False, "clip_qkv": None,
        "eos_token_id": 50279, "hidden_size": 2048, "intermediate_size": 1024, "max_position_embeddings": 4096,
        "norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 8,
        "num_hidden_layers": 16, "num_key_value_heads": 16, "output_router_logits": False, "pad_token_id": 1,
        "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0, "router_aux_loss_coef": 0.01,
        "vocab_size": 50304},
    "mixtral_8x7b": {
        "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
        "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32,
        "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8,
        "output_router_logits": False, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02,
        "sliding_window": None, "vocab_size": 32000},
    "glm_4.5_air": {
        "model_type": "glm4_moe", "architectures": ["Glm4MoeForCausalLM"], "attention_bias": True,
        "pad_token_id": 151329, "eos_token_id": [151329, 151336, 151338], "head_dim": 128, "hidden_size": 4096,
        "partial_rotary_factor": 0.5, "intermediate_size": 10944, "max_position_embeddings": 131072,
        "moe_intermediate_size": 1408, "norm_topk_prob": True, "num_attention_heads": 96, "n_group": 1,
        "topk_group": 1, "n_routed_experts": 128, "n_shared_experts": 1, "routed_scaling_factor": 1.0,
        "num_experts_per_tok": 8, "first_k_dense_replace": 1, "num_hidden_layers": 46, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 1000000, "num_nextn_predict_layers": 1,
        "use_qk_norm": False, "vocab_size": 151552},
    "gpt_oss_20b": {
        "model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "attention_bias": True,
        "eos_token_id": 200002, "experts_per_token": 4, "head_dim": 64, "hidden_size": 2880,
        "initial_context_length": 4096, "intermediate_size": 2880,
        "layer_types": ["sliding_attention", "full_attention"] * 12, "max_position_embeddings": 131072,
        "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 8,
        "num_local_experts": 32, "output_router_logits": False, "pad_token_id": 199999, "rms_norm_eps": 1e-05,
        "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0,
                         "original_max_position_embeddings": 4096, "rope_type": "yarn", "truncate": False},
        "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0,
        "vocab_size": 201088},
}
LLAMA_31_8B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "attention_bias": False, "bos_token_id": 128000,
    "eos_token_id": 128001, "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 131072,
    "mlp_bias": False, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "vocab_size": 128256,
    "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"}}


def config_of(fields, **changed):
    fields = DEFAULT | fields | changed
    return transformers.AutoConfig.for_model(**fields)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_our_recipe(name):
    """Two people wrote them down from the publication; and what we would write is read as the same again."""
    config = config_of(PUBLISHED[name])
    family = families.of(config)
    read, recipe = family.read(config), load(RECIPES / f"{name}.toml").model
    assert families.differences(read, recipe) == []
    assert families.differences(family.read(family.write(read)), read) == []
    assert config.model_type in families.able(read)


def test_a_published_dense_config():
    config = config_of(LLAMA_31_8B)
    read = families.of(config).read(config)
    assert (read.rope_stretch, read.rope_scale, read.rope_context) == ("llama3", 8.0, 8192)
    assert GPT(read, device="meta").num_parameters()[0] == 8_030_261_248
    older = config_of(LLAMA_31_8B, rope_scaling={"type": "linear", "factor": 4.0})
    assert (families.of(older).read(older).rope_stretch, families.of(older).read(older).rope_scale) == ("linear", 4.0)


@pytest.mark.parametrize("fields, changed, words", [
    (PUBLISHED["qwen3_30b_a3b"], {"decoder_sparse_step": 2}, "decoder_sparse_step is 2"),
    (PUBLISHED["qwen3_30b_a3b"], {"mlp_only_layers": [3]}, r"mlp_only_layers is \[3\]"),
    (PUBLISHED["qwen3_30b_a3b"], {"attention_dropout": 0.1}, "attention_dropout is 0.1"),
    (PUBLISHED["qwen3_30b_a3b"], {"hidden_act": "relu"}, "hidden_act is 'relu'"),
    (PUBLISHED["qwen3_30b_a3b"], {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type is dynamic"),
    (PUBLISHED["qwen3_30b_a3b"], {"logit_scale": 2.0}, "logit_scale is 2.0, which the GPT does not have"),
    (PUBLISHED["olmoe_1b_7b"], {"clip_qkv": 8.0}, "clip_qkv is 8.0"),
    (PUBLISHED["mixtral_8x7b"], {"router_jitter_noise": 0.1}, "router_jitter_noise is 0.1"),
    (PUBLISHED["gpt_oss_20b"], {"swiglu_limit": 5.0}, "swiglu_limit is 5.0"),
    (PUBLISHED["gpt_oss_20b"], {"layer_types": ["full_attention", "sliding_attention"] * 12}, "layer_types is"),
    (LLAMA_31_8B, {"rope_scaling": LLAMA_31_8B["rope_scaling"] | {"low_freq_factor": 2.0}}, "low_freq_factor"),
])
def test_an_option_that_the_gpt_does_not_have_is_refused_by_name(fields, changed, words):
    with pytest.raises(ConfigError, match=words):
        families.of(config_of(fields)).read(config_of(fields, **changed))


def test_another_architecture_is_refused():
    with pytest.raises(ConfigError, match="model_type is gpt2, wanted one of qwen3_moe"):
        families.of(transformers.GPT2Config())


@pytest.mark.parametrize("changed, words", [
    ({"norm": "layernorm"}, r"model.norm 'layernorm' \(it would be 'rmsnorm'\)"),
    ({"position": "learned"}, "model.position 'learned'"),
    ({"moe": MoEConfig(experts=4, score="sigmoid")}, "model.moe.score 'sigmoid'"),
    ({"window": 5, "window_full_every": 2}, "model.window_full_every 2"),
])
def test_a_model_that_an_architecture_cannot_say_is_refused_by_name(changed, words):
    model = ModelConfig(**{"qk_norm": True, "moe": MoEConfig(experts=4)} | changed)
    with pytest.raises(ConfigError, match=words):
        FAMILIES["qwen3_moe"].write(model)
    assert "qwen3_moe" not in families.able(model)


SMALL = {"vocab_size": 24, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "head_dim": 4, "intermediate_size": 12}
MORE = {
    "qwen3_moe": {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 4, "mlp_only_layers": [0]},
    "qwen2_moe": {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 4,
                  "shared_expert_intermediate_size": 8},
    "olmoe": {"num_experts": 3, "num_experts_per_tok": 2}, "mixtral": {"num_local_experts": 3},
    "glm4_moe": {"n_routed_experts": 9, "moe_intermediate_size": 4, "use_qk_norm": True, "attention_bias": True},
    "gpt_oss": {"num_local_experts": 5}, "llama": {"attention_bias": True, "mlp_bias": True},
    "qwen3": {"tie_word_embeddings": True},
}


@pytest.mark.parametrize("name, layout", [(name, layout) for name in FAMILIES for layout in FAMILIES[name].layouts])
def test_parts_cover_each_parameter_once(name, layout):
    """Every value of ours is in one tensor of theirs, and their names and shapes are those of the real model."""
    config = config_of(SMALL | MORE[name], model_type=name)
    family = FAMILIES[name]
    model = family.read(config)
    theirs = {}
    for ours, x in named_tensors(GPT(model)).items():
        x = torch.zeros(x.shape)
        for part in family.parts(model, layout)[ours]:
            view = part.of(x)
            assert view.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
            view += 1
            theirs[part.name] = torch.empty(part.shape).view(view.shape).shape and part.shape
        assert (x == 1).all(), ours
    if layout == "experts" and family.layouts.keys() > {layout}:
        return                                          # their module has the fused form: hf import reads the other
    with torch.device("meta"):
        real = transformers.AutoModelForCausalLM.from_config(config)
    wanted = {n: tuple(t.shape) for n, t in real.state_dict().items() if n != "lm_head.weight" or not model.tied}
    assert theirs == wanted


def test_an_unknown_layout_is_refused():
    with pytest.raises(ConfigError, match="in the layout fused, not experts"):
        FAMILIES["gpt_oss"].parts(FAMILIES["gpt_oss"].read(config_of(SMALL, model_type="gpt_oss")), "experts")
