"""Router replay: what is forced is what was recorded, in the model, on meshes, from engines and in transformers."""
import base64
import io
import json
import math

import numpy as np
import pytest
import torch
import torch._dynamo  # fully_shard imports it, which takes seconds: once here, not in every rank
from ranks import run_ranks
from test_model import DRAWS, VARIANTS, losses_and_grads, make, small, text
from torch.distributed.tensor import DTensor

from moe_ext import statistics
from moe_ext.config import Config, DataConfig, MeshConfig, ModelConfig, MoEConfig, PipelineConfig, TrainConfig
from moe_ext.data import IndexedWriter
from moe_ext.evaluate import Run
from moe_ext.layers.fused import FusedMoE
from moe_ext.model import GPT, KVCache
from moe_ext.parallel.mesh import Mesh
from moe_ext.parallel.pipeline import Pipeline
from moe_ext.parallel.shard import build
from moe_ext.replay import ROUTER, Tape, batch, from_engine, gathered, load, routers, save


def other_ids(L, B, S, experts, K, seed=0):
    """Distinct experts of no router's choice."""
    return torch.rand(L, B, S, experts, generator=torch.Generator().manual_seed(seed)).argsort(-1)[..., :K].int()


def with_tape(model, tokens, targets, tape, **options):
    model.zero_grad()
    out = model(tokens, targets, DRAWS, tape=tape, **options)
    (out.token_loss + out.aux_loss).backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters()}


# ---- one process -----------------------------------------------------------------------------------------------------

@pytest.mark.c_core
@pytest.mark.parametrize("name", ["deepseek", "noisy_biased", "capacity_probability", "jitter_dropout", "gpt_oss"])
def test_what_was_recorded_gives_the_same_bits(name):
    """Weights, noise, jitter, dropout, capacity, selection bias and all gradients; with recomputation too."""
    config = VARIANTS[name]
    model, (tokens, targets) = make(config), text(config)
    want, want_grads = losses_and_grads(model, tokens, targets)
    tape = Tape()
    for recompute, forced in [(False, None), (True, None), (True, "recorded")]:
        model.recompute = recompute
        tape = Tape(forced and tape.ids_LBSK.short())
        got, grads = with_tape(model, tokens, targets, tape)
        assert all(torch.equal(g, w) for g, w in zip(got[:6], want[:6], strict=True))
        assert all(torch.equal(grads[name], want_grads[name]) for name in grads)
        assert tape.ids_LBSK.shape == (config.moe_layers, *tokens.shape, config.moe.top_k)
        assert tape.ids_LBSK.flatten(2).ge(0).all()


@pytest.mark.c_core
def test_other_weights_take_the_recorded_experts():
    config = VARIANTS["qwen3_moe"]
    first, second, (tokens, targets) = make(config), make(config, seed=8), text(config)
    recorded, own, replayed = Tape(), Tape(), Tape()
    first(tokens, targets, tape=recorded)
    second(tokens, targets, tape=own)
    assert not torch.equal(own.ids_LBSK, recorded.ids_LBSK)
    replayed = Tape(recorded.ids_LBSK)
    out = second(tokens, targets, tape=replayed)
    assert torch.equal(replayed.ids_LBSK, recorded.ids_LBSK)
    counts_LE = torch.stack([ids.flatten().bincount(minlength=4) for ids in recorded.ids_LBSK])
    assert torch.equal(out.counts_LE, counts_LE.int())


@pytest.mark.c_core
@pytest.mark.parametrize("score", ["softmax_topk", "topk_softmax", "sigmoid"])
def test_the_gradient_of_the_router_at_forced_ids(score):
    """Finite differences, through weights and losses, at ids that the router would not choose; some are absent."""
    torch.manual_seed(0)
    layer = FusedMoE(4, 3, 5, 2, score=score, balance_weight=0.3, z_weight=0.1, capacity_factor=1.0,
                     dtype=torch.float64)
    x_BSD, ids = torch.randn(2, 3, 4, dtype=torch.float64), other_ids(1, 2, 3, 5, 2)[0]
    ids[0, 0, 1] = ids[1, 2, 0] = -1

    def f(weight):
        y, routing = torch.func.functional_call(layer, {"gate.weight": weight}, (x_BSD,), {"ids": ids})
        return y, routing.loss

    assert torch.equal(layer(x_BSD, ids=ids)[1].ids, ids)
    assert torch.autograd.gradcheck(f, [layer.gate.weight.detach().requires_grad_()])


