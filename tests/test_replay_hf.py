"""Router replay in models of transformers, and between them and the GPT, in fp64: the same logits and gradients."""

import copy
from contextlib import nullcontext

import pytest
import torch
from test_families import CASES, SMALL, drawn, transformers
from test_replay import other_ids

from moe_ext.hf import families
from moe_ext.hf.double import double
from moe_ext.model import GPT
from moe_ext.replay import ROUTER, Tape, routers

pytestmark = pytest.mark.c_core
DEEPSEEK = dict(n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=12, n_group=4, topk_group=2,
                first_k_dense_replace=1, q_lora_rank=None, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8,
                v_head_dim=8, num_hidden_layers=3, num_key_value_heads=4)
MODELS = {name: CASES[name] for name in ("qwen3_moe", "olmoe", "mixtral", "glm4_moe, two of four groups", "gpt_oss")}
MODELS["deepseek_v3"] = DEEPSEEK


def made(name):
    """-> the model, its routers, how many experts a token has and there are."""
    config = transformers.AutoConfig.for_model(name.partition(",")[0], **SMALL | MODELS[name])
    model = drawn(config)
    found = [module for module in model.modules() if ROUTER.search(type(module).__name__)]
    return model, found, found[0].top_k, found[0].num_experts


def tokens_of(length=6):
    return torch.randint(61, (2, length), generator=torch.Generator().manual_seed(2))


def derived(model, tokens, tape=None, mode=nullcontext):
    """-> logits and the gradients of all parameters, with a tape or without."""
    model.zero_grad()
    with mode(), nullcontext() if tape is None else routers(model, tape):
        logits = model(tokens, use_cache=False).logits
        logits.sin().sum().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(got, want):
    return torch.equal(got[0], want[0]) and all(torch.equal(got[1][name], want[1][name]) for name in want[1])


@pytest.mark.parametrize("name", MODELS)
def test_what_a_router_chose_gives_the_same_bits(name):
    """Recorded ids are those that the experts got. Other ids are taken as well, by a checkpointed layer twice."""
    (model, found, top_k, experts), tokens, seen = made(name), tokens_of(), []
    for module in model.modules():
        if type(module).__name__.endswith("Experts"):
            module.register_forward_pre_hook(lambda _, args: seen.append(args[1].int()))
    want, tape = derived(model, tokens), Tape()
    for forced in (None, "recorded"):
        seen.clear()
        tape = Tape(forced and tape.ids_LBSK)
        assert same(derived(model, tokens, tape), want)
        assert torch.equal(tape.ids_LBSK.flatten(1, 2), torch.stack(seen))
    forced = other_ids(len(found), 2, 6, experts, top_k, seed=4)
    forced[:, 1, 3] = -1
    seen.clear()
    tape = Tape(forced)
    other = derived(model, tokens, tape)
    assert not torch.equal(other[0], want[0]) and torch.equal(tape.ids_LBSK.flatten(1, 2), torch.stack(seen))
    assert torch.equal(tape.ids_LBSK[forced >= 0], forced[forced >= 0]) and tape.ids_LBSK.ge(0).all()
    model.train().activation_checkpointing_enable(dict(use_reentrant=False))
    assert same(derived(model, tokens, Tape(forced)), other)
    assert not any("forward" in vars(module) for module in found)


def plain_weights(router, logits_TE, ids_TK):
    """The rule of a router, without its code."""
    kept_TK = logits_TE.gather(1, ids_TK)
    if hasattr(router, "e_score_correction_bias"):
        affinity_TK = kept_TK.sigmoid()
        return affinity_TK / affinity_TK.sum(1, keepdim=True) * router.routed_scaling_factor
    if type(router).__name__ == "GptOssTopKRouter":
        return kept_TK.softmax(1)
    p_TK = (kept_TK - logits_TE.logsumexp(1, keepdim=True)).exp()
    return p_TK / p_TK.sum(1, keepdim=True) if getattr(router, "norm_topk_prob", True) else p_TK


@pytest.mark.parametrize("name", MODELS)
def test_weights_at_forced_ids_and_their_gradient(name):
    _, (router, *_), top_k, experts = made(name)
    x_BSD, forced = torch.randn(1, 4, 32, dtype=torch.float64, requires_grad=True), other_ids(1, 1, 4, experts, top_k)
    with double(), routers(torch.nn.Sequential(router), Tape(forced)) as tape:
        tape.begin(1, top_k, x_BSD)
        logits_TE, weights_TK, ids_TK = router(x_BSD[0])
    assert torch.equal(ids_TK, forced[0, 0].long())
    plain_TK = plain_weights(router, logits_TE, ids_TK)
    torch.testing.assert_close(weights_TK, plain_TK, rtol=0, atol=1e-12)
    got, want = (torch.autograd.grad(w.sin().sum(), x_BSD, retain_graph=True)[0] for w in (weights_TK, plain_TK))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def copied(source, family, model, back=False):
    """The tensors of ours from theirs, in place, or theirs {name: tensor} from ours."""
    theirs = {}
    for name, parts in family.parts(model.config, list(family.layouts)[-1]).items():
        ours = source[name] if back else model.state_dict()[name]
        for part in parts:
            view = part.of(ours)
            if back:
                theirs[part.name] = view.reshape(part.shape)
            else:
                view.copy_(source[part.name].view(view.shape))
    return theirs


