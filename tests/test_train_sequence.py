"""The driver on ranks that share sequences: the losses of one process, on any other mesh again, and what it says."""
import dataclasses
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from test_choices import quiz, write
from test_train import assert_same_checkpoint, data  # noqa: F401
from test_train_mesh import fit, numbers, same

from moe_ext import evaluate
from moe_ext.choices import each_row
from moe_ext.config import Config, MeshConfig, ModelConfig, MoEConfig, TrainConfig
from moe_ext.data import IndexedDataset
from moe_ext.parallel.mesh import Mesh
from moe_ext.parallel.shard import build

PAGE = Path(__file__).parent.parent / "docs" / "sequence.md"
MESHES = {
    "sp2-ep2": dict(mesh__sp=2, mesh__ep=2),
    "sp2-tp2-ep4": dict(mesh__sp=2, mesh__tp=2, mesh__ep=4),
    "pp2-sp2": dict(mesh__pp=2, mesh__sp=2, pipeline__schedule="1f1b"),
}
SHORT = dict(train__dtype="fp64", train__steps=4, train__save_every=2, train__keep_last=0, train__eval_every=0,
             train__eval_batches=10**6, model__layers=2, optim__warmup=2, model__moe__scope="micro_batch")
APART = "--data.reset-attention", "--data.reset-positions", "--data.mask-end", "--train.keep-best", "--model.tied"


@pytest.fixture(scope="module")
def options(data, tmp_path_factory):                                                        # noqa: F811
    """Dropout, jitter, documents apart; all held-out text, its last row a short one; questions of any length."""
    recipe = tmp_path_factory.mktemp("recipe") / "debug.toml"
    return SHORT | dict(data__choices=write(recipe.with_name("quiz.jsonl"), *quiz(5)),
                        data__tokenizer=data / "tokenizer.json")


@pytest.fixture(scope="module")
def alone(data, options, tmp_path_factory):                                                 # noqa: F811
    folder = tmp_path_factory.mktemp("alone")
    return fit(data, folder, folder / "store", "", *APART, **options)


def equal(folder, alone, begin=0):
    same(folder, alone, begin)
    np.testing.assert_allclose(numbers(folder, "loss"), numbers(alone, "loss")[begin:], rtol=1e-12)


@pytest.mark.parametrize("name", MESHES)
def test_every_step_is_that_of_one_process(data, alone, options, tmp_path, name):           # noqa: F811
    """Then each continues on another mesh, the last one in one process; the first on its own too, bit for bit."""
    folder = fit(data, tmp_path / "own", tmp_path / "store", "", *APART, **options, **MESHES[name])
    equal(folder, alone)
    run, valid = evaluate.load_run(folder), IndexedDataset(data / "valid")      # whole, in this process
    assert evaluate.evaluate(run.model, run.config, valid) == pytest.approx(numbers(folder, "valid_loss")[-1][0],
                                                                            rel=1e-9)
    on = {"other": dict(zip(MESHES, [*list(MESHES.values())[1:], {}], strict=True))[name]}
    for where, mesh in (on | ({"again": MESHES[name]} if name == "sp2-ep2" else {})).items():
        shutil.copytree(folder / "ckpt" / "step-000002", tmp_path / where / "debug" / "ckpt" / "step-000002")
        rest = fit(data, tmp_path / where, tmp_path / f"store-{where}", "auto", *APART, **options, **mesh)
        equal(rest, alone, 2)
        if where == "again":
            assert_same_checkpoint(folder, rest, 4)
        else:
            assert f"mesh.sp was 2 and is {mesh.get('mesh__sp', 1)}" in (rest / "run.log").read_text() or mesh


# ---- 4096 tokens -----------------------------------------------------------------------------------------------------
LONG = dict(train__dtype="fp64", train__steps=2, train__eval_every=0, train__micro_batch=1, train__accumulation=1,
            model__seq_len=4096, model__rope_base=5e5, model__window=700, model__window_full_every=2, optim__warmup=1,
            data__valid="")


@pytest.fixture(scope="module")
def long_alone(data, tmp_path_factory):                                                     # noqa: F811
    folder = tmp_path_factory.mktemp("long")
    return numbers(fit(data, folder, folder / "store", **LONG), "loss", "grad_norm")


@pytest.mark.parametrize("mesh", [dict(mesh__sp=2, mesh__ep=2), dict(mesh__sp=2, mesh__attention="gather"),
                                  dict(mesh__sp=2, mesh__tp=2, mesh__ep=4)], ids=str)
def test_4096_tokens_are_those_of_one_process(data, long_alone, tmp_path, mesh):            # noqa: F811
    folder = fit(data, tmp_path, tmp_path / "store", log__style="megatron", **LONG, **mesh)
    np.testing.assert_allclose(numbers(folder, "loss", "grad_norm"), long_alone, rtol=1e-12)
    said, tp = (folder / "run.log").read_text(), mesh.get("mesh__tp", 1)
    assert f"using world size: {2 * tp}, data-parallel size: 1, context-parallel size: 2, tensor-model-" in said
    assert "\n  context_parallel_size ........................... 2\n" in said
    exchange = "all_gather" if "mesh__attention" in mesh else "a2a"
    assert f"\n  cp_comm_type .................................... ['{exchange}']\n" in said
    assert [line[:8] for line in said.splitlines() if "max reserved" in line] == [
        f"[Rank {rank}]" for rank in range(2 * tp)]


