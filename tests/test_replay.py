"""Router replay: what is forced is what was recorded, in the model, on meshes and from engines; router statistics."""
import base64
import importlib.util
import io
import json
import math
import re
from pathlib import Path

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
from moe_ext.generate import generate_all
from moe_ext.layers.fused import FusedMoE
from moe_ext.model import GPT, KVCache
from moe_ext.parallel.mesh import Mesh
from moe_ext.parallel.pipeline import Pipeline
from moe_ext.parallel.shard import build
from moe_ext.replay import Tape, batch, from_engine, gathered, load, save


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
@pytest.mark.parametrize("name", ["deepseek", "groups", "noisy_biased", "capacity_probability", "jitter_dropout",
                                  "gpt_oss"])
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
    layer = FusedMoE(4, 3, 5, 2, score=score, balance_weight=0.3, z_weight=0.1, capacity_factor=score == "sigmoid",
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
    """Token by token with a cache, then all at once: the same experts and the same logits. Of prompts of unequal length
    with pads in front, with a cache and without."""
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

    prompts = [tokens[0, :3].tolist(), tokens[1, :5].tolist()]
    for cache in (True, False):
        made = Tape()
        new = torch.tensor(list(generate_all(model, prompts, 4, temperature=0.0, cache=cache, tape=made))).T
        whole = torch.cat([torch.tensor([[0, 0, *prompts[0]], prompts[1]]), new[:, :-1]], dim=1)
        mask, again = torch.ones_like(whole, dtype=torch.bool), Tape(made.ids_LBSK)
        mask[0, :2] = False
        logits = model.lm_head(model.hidden(whole, token_mask=mask, tape=again)[0])
        assert torch.equal(again.ids_LBSK, made.ids_LBSK) and made.ids_LBSK[:, 0, :2].eq(-1).all()
        assert torch.equal(logits[:, 4:].argmax(-1), new)


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
    for wrong, words in ((ids + 1, "reach from 0 to 8|reach from 1 to 8"), (ids * 0, "name an expert twice"),
                         (ids[0], r"save: ids_LBSK is torch.int32 \[3, 4, 2\], wanted"), (ids.float(), "float32")):
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
                          (moe + 0.5, "got float64, wanted integers"), (None, "got object, wanted integers"),
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
    for wrong, words in ((torch.zeros(2), r"torch.float32 \[2\]"), (np.zeros((1, 1, 1, 1), int), "ndarray"),
                         (torch.zeros(1, 1, 1, 1, dtype=torch.bool), "torch.bool")):
        with pytest.raises(ValueError, match=f"Tape: ids_LBSK is {words}.*, wanted a tensor of integers"):
            Tape(wrong)
    with pytest.raises(ValueError, match="no MoE layer has run yet"):
        Tape().ids_LBSK  # noqa: B018
    with pytest.raises(ValueError, match=r"FusedMoE: ids are torch.int64 \[1, 2\], wanted torch.int32 \[3, 2\]"):
        FusedMoE(4, 3, 5, 2)(torch.zeros(3, 4), ids=torch.zeros(1, 2, dtype=torch.long))


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
                         (["--out", str(tmp_path / "no" / "e.csv")], "there is no folder .*no: make it"),
                         (["--batches", "-1"], "--batches is -1, wanted 0"),
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


@pytest.mark.c_core
def test_the_page_s_python_runs(tmp_path, monkeypatch):
    """docs/replay.md from top to bottom; the part about transformers where it is installed."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (Path(__file__).parent.parent / "docs" / "replay.md").read_text(), re.S)
    names = {}
    for block in blocks:
        if "transformers" not in block or importlib.util.find_spec("transformers"):
            exec(block, names)
    assert len(blocks) == 4 and names["ids_LBSK"].shape == (2, 2, 16, 2) and names["ids_LBSK"][:, 1, 9:].eq(-1).all()
