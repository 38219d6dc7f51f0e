"""moe_ext.check shampoo and muon: one curve on every mesh, unlike a preconditioner of shards; norms stay fp32."""
import contextlib
import dataclasses
import io
import re
import sys

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from test_check import run_check
from torch import nn
from torch.distributed.tensor import DTensor

from moe_ext.check import __main__, optimizers
from moe_ext.check.optimizers import BAR, LOG, OneMuon, OneShampoo
from moe_ext.check.world import World
from moe_ext.config import Config, ConfigError, MeshConfig, ModelConfig, MoEConfig, TrainConfig
from moe_ext.model import precision
from moe_ext.optim import build_optimizer
from moe_ext.parallel.mesh import Mesh
from moe_ext.parallel.shard import backward, build

TINY = dict(dim=32, heads=4, layers=1, lr=1e-2, steps=40, dtype="fp64")
SHAMPOO = OneShampoo(**TINY, freq=10)
CURVE = re.compile(r"^\((\d+)th step\) loss: (\S+)$", re.MULTILINE)


def alone():
    return World(dist.HashStore(), 0, 1, 0, device="cpu")


def table(command):
    """What --all prints, whether all was right, and the last two columns of each mesh: (differs, WRONG or nothing)."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        fine = dataclasses.replace(command, all=True).run(alone())
    text = printed.getvalue()
    rows = re.findall(r"^DP (\d) SHARD (\d) TP (\d) .*  (\S+?e[+-]\d+)( WRONG)?$", text, re.MULTILINE)
    return text, fine, {tuple(map(int, row[:3])): (float(row[3]), bool(row[4])) for row in rows}


@pytest.mark.parametrize("command", [
    dataclasses.replace(SHAMPOO, init="default", graft_eps=1e-8),
    OneMuon(**TINY | dict(lr=3e-2)),
], ids=lambda command: type(command).__name__)
def test_one_curve_on_every_mesh(command):
    text, fine, rows = table(command)
    assert fine and text.endswith(": ok\n"), text
    assert list(rows) == [(1, 1, 1), (1, 2, 1), (1, 4, 1), (2, 2, 1), (1, 2, 2)]
    assert {differs for (_, _, tp), (differs, _) in rows.items() if tp == 1} == {0.0}, "bits"


def test_what_a_run_prints(tmp_path):
    """The same digits on one rank and on several, after the public program's banner."""
    texts = {}
    for ranks, sizes in (1, dict()), (2, dict(dp=1, shard=2)), (2, dict(dp=2, shard=1)):
        folder = tmp_path / f"{sizes}"
        folder.mkdir()
        texts[str(sizes)], fine = run_check(ranks, dataclasses.replace(SHAMPOO, **sizes), folder)
        assert all(fine)
    one, *others = map(CURVE.findall, texts.values())
    assert [step for step, _ in one] == ["10", "20", "30", "40"] and float(one[-1][1]) < BAR
    assert others == [one, one]
    text = texts["{'dp': 2, 'shard': 1}"]
    assert "    world_size: 2\n    DP: 2\n    SHARD: 1\n" in text and "(embed_tokens): Embedding(256, 32)" in text
    assert re.search(r"^the last loss, \S+, is below 0.003: right on every rank$", text, re.MULTILINE)


def test_a_public_log_stands_beside_its_own_settings(monkeypatch):
    monkeypatch.setattr(optimizers, "MESHES", optimizers.MESHES[:1])
    assert all(len(curve) == 10 for curves in LOG.values() for curve in curves.values())
    assert OneShampoo(init="meta", graft_eps=1e-8).logged()["FSDP2 1x4"][-1] == 2.3602
    assert not OneShampoo(freq=20, start_step=40).logged() and not OneMuon().logged()
    text, fine, rows = table(dataclasses.replace(SHAMPOO, freq=20, steps=20))
    assert "FSDP1 2x2              1.35e+00 1.03e+00\n" in text
    assert not fine and all(wrong for _, wrong in rows.values()), "20 steps are not enough"


def test_the_logs_settings_reach_the_optimizer():
    group, _ = build_optimizer(nn.Linear(4, 4), OneShampoo(freq=100, graft_eps=1e-8).optim()).param_groups
    for command in OneShampoo, OneMuon:
        assert command(lr=1e-6).config(1).optim.lr == 1e-6, "no floor of a schedule, of which there is none"
    wanted = dict(lr=1e-3, betas=(0.9, 0.999), epsilon=1e-12, weight_decay=1e-5, grafting="adam", graft_eps=1e-8,
                  precondition_frequency=100, start_preconditioning_step=100, use_decoupled_weight_decay=True)
    assert wanted == {name: group[name] for name in wanted}


def test_shards_as_matrices_are_noticed(monkeypatch):
    """What the public log's stuck runs did: each rank preconditions what it holds."""
    build_optimizer = optimizers.build_optimizer

    class Shards(nn.Module):
        """A model's local parts as parameters of their own."""
        def __init__(self, model):
            super().__init__()
            self.whole = dict(model.named_parameters())
            for name, p in self.whole.items():
                local = p.to_local() if isinstance(p, DTensor) else p.data
                self.register_parameter(name.replace(".", "/"), nn.Parameter(local))

        def step(self):
            for p, mine in zip(self.whole.values(), self.parameters(), strict=True):
                mine.grad = p.grad.to_local() if isinstance(p, DTensor) else p.grad
            self.optimizer.step()

        def zero_grad(self):
            for p in self.whole.values():
                p.grad = None

    def per_shard(model, optim):
        shards = Shards(model)
        shards.optimizer = build_optimizer(shards, optim)
        return shards

    monkeypatch.setattr(optimizers, "build_optimizer", per_shard)
    monkeypatch.setattr(optimizers, "MESHES", optimizers.MESHES[:2])
    text, fine, rows = table(SHAMPOO)
    assert not fine and rows[1, 1, 1] == (0.0, False), text
    differs, wrong = rows[1, 2, 1]
    assert wrong and differs > 1e-2, text