@pytest.mark.c_core
def test_a_token_without_ids_chooses_for_itself():
    """Beside others that are forced; pads, whose rows are -1, stay pads."""
    config = VARIANTS["olmoe"]
    model, (tokens, targets) = make(config), text(config)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[1, 8:] = False
    own, forced = Tape(), other_ids(config.moe_layers, *tokens.shape, 4, 2)
    forced[:, :, 5:] = -1
    model(tokens, targets, token_mask=mask, tape=own)
    tape = Tape(forced)
    model(tokens, targets, token_mask=mask, tape=tape)
    assert torch.equal(tape.ids_LBSK[:, :, :5], forced[:, :, :5])
    assert tape.ids_LBSK[:, 1, 8:].eq(-1).all() and own.ids_LBSK[:, 1, 8:].eq(-1).all()
    assert tape.ids_LBSK[0, :, 5:].equal(own.ids_LBSK[0, :, 5:]) and tape.ids_LBSK[:, 0].ge(0).all()


@pytest.mark.c_core
def test_a_generation_is_replayed_in_one_forward():
    """Token by token with a cache, then all at once: the same experts and the same logits."""
    config = VARIANTS["qwen3_moe"]
    model, (tokens, _) = make(config).eval(), text(config)
    tape, cache, steps = Tape(), KVCache(config), []
    with torch.no_grad():
        for part in tokens.split([5, 1, 1, 5], dim=1):
            steps.append(model.lm_head(model.hidden(part, cache=cache, tape=tape)[0]))
        again = Tape(tape.ids_LBSK)
        whole = model.lm_head(model.hidden(tokens, tape=again)[0])
        forced = Tape(tape.ids_LBSK)
        model.hidden(tokens[:, :7], cache=KVCache(config), tape=forced)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=0, atol=1e-12)
    assert torch.equal(again.ids_LBSK, tape.ids_LBSK) and torch.equal(forced.ids_LBSK, tape.ids_LBSK[:, :, :7])


# ---- meshes ----------------------------------------------------------------------------------------------------------

ROWS, TOKENS = 4, 8
MODEL = ModelConfig(vocab_size=24, seq_len=TOKENS, layers=3, dim=16, heads=4, hidden=16, init_std=0.2, moe=MoEConfig(
    experts=4, top_k=2, hidden=8, dense_layers=1, capacity_factor=1.0, balance_weight=0.1, scope="sequence"))
MESHES = {
    "fsdp2 ep2": dict(fsdp=2, ep=2),
    "tp2 etp2 sp2": dict(tp=2, etp=2, sp=2),
    "pp2": dict(pp=2),
}