# ---- a needle --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("attention", ["ulysses", "gather"])
@pytest.mark.parametrize("kind", ["whole", "window", "documents"])
def test_a_needle_is_found_across_the_borders_of_ranks(tmp_path, kind, attention):
    """Of 64 tokens on four ranks: the loss at position n changes with the token at i where n sees it, and nowhere else,
    and is one process's."""
    model = ModelConfig(vocab_size=61, seq_len=64, layers=1, dim=16, heads=4, kv_heads=2, init_std=0.2,
                        window=20 if kind == "window" else 0, moe=MoEConfig(experts=4, hidden=12))
    config = Config(model=model, mesh=MeshConfig(sp=4, attention=attention),
                    train=TrainConfig(dtype="fp64", device="cpu"))
    pairs = [(i, n) for n in (0, 15, 16, 17, 31, 32, 63) for i in (None, 0, 12, 15, 16, 31, 32, 47, 63)]
    documents = (torch.arange(64) >= 14).long() + (torch.arange(64) >= 40).long()
    tokens = torch.randint(61, (1, 64), generator=torch.Generator().manual_seed(0)).repeat(len(pairs), 1)
    targets = torch.full_like(tokens, -100)
    for row, (i, n) in enumerate(pairs):
        targets[row, n] = 7
        if i is not None:
            tokens[row, i] = (tokens[row, i] + 1) % 61

    @torch.no_grad()
    def losses(mesh):
        model = build(dataclasses.replace(config, mesh=mesh.config), mesh).eval()
        with each_row(model.lm_head, len(pairs)):
            given = documents.expand_as(tokens) if kind == "documents" else None
            return mesh.sum(model(tokens, targets, documents_BS=given).token_loss)[0]

    want = losses(Mesh(MeshConfig()))
    for got in run_ranks(4, lambda rank: losses(Mesh(config.mesh)), tmp_path):
        torch.testing.assert_close(got, want, rtol=1e-13, atol=0)
        found = dict(zip(pairs, got.tolist(), strict=True))
        for (i, n), loss in found.items():
            if i is not None:
                sees = (i <= n and not (kind == "window" and n - i >= 20)
                        and not (kind == "documents" and documents[i] != documents[n]))
                assert (abs(loss - found[None, n]) > 1e-7) == sees, (i, n)
                assert sees or abs(loss - found[None, n]) < 1e-12


def test_a_rank_may_have_one_token(tmp_path):
    """Of each of three sequences of four tokens, in both forms, with a capacity."""
    model = ModelConfig(vocab_size=61, seq_len=4, layers=1, dim=16, heads=4,
                        moe=MoEConfig(experts=4, hidden=12, capacity_factor=1.0))
    config = Config(model=model, train=TrainConfig(dtype="fp64", device="cpu"))
    tokens, targets = torch.randint(61, (2, 3, 4), generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def losses(*meshes):
        return [mesh.sum(build(dataclasses.replace(config, mesh=mesh.config), mesh)(tokens, targets).token_loss)[0]
                for mesh in map(Mesh, meshes)]

    want = losses(MeshConfig())
    for got in run_ranks(4, lambda rank: losses(*(MeshConfig(sp=4, attention=a) for a in ("ulysses", "gather"))),
                         tmp_path):
        torch.testing.assert_close(got, 2 * want, rtol=1e-13, atol=0)


# ---- the page --------------------------------------------------------------------------------------------------------
def test_attention_in_ones_own_model(tmp_path):
    """docs/sequence.md's, on two ranks: output and summed gradients are those of all tokens in one process."""
    page = {}
    exec(re.search(r"```python\n(.*?)```", PAGE.read_text(), re.S)[1], page)
    generator = torch.Generator().manual_seed(0)
    x_BSD, dy_BSD = torch.randn(2, 2, 24, 32, dtype=torch.float64, generator=generator)

    def found(part):
        torch.manual_seed(1)
        attention = page["Attention"](32, heads=4, kv_heads=2).double()
        (y := attention(part(x_BSD))).backward(part(dy_BSD))
        return y, [p.grad for p in attention.parameters()]

    def body(rank):
        y, grads = found(lambda x: x.chunk(2, dim=1)[rank])
        for grad in grads:
            dist.all_reduce(grad)
        return y, grads
    (first, grads), (second, _) = run_ranks(2, body, tmp_path)
    (tmp_path / "one").mkdir()
    (want, want_grads), = run_ranks(1, lambda rank: found(lambda x: x), tmp_path / "one")
    torch.testing.assert_close([torch.cat([first, second], 1), *grads], [want, *want_grads], rtol=1e-12, atol=1e-12)