@pytest.mark.parametrize("command, ranks, sentence", [
    (OneShampoo(freq=0), 1, r"--freq is 0, wanted a number of steps, as 20"),
    (OneShampoo(freq=100, start_step=20), 1, r"--start-step is 20, before .* --freq 100: give --start-step 100 or"),
    (OneShampoo(vocab=100), 1, r"--vocab is 100, but tokens are bytes: give 256 or more"),
    (OneShampoo(steps=0), 1, r"--steps is 0, wanted 1 or more"),
    (OneShampoo(dp=2), 1, r"DP 2 \* SHARD 1 \* TP 1 = 2, but there are 1 ranks"),
    (OneMuon(dp=1, shard=3), 4, r"DP 1 \* SHARD 3 \* TP 1 = 3, but there are 4 ranks"),
    (OneMuon(dp=0), 1, r"DP 0 \* SHARD 1 \* TP 1 = 0, but there are 1 ranks"),
    (OneMuon(lr=-1.0), 1, r"optim.lr -1.0"),
    (OneMuon(ep=2), 1, r"EP is 2, but this model is dense"),
    (OneMuon(dim=60), 1, r"model.dim 60 is not a multiple of model.heads 8"),
], ids=lambda value: value if isinstance(value, str) else None)
def test_senseless_options(command, ranks, sentence):
    with pytest.raises(ConfigError, match=sentence):
        command.config(ranks)


def test_all_forks_for_itself_and_checks_first(capfd):
    two = alone()
    two.size = 2
    with pytest.raises(ConfigError, match="--all forks the ranks of every mesh itself: run it without torchrun"):
        OneShampoo(all=True).run(two)
    with pytest.raises(ConfigError, match="--all forks ranks on the CPU: leave --device cuda out"):
        OneShampoo(all=True, device="cuda").run(alone())
    with pytest.raises(ConfigError, match=r"mesh\.tp"):
        OneShampoo(all=True, heads=1, dim=32).run(alone())
    assert capfd.readouterr().err == "", "no rank began"


def test_an_unknown_init_is_refused_on_the_command_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["check", "shampoo", "--init", "zeros"])
    with pytest.raises(SystemExit):
        __main__.main()
    said = capsys.readouterr()
    assert "zeros" in said.err + said.out and "default" in said.err + said.out


# ---- norms under mixed precision -------------------------------------------------------------------------------------
def test_learns_under_mixed_precision(tmp_path):
    for ranks in 1, 2:
        folder = tmp_path / str(ranks)
        folder.mkdir()
        text, fine = run_check(ranks, dataclasses.replace(SHAMPOO, dtype="bf16"), folder)
        assert all(fine), text


NORMS = [ModelConfig(vocab_size=64, seq_len=8, layers=2, dim=32, heads=4, hidden=32, norm=norm, bias=bias,
                     qk_norm=True, moe=MoEConfig(experts=4, top_k=2, hidden=16, dense_layers=1))
         for norm, bias in (("layernorm", True), ("rmsnorm", False))]


@pytest.mark.parametrize("model", NORMS, ids=lambda model: model.norm)
@pytest.mark.parametrize("sizes", [dict(), dict(fsdp=2), dict(rep=2), dict(tp=2), dict(fsdp=2, tp=2, ep=2)], ids=str)
def test_norms_are_fp32_under_mixed_precision(model, sizes):
    """Parameters and statistics, on every mesh: FSDP casts neither, and a norm of x is that of fp64 but for fp32's
    rounding, which is far from bf16's, and one rounding of the result to what the products behind it read."""
    mesh_config = MeshConfig(**sizes)
    config = Config(model=model, mesh=mesh_config, train=TrainConfig(dtype="bf16", device="cpu"))

    def body(rank):
        mesh, seen = Mesh(config.mesh), []

        def look(module, args, result):
            weights = [p.to_local() if isinstance(p, DTensor) else p for p in module.parameters()]
            local = [x.to_local() if isinstance(x, DTensor) else x for x in args]
            x, result = (local[0], result) if len(args) == 1 else (local[0] + local[1], result[1])  # of a sum: both
            assert {p.dtype for p in weights} == {torch.float32}, module
            shape, (weight, *bias) = (x.shape[-1],), [w.double() for w in weights]
            want = nn.functional.layer_norm(x.double(), shape, weight, *bias, eps=module.eps) if isinstance(
                module, nn.LayerNorm) else nn.functional.rms_norm(x.double(), shape, weight, module.eps)
            got = result.to_local() if isinstance(result, DTensor) else result
            assert got.dtype in (torch.float32, torch.bfloat16), module
            rounding = 2**-8 * want.abs() if got.dtype == torch.bfloat16 else 0
            assert ((got - want).abs() <= rounding + 1e-5).all(), module
            seen.append(module)

        gpt = build(config, mesh)
        norms = [module for module in gpt.modules() if isinstance(module, (nn.LayerNorm, nn.RMSNorm))]
        for norm in norms:
            norm.register_forward_hook(look)
        tokens_BS = torch.arange(8)[None]
        with precision(config, mesh.device):
            out = gpt(tokens_BS, tokens_BS)
        backward(gpt, out, mesh, tokens=8 * config.mesh.dp)
        assert set(seen) == set(norms) and len(norms) == 9
        assert {p.grad.dtype for norm in norms for p in norm.parameters()} == {torch.float32}

    run_ranks(mesh_config.world, body)