def step(forced_LBSK=None, chunks=1, **axes):
    """The first step of a run on this rank -> losses and counts, gradients, ids; all of them whole."""
    config = Config(model=MODEL, mesh=MeshConfig(**axes), pipeline=PipelineConfig(chunks=chunks), train=TrainConfig(
        dtype="fp64", device="cpu", micro_batch=2 // axes.get("fsdp", 1), accumulation=2, recompute=True))
    mesh, rows, tapes = Mesh(config.mesh), config.train.micro_batch, {}
    model = build(config, mesh)
    tokens = torch.randint(24, (ROWS, TOKENS + 1), generator=torch.Generator().manual_seed(1))

    def feed(micro):
        begin, end = mesh.rows(micro, rows)
        tapes[micro] = Tape(None if forced_LBSK is None else forced_LBSK[:, begin:end])
        return (tokens[begin:end, :-1], tokens[begin:end, 1:], mesh.draws(0, 1, begin, TOKENS), None, None, None,
                tapes[micro])

    pipeline = Pipeline(model, mesh, config.pipeline, micro_batch=rows, micros=2)
    numbers = pipeline.sum(*pipeline.step(feed, 2, tokens=ROWS * TOKENS))
    pipeline.close()
    grads = {name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
             for name, p in model.named_parameters()}
    return numbers, grads, torch.cat([gathered(tapes[micro], mesh, MODEL.moe_layers) for micro in range(2)], dim=1)


@pytest.fixture(scope="module")
def alone():
    forced = other_ids(MODEL.moe_layers, ROWS, TOKENS, 4, 2)
    forced[:, 2, 3:5] = -1
    return forced, step(), step(forced)


@pytest.mark.c_core
@pytest.mark.parametrize("name", MESHES)
def test_a_mesh_records_and_forces_as_one_process(name, alone, tmp_path):
    axes = MESHES[name]
    forced, recorded, replayed = alone
    assert not torch.equal(recorded[2], replayed[2]) and replayed[0][4].sum() > 0       # capacity drops some
    for folder, ids, (numbers, grads, taken) in (("a", None, recorded), ("b", forced, replayed)):
        (tmp_path / folder).mkdir()
        world = Config(model=MODEL, mesh=MeshConfig(**axes)).mesh.world
        results = run_ranks(world, lambda rank, ids=ids: step(ids, **axes), tmp_path / folder)
        got_grads = {}
        for got, own_grads, got_taken in results:
            assert torch.equal(got_taken, taken)
            for g, w in zip(got, numbers, strict=True):
                torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12)
            got_grads |= own_grads
        assert got_grads.keys() == grads.keys()
        for what, grad in grads.items():
            torch.testing.assert_close(got_grads[what], grad, rtol=0, atol=1e-12 * (1 + float(grad.abs().max())))


# ---- files and engines -----------------------------------------------------------------------------------------------

def test_files(tmp_path):
    ids, tokens = other_ids(2, 3, 4, 8, 2), torch.arange(12).view(3, 4)
    config = small(moe=dict(experts=8))
    save(tmp_path / "ids.safetensors", ids, 8, tokens)
    got, got_tokens = load(tmp_path / "ids.safetensors", config)
    assert torch.equal(got, ids.short()) and torch.equal(got_tokens, tokens)
    save(tmp_path / "ids.safetensors", ids, 8)
    assert load(tmp_path / "ids.safetensors", config)[1] is None
    for changed, words in ((small(moe=dict(experts=16)), "of a model with 8 experts, this one has 16"),
                           (small(moe=dict(experts=8), layers=4), "with 2 MoE layers, this one has 4"),
                           (small(moe=dict(experts=8, top_k=1)), "with 2 experts per token, this one has 1")):
        with pytest.raises(ValueError, match=words):
            load(tmp_path / "ids.safetensors", changed)
    (tmp_path / "torn").write_bytes((tmp_path / "ids.safetensors").read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"torn is no file of moe_ext\.replay\.save, or is damaged"):
        load(tmp_path / "torn", config)
    for wrong, words in ((ids + 1, "reach from 0 to 8|reach from 1 to 8"), (ids * 0, "name an expert twice")):
        with pytest.raises(ValueError, match=words):
            save(tmp_path / "never", wrong, 8)
    assert not (tmp_path / "never").exists() and not list(tmp_path.glob("*.part"))


def test_what_engines_return():
    """Arrays of each dtype, .npy and int32 in base64; all blocks or MoE layers; with and without the last token."""
    config = small(moe=dict(experts=8, dense_layers=1), layers=3)
    want = other_ids(2, 1, 5, 8, 2)[:, 0]                                   # [L,S,K]
    moe = want.transpose(0, 1).numpy()                                      # [S,L,K]
    blocks = np.concatenate([np.zeros_like(moe[:, :1]), moe], axis=1)       # zeros for the dense block
    npy = io.BytesIO()
    np.save(npy, blocks[:4].astype(np.uint16))
    for routed in (moe, moe.astype(np.uint8), blocks.astype(np.int16), base64.b64encode(blocks.tobytes()).decode()):
        assert torch.equal(from_engine(routed, config, 5), want)
    for routed in (blocks[:4], *(base64.b64encode(raw).decode() for raw in (npy.getvalue(), blocks[:4].tobytes()))):
        got = from_engine(routed, config, 5)
        assert torch.equal(got[:, :4], want[:, :4]) and got[:, 4].eq(-1).all()
    assert torch.equal(batch([want, want[:, :3]], 6)[:, 1, :3], want[:, :3]) and batch([want], 6)[:, :, 5].eq(-1).all()
    fused = np.concatenate([moe, moe[..., :1]], axis=2)
    zeros = moe.copy()
    zeros[2] = 0
    for routed, words in ((moe[:3], r"got \[3, 2, 2\], wanted \[tokens 5 or 4"), (fused, "leave out shared experts"),
                          (moe + 1, "reach from . to 8, wanted 0 to 7"), (zeros, "name an expert twice .* give such"),
                          (base64.b64encode(moe.tobytes()).decode(), "got 80 bytes, wanted int32 of 5 or 4 tokens")):
        with pytest.raises(ValueError, match=words):
            from_engine(routed, config, 5)
    with pytest.raises(ValueError, match="a sequence has 5 tokens, more than 4"):
        batch([want], 4)


def test_ids_of_another_forward_are_refused():
    config = VARIANTS["qwen3_moe"]
    model, (tokens, targets) = GPT(config), text(config)
    L, S = config.moe_layers, config.seq_len
    for shape, words in (((L + 1, 3, S, 2), "have 3 MoE layers, the forward 2"), ((L, 2, S, 2), "2 sequences, the"),
                         ((L, 3, S - 1, 2), "have 11 tokens, the forward 12"), ((L, 3, S, 3), "3 experts per token")):
        with pytest.raises(ValueError, match=words):
            model(tokens, targets, tape=Tape(torch.zeros(shape, dtype=torch.int32)))
    with pytest.raises(ValueError, match=r"Tape: ids_LBSK is torch.float32 \[2\], wanted integers"):
        Tape(torch.zeros(2))
    with pytest.raises(ValueError, match="no MoE layer has run yet"):
        Tape().ids_LBSK  # noqa: B018
    with pytest.raises(ValueError, match=r"FusedMoE: ids are torch.int64 \[1, 2\], wanted torch.int32 \[3, 2\]"):
        FusedMoE(4, 3, 5, 2)(torch.zeros(3, 4), ids=torch.zeros(1, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="Linear has no module of a class"), routers(torch.nn.Linear(1, 1), Tape()):
        pass


# ---- transformers ----------------------------------------------------------------------------------------------------

TINY = dict(vocab_size=31, hidden_size=16, intermediate_size=12, moe_intermediate_size=12, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, head_dim=8, num_experts_per_tok=2, num_local_experts=8,
            num_experts=8, n_routed_experts=8, n_group=2, topk_group=1, first_k_dense_replace=0, q_lora_rank=None,
            kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, pad_token_id=0, initializer_range=0.5)
FAMILIES = ["DeepseekV3", "Glm4Moe", "GptOss", "Mixtral", "Olmoe", "Qwen3Moe"]


def theirs(family, seed=0):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, family + "Config")(**TINY)
    torch.manual_seed(seed)
    model = getattr(transformers, family + "ForCausalLM")(config).double()
    model.set_experts_implementation("eager")       # the others have no fp64
    return model


def plain_weights(router, logits, ids):
    """The rule of a router of transformers, without its code."""
    kept = logits.gather(1, ids)
    if hasattr(router, "e_score_correction_bias"):
        weights = kept.sigmoid()
        return weights / weights.sum(1, keepdim=True) * router.routed_scaling_factor
    if type(router).__name__.startswith("GptOss"):
        return kept.softmax(1)
    weights = kept.sub(logits.logsumexp(1, keepdim=True)).exp()
    return weights / weights.sum(1, keepdim=True) if getattr(router, "norm_topk_prob", True) else weights


@pytest.mark.c_core
@pytest.mark.parametrize("family", FAMILIES)
def test_routers_of_transformers(family):
    """Recorded ids are those that the experts got, and forced they give the same bits, with gradients; other ids give
    the weights of the router's rule and its gradient, also when checkpointing runs them again."""
    model, tokens = theirs(family).train(), torch.randint(31, (2, 5), generator=torch.Generator().manual_seed(2))
    seen, tape = [], Tape()
    found = [m for m in model.modules() if type(m).__name__.endswith("Experts")]
    assert len(found) == 2
    for experts in found:
        experts.register_forward_pre_hook(lambda _, args: seen.append(args[1:]))

    def run(tape=None):
        seen.clear()
        model.zero_grad()
        if tape is None:
            logits = model(tokens).logits
            logits.square().sum().backward()
        else:
            with routers(model, tape):
                logits = model(tokens).logits
                logits.square().sum().backward()
        return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    want = run()
    for forced in (None, "recorded"):
        tape = Tape(forced and tape.ids_LBSK)
        got = run(tape)
        assert torch.equal(got[0], want[0]) and all(torch.equal(got[1][name], want[1][name]) for name in want[1])
        assert torch.equal(tape.ids_LBSK.flatten(1, 2), torch.stack([ids for ids, _ in seen]).int())
    forced = other_ids(2, 2, 5, 8, 2, seed=4)
    forced[:, 1, 3] = -1
    tape = Tape(forced)
    logits, grads = run(tape)
    assert not torch.equal(logits, want[0]) and torch.equal(tape.ids_LBSK[forced.ge(0)], forced[forced.ge(0)])
    assert torch.equal(tape.ids_LBSK.flatten(1, 2), torch.stack([ids for ids, _ in seen]).int())
    model.activation_checkpointing_enable(dict(use_reentrant=False))
    again = run(Tape(forced))
    assert torch.equal(again[0], logits) and all(torch.equal(again[1][name], grads[name]) for name in grads)

    router = next(module for module in model.modules() if ROUTER.search(type(module).__name__))
    x_BSD, forced = torch.randn(1, 4, 16, dtype=torch.float64, requires_grad=True), forced[:1, :1, :4]
    with routers(torch.nn.Sequential(router), Tape(forced)) as tape:
        tape.begin(1, 2, x_BSD)
        logits_TE, weights_TK, ids_TK = router(x_BSD[0])
    assert torch.equal(ids_TK, forced[0, 0].long())
    plain_TK = plain_weights(router, logits_TE.double(), ids_TK)
    torch.testing.assert_close(weights_TK.double(), plain_TK, rtol=0, atol=1e-6)    # most compute them in fp32
    got, plain = (torch.autograd.grad(w.sin().sum(), x_BSD, retain_graph=True)[0] for w in (weights_TK, plain_TK))
    torch.testing.assert_close(got, plain, rtol=0, atol=1e-5)


@pytest.mark.c_core
def test_from_transformers_into_the_gpt_and_back():
    """Qwen3-MoE's weights in both: each replays the other's experts, with the other's logits; a generation too."""
    model, tokens = theirs("Qwen3Moe").eval(), torch.randint(31, (2, 6))
    rope = model.config.rope_parameters["rope_theta"]
    ours = GPT(ModelConfig(vocab_size=31, seq_len=12, layers=2, dim=16, heads=2, kv_heads=2, head_dim=8, hidden=12,
                           qk_norm=True, rope_base=rope, norm_eps=model.config.rms_norm_eps,
                           moe=MoEConfig(experts=8, top_k=2, hidden=12, norm_p=float(model.config.norm_topk_prob))),
               dtype=torch.float64).eval()
    names = {"gate_up_proj": "w13_E2FD", "down_proj": "w2_EDF"}
    state = {}
    for name, x in model.state_dict().items():
        name = name.removeprefix("model.")
        state[".".join(names.get(part, part) if "experts" in name else part for part in name.split("."))] = x
    for name, x in ours.state_dict().items():
        x.copy_(state.pop(name).view_as(x))
    assert not state
    forced = other_ids(2, 2, 6, 8, 2)
    with torch.no_grad():
        recorded, ours_own = Tape(), Tape()
        with routers(model, recorded):
            model(tokens)
        ours.hidden(tokens, tape=ours_own)
        assert torch.equal(recorded.ids_LBSK.sort(-1).values, ours_own.ids_LBSK.sort(-1).values)
        with routers(model, Tape(forced)):
            want = model(tokens).logits
        got = ours.lm_head(ours.hidden(tokens, tape=Tape(forced))[0])
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
        tape = Tape()
        with routers(model, tape):
            text = model.generate(tokens, max_new_tokens=4, do_sample=False)
        assert tape.ids_LBSK.shape == (2, 2, text.shape[1] - 1, 2)              # the last token ran through no layer
        again = Tape(tape.ids_LBSK)
        ours.hidden(text[:, :-1], tape=again)
        assert torch.equal(again.ids_LBSK, tape.ids_LBSK)
    forced[0, 0, 0, 1] = -1
    with pytest.raises(ValueError, match="a -1 beside them"), routers(model, Tape(forced)):
        pass
    assert not any("forward" in vars(module) for module in model.modules())


# ---- statistics ------------------------------------------------------------------------------------------------------

@pytest.fixture
def run(tmp_path, monkeypatch):
    """A model with a dense block, as a run, and 7 rows of held-out text and a bit."""
    model = small(moe=dict(experts=5, dense_layers=1, score="sigmoid", select_bias_rate=0.1), layers=3)
    tokens = torch.randint(model.vocab_size, (7 * model.seq_len + 4,), generator=torch.Generator().manual_seed(0))
    with IndexedWriter(tmp_path / "valid", model.vocab_size) as writer:
        writer.add(tokens.numpy())
    config = Config(model=model, data=DataConfig(valid=str(tmp_path / "valid")),
                    train=TrainConfig(dtype="fp64", device="cpu", micro_batch=2))
    loaded = Run(config, make(model).eval(), 3, tmp_path)
    monkeypatch.setattr(statistics, "load_run", lambda *_: loaded)
    return loaded, tokens[:7 * model.seq_len].view(7, -1)


@pytest.mark.c_core
def test_statistics(run, tmp_path, monkeypatch, capsys):
    """Of the command's file, against sums over tokens and their experts one by one."""
    (_, model, *_), tokens = run
    monkeypatch.setattr("sys.argv", ["statistics", str(tmp_path)])
    statistics.main()
    table = json.loads((tmp_path / "experts.json").read_text())
    assert table["step"] == 3 and table["tokens"] == tokens.numel() and len(table["layers"]) == 2
    logits, tape = {}, Tape()
    for row, layer in enumerate(model.moe_layers()):
        layer.gate.register_forward_hook(lambda _, args, x, row=row: logits.update({row: x.detach()}))
    model.hidden(tokens, tape=tape)
    said = capsys.readouterr().out.splitlines()
    for row, got in enumerate(table["layers"]):
        affinity_TE, ids = logits[row].sigmoid(), tape.ids_LBSK[row].flatten(0, 1).tolist()
        counts, weights, together, largest = [0] * 5, [0.0] * 5, [[0] * 5 for _ in range(5)], 0.0
        for affinity, chosen in zip(affinity_TE.tolist(), ids, strict=True):
            total = sum(affinity[e] for e in chosen)
            largest += max(affinity[e] for e in chosen) / total / len(ids)
            for e in chosen:
                counts[e] += 1
                weights[e] += affinity[e] / total
                for other in chosen:
                    together[e][other] += 1
        p_TE = affinity_TE / affinity_TE.sum(1, keepdim=True)
        assert got["layer"] == row + 1 and got["together"] == together
        assert [e["count"] for e in got["experts"]] == counts
        for name, want in {"share": [n / sum(counts) for n in counts], "probability": p_TE.mean(0).tolist(),
                           "weight": [w / max(n, 1) for w, n in zip(weights, counts, strict=True)]}.items():
            np.testing.assert_allclose([e[name] for e in got["experts"]], want, rtol=1e-12)
        entropy = -(p_TE * p_TE.log()).sum(1).mean().item() / math.log(5)
        np.testing.assert_allclose([got["router_entropy"], got["largest_weight"], got["load"]],
                                   [entropy, largest, max(counts) / sum(counts) * 5], rtol=1e-12)
        assert got["dead"] == counts.count(0) and said[row].startswith(f"layer   {row + 1} | load {got['load']:.2f}x")


@pytest.mark.c_core
def test_statistics_as_csv_of_a_part_and_what_is_refused(run, tmp_path, monkeypatch):
    (_, model, *_), _ = run
    monkeypatch.setattr("sys.argv", ["statistics", str(tmp_path), "--batches", "2", "--out", str(tmp_path / "e.csv")])
    statistics.main()
    lines = (tmp_path / "e.csv").read_text().splitlines()
    assert lines[0] == "layer,expert,count,share,probability,weight" and len(lines) == 1 + 2 * 5
    counts = [int(line.split(",")[2]) for line in lines[1:6]]
    assert sum(counts) == 2 * 2 * model.config.seq_len * 2
    for flags, words in ((["--out", "e.txt"], "wanted a name that ends in .json or .csv"),
                         (["--data", str(tmp_path / "no")], "no token file")):
        monkeypatch.setattr("sys.argv", ["statistics", str(tmp_path), *flags])
        with pytest.raises(SystemExit, match=words):
            statistics.main()
    torch.nn.init.constant_(model.layers[2].mlp.gate.weight, math.inf)
    monkeypatch.setattr("sys.argv", ["statistics", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"^error: the logits of the router layers\.2\.mlp are not finite for "):
        statistics.main()
    with pytest.raises(ValueError, match="the model is dense"):
        statistics.Statistics(GPT(small()))