@pytest.mark.parametrize("name", [name for name in MODELS if name != "deepseek_v3"])
def test_between_transformers_and_the_gpt(name):
    """Each replays ids that neither would choose: the same logits and gradients, with both experts implementations of
    theirs; and what theirs recorded is what ours would have chosen."""
    import moe_ext.transformers  # noqa: F401
    (theirs, found, top_k, experts), tokens = made(name), tokens_of()
    family = families.of(theirs.config)
    ours = GPT(family.read(theirs.config), dtype=torch.float64).eval()
    with torch.no_grad():
        copied(theirs.state_dict(), family, ours)
    recorded, own = Tape(), Tape()
    derived(theirs, tokens, recorded, double)
    ours.hidden(tokens, tape=own)
    assert torch.equal(recorded.ids_LBSK.sort(-1).values, own.ids_LBSK.sort(-1).values)
    forced = other_ids(len(found), 2, 6, experts, top_k)
    forced[:, 0, 2] = -1
    got = ours.lm_head(ours.hidden(tokens, tape=Tape(forced))[0])
    got.sin().sum().backward()
    gradients = {key: p.grad for key, p in ours.named_parameters()}
    gradients |= {key: torch.zeros_like(x) for key, x in ours.state_dict().items() if key not in gradients}
    there = copied(gradients, family, ours, back=True)
    for implementation in ("eager", "moe_ext"):
        theirs.set_experts_implementation(implementation)
        want, want_gradients = derived(theirs, tokens, Tape(forced), double)
        assert (got - want).abs().max() <= 1e-12 * want.abs().max()
        for key, grad in want_gradients.items():
            assert (there[key] - grad).abs().max() <= 1e-12 * (grad.abs().max() + 1e-3 * want.abs().max()), key


def test_a_generation():
    """The last token runs through no layer; all others are there, and replay in one forward."""
    (model, found, top_k, _), tape = made("qwen3_moe"), Tape()
    with routers(model, tape):
        text = model.generate(tokens_of(), max_new_tokens=4, do_sample=False)
    assert tape.ids_LBSK.shape == (len(found), 2, text.shape[1] - 1, top_k)
    whole = Tape()
    with torch.no_grad(), routers(model, whole):
        model(text[:, :-1])
    assert torch.equal(whole.ids_LBSK, tape.ids_LBSK)


@pytest.mark.parametrize("how", ["static cache", "draft"])
def test_a_generation_whose_cache_is_not_a_plain_one(how):
    """A static cache counts in place; a cache is cropped behind drafts that were refused."""
    (model, *_), tape, whole = made("qwen3_moe"), Tape(), Tape()
    options, prompt = dict(max_new_tokens=12, do_sample=False), tokens_of()
    if how == "draft":
        draft, prompt = copy.deepcopy(model), prompt[:1]
        with torch.no_grad():
            for p in draft.parameters():
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(4)), alpha=0.1)
        options["assistant_model"] = draft
    else:
        options["cache_implementation"] = "static"
    with routers(model, tape):
        text = model.generate(prompt, **options)
    with torch.no_grad(), routers(model, whole):
        model(text[:, :-1])
    length = text.shape[1] - 1
    assert tape.ids_LBSK.shape[2] == length or how == "draft"
    assert torch.equal(whole.ids_LBSK, tape.ids_LBSK[:, :, :length])


def test_what_is_refused():
    model, found, top_k, experts = made("qwen3_moe")
    forced = other_ids(len(found), 2, 6, experts, top_k)
    forced[0, 0, 0, 1] = -1
    for wrong, words in ((forced, "a -1 beside them"), (forced + 1, f"to {experts}, wanted 0 to {experts - 1}"),
                         (forced * 0, "name an expert twice")):
        with pytest.raises(ValueError, match=words), routers(model, Tape(wrong)):
            pass
    with pytest.raises(ValueError, match="have 3 MoE layers, the forward 2"), routers(model, Tape(other_ids(
            3, 2, 6, experts, top_k))):
        model(tokens_of())
    with pytest.raises(ValueError, match="runs by itself: give `routers` the module"), routers(model, Tape()):
        model.model(tokens_of())
    with pytest.raises(ValueError, match="Linear has no module of a class"), routers(torch.nn.Linear(1, 1), Tape()):
        pass
    with torch.no_grad():
        cache = model(tokens_of()).past_key_values
        with pytest.raises(ValueError, match="holds 6 tokens, some of which ran without"), routers(model, Tape()):
            model(tokens_of(1), past_key_values=cache)
