"""The GPT beside transformers' models of the same tiny random weights, in fp64: logits and gradients to 1e-12.

Each option of a config that changes the function is met by some case; texts are longer than windows, and caches fill
token by token.
"""

import pytest
import torch

from moe_ext.hf import families
from moe_ext.hf.double import double
from moe_ext.layers.fused import within_groups
from moe_ext.model import GPT, KVCache

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.c_core
SMALL = dict(vocab_size=61, max_position_embeddings=24, num_hidden_layers=2, hidden_size=32, num_attention_heads=4,
             num_key_value_heads=2, intermediate_size=24, initializer_range=0.3, pad_token_id=None)
EXPERTS = dict(num_experts_per_tok=2, num_experts=8, moe_intermediate_size=12)
GLM = dict(n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=12, head_dim=8, attention_bias=True,
           rope_parameters=dict(rope_theta=1e3, partial_rotary_factor=0.5))
GPT_OSS = dict(num_local_experts=8, num_experts_per_tok=3, head_dim=8, sliding_window=4)


def rope(kind, **parameters):
    return dict(rope_parameters=dict(rope_type=kind, rope_theta=1e3, factor=4.0) | parameters)


LLAMA3 = rope("llama3", original_max_position_embeddings=16, low_freq_factor=1.0, high_freq_factor=4.0)
YARN, YARN_AS_IT_COMES = (      # of a context in which the ramp has pairs between its ends
    dict(rope("yarn", original_max_position_embeddings=512, **more), max_position_embeddings=2048)
    for more in ({}, dict(truncate=False)))
CASES = {
    "qwen3_moe": dict(EXPERTS, head_dim=12, norm_topk_prob=True),
    "qwen3_moe, window, dense block, biases": dict(EXPERTS, use_sliding_window=True, sliding_window=5,
                                                   mlp_only_layers=[0], attention_bias=True, head_dim=8),
    "qwen3_moe, yarn": dict(EXPERTS, head_dim=16, **YARN),
    "olmoe": dict(num_experts=8, num_experts_per_tok=3),
    "olmoe, normed, biases": dict(num_experts=8, num_experts_per_tok=3, norm_topk_prob=True, attention_bias=True),
    "mixtral": dict(num_local_experts=4, num_experts_per_tok=2),
    "mixtral, window": dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=4, head_dim=12),
    "glm4_moe": dict(GLM, use_qk_norm=True, routed_scaling_factor=2.5),
    "glm4_moe, two of four groups": dict(GLM, n_group=4, topk_group=2, n_shared_experts=2, num_hidden_layers=3),
    "glm4_moe, one of two groups": dict(GLM, n_group=2, topk_group=1, norm_topk_prob=False, attention_bias=False,
                                        num_experts_per_tok=3),
    "gpt_oss": dict(GPT_OSS, **YARN_AS_IT_COMES),
    "gpt_oss, no attention biases": dict(GPT_OSS, attention_bias=False, layer_types=["sliding_attention"] * 2),
    "llama": dict(tie_word_embeddings=True, **LLAMA3),
    "llama, biases": dict(attention_bias=True, head_dim=12),
    "llama, mlp biases, linear": dict(mlp_bias=True, **rope("linear")),
    "qwen3": dict(head_dim=12, tie_word_embeddings=True),
    "qwen3, window, yarn": dict(head_dim=16, attention_bias=True, use_sliding_window=True, sliding_window=4,
                                max_window_layers=0, **YARN),
    "qwen2_moe": dict(EXPERTS, shared_expert_intermediate_size=20),
}


def drawn(config):
    """A model of theirs whose every value is drawn: biases, norms, sinks and selection biases too."""
    generator = torch.Generator().manual_seed(1)
    with double():
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager",
                                                              experts_implementation="eager").double().eval()
    with torch.no_grad():
        for name, x in model.state_dict().items():
            noise = (0.3 * torch.randn(x.shape, generator=generator)).double()      # in fp32, as a selection bias is
            x.copy_((x.ndim == 1 and "norm" in name) + noise)
            if config.model_type == "gpt_oss" and "gate_up" in name:
                x.mul_(5)       # to beyond the clamps
    return model


@pytest.mark.parametrize("name", CASES)
def test_the_gpt_is_the_model_of_transformers(name):
    config = transformers.AutoConfig.for_model(name.partition(",")[0], **SMALL | CASES[name])
    theirs, family = drawn(config), families.of(config)
    ours = GPT(family.read(config), dtype=torch.float64).eval()
    state, their_state = ours.state_dict(), theirs.state_dict()
    parts = family.parts(ours.config, list(family.layouts)[-1])         # as a model of theirs has its experts
    for key, listed in parts.items():
        for part in listed:
            view = part.of(state[key])
            view.copy_(their_state[part.name].view(view.shape))
    tokens = torch.randint(61, (2, 16), generator=torch.Generator().manual_seed(2))
    upstream = torch.randn(2, 16, 61, generator=torch.Generator().manual_seed(3)).double()
    with double():
        want = theirs(tokens, use_cache=False).logits
        (want * upstream).sum().backward()
    got = ours.logits(tokens)
    assert want.std() > 0.1 and (got - want).abs().max() <= 1e-12 * want.abs().max()

    cache = KVCache(ours.config)
    with torch.no_grad():
        step = torch.cat([ours.logits(part, cache) for part in tokens.split([7, 1, 1, 7], dim=1)], dim=1)
    assert (step - want).abs().max() <= 1e-12 * want.abs().max()

    (got * upstream).sum().backward()
    wanted = {key: p.grad for key, p in theirs.named_parameters()}
    for key, p in ours.named_parameters():
        for part in parts[key]:
            grad = wanted.pop(part.name)
            assert grad.abs().max() > 0, f"{part.name} is reached by nothing"
            scale = grad.abs().max() + 1e-3 * want.abs().max()      # a key's bias has no gradient but rounding
            assert (part.of(p.grad).reshape(part.shape) - grad).abs().max() <= 1e-12 * scale, part.name
    assert not wanted


# ---- groups ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("score", ["sigmoid", "softmax_topk"])
@pytest.mark.parametrize("bias", [False, True])
def test_experts_are_of_the_best_groups(score, bias):
    """Token by token, by sorted lists; logits of few values, so that groups and experts tie."""
    generator = torch.Generator().manual_seed(4)
    logits_TE = torch.randint(-1, 2, (64, 12), generator=generator).double()
    bias_E = torch.randint(2, (12,), generator=generator).float() if bias else None
    got = within_groups(logits_TE, 3, 4, 2, score=score, select_bias_E=bias_E)
    scores_TE = logits_TE.sigmoid() if score == "sigmoid" else logits_TE.softmax(-1)
    for scores, ids in zip((scores_TE + (bias_E if bias else 0)).tolist(), got.tolist(), strict=True):
        best = [sum(sorted(scores[g * 3:g * 3 + 3])[1:]) for g in range(4)]
        groups = sorted(range(4), key=lambda g: -best[g])[:2]
        assert ids == sorted((e for e in range(12) if e // 3 in groups), key=lambda e: -scores[e])[:3]
