"""Checkpoints on meshes: saved on any, loaded on any other, bit for bit; an error of one rank is an error of all."""
import dataclasses
import functools
import json
import os
import re
import shutil
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch._dynamo  # fully_shard imports it, which takes seconds: once here, not in every rank
import torch.distributed as dist
from ranks import fork, run_ranks
from safetensors import safe_open
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from moe_ext.checkpoint import CheckpointError, latest, load, on_rank_0, save, whole
from moe_ext.config import Config, MeshConfig, ModelConfig, MoEConfig, OptimConfig, PipelineConfig, TrainConfig
from moe_ext.model import GPT
from moe_ext.optim import Muon, Shampoo, build_optimizer
from moe_ext.optim.adamw import AdamW
from moe_ext.optim.together import Together
from moe_ext.parallel.mesh import Mesh
from moe_ext.parallel.shard import build
from moe_ext.parallel.stages import Stage
from moe_ext.proof import local, own

MESHES = {      # name -> rep, fsdp, tp, ep, etp; efsdp is fsdp * tp / (ep * etp)
    "one": (1, 1, 1, 1, 1),
    "fsdp2": (1, 2, 1, 1, 1), "tp2 ep2": (1, 1, 2, 2, 1),
    "fsdp4": (1, 4, 1, 1, 1), "rep2 ep2": (2, 2, 1, 2, 1),
    "fsdp2 tp2 ep2": (1, 2, 2, 2, 1), "fsdp2 tp2 ep2 etp2": (1, 2, 2, 2, 2)}
OVER_TP = {"embed.weight": 0, "column.weight": 0, "row.weight": 1}          # the dimension of each; others are equal
OVER_ETP = {"experts.w13_E2FD": 2, "experts.w2_EDF": 2}
OVER_FSDP = {"embed.weight": 1, "column.weight": 1, "experts.w13_E2FD": 3, "experts.w2_EDF": 1}     # others: 0
CONFIG = {"model": {"dim": 8}}


def world_of(mesh):
    rep, fsdp, tp, _, _ = MESHES[mesh]
    return rep * fsdp * tp


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.w13_E2FD = nn.Parameter(torch.randn(4, 2, 6, 8))
        self.w2_EDF = nn.Parameter(torch.randn(4, 8, 6))


class Model(nn.Module):
    """Parameters without a forward: a tied table, both kinds of linear layer, experts, a scalar on every rank, and
    two whose dimension 0 four ranks do not divide: of row.bias one has less than the others, of norm.weight nothing."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.column = nn.Linear(8, 16, bias=False)
        self.row = nn.Linear(16, 7)
        self.norm = nn.RMSNorm(3)
        self.scale = nn.Parameter(torch.randn(()))
        self.experts = Experts()
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("select_bias_E", torch.randn(4))


def place(model, mesh):
    """Makes the parameters DTensors on the mesh's dense (rep, fsdp, tp) and sparse (rep, efsdp, ep, etp) form."""
    rep, fsdp, tp, ep, etp = MESHES[mesh]
    if world_of(mesh) == 1:
        return
    dense = init_device_mesh("cpu", (rep, fsdp, tp), mesh_dim_names=("rep", "fsdp", "tp"))
    sparse = init_device_mesh("cpu", (rep, fsdp * tp // (ep * etp), ep, etp),
                              mesh_dim_names=("rep", "efsdp", "ep", "etp"))
    over_fsdp = {}
    for module_name, module in model.named_modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            name = f"{module_name}.{key}".lstrip(".")
            if name == "scale":
                replicated = distribute_tensor(parameter.data, dense, [Replicate()] * 3, src_data_rank=None)
                model.scale = nn.Parameter(replicated)
                continue
            if name == "head.weight":
                module.weight = model.embed.weight
                continue
            if name.startswith("experts"):
                inner, placements = sparse["ep", "etp"], [Shard(0), Shard(OVER_ETP[name])]
            else:
                inner, placements = dense["tp"], [Shard(OVER_TP[name]) if name in OVER_TP else Replicate()]
            if inner.size() > 1:
                parameter = nn.Parameter(distribute_tensor(parameter.data, inner, placements, src_data_rank=None))
                setattr(module, key, parameter)
            if inner.size() > 1 or name.startswith("experts"):
                over_fsdp[parameter] = Shard(OVER_FSDP.get(name, 0))
    fully_shard(model.experts, mesh=sparse["rep", "efsdp"], shard_placement_fn=over_fsdp.get)
    fully_shard(model, mesh=dense["rep", "fsdp"], shard_placement_fn=over_fsdp.get, ignored_params={model.scale})


class Stream:
    """A data loader without data."""

    def __init__(self, row=0):
        self.row = row

    def state_dict(self):
        return {"row": self.row}

    def load_state_dict(self, state):
        self.row = state["row"]


class Run:
    def __init__(self, mesh, seed):
        torch.manual_seed(seed)
        self.model = Model()
        place(self.model, mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01, fused=True)
        self.loader = Stream(row=seed)

    def step(self, number):
        """An update by gradients that are a function of the step's number, on every mesh the same."""
        for index, parameter in enumerate(self.model.parameters()):
            generator = torch.Generator().manual_seed(100 * number + index)
            gradient = torch.randn(parameter.shape, generator=generator)
            if isinstance(parameter, DTensor):
                gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.grad = gradient
        self.optimizer.step()

    def save(self, folder, step, **options):
        return save(folder, model=self.model, optimizer=self.optimizer, loader=self.loader, step=step,
                    **{"config": CONFIG, **options})

    def load(self, path, config=CONFIG):
        return load(path, model=self.model, optimizer=self.optimizer, loader=self.loader, config=config)

    def tensors(self):
        """Everything that a checkpoint must restore."""
        tensors = dict(self.model.state_dict(), rng=torch.get_rng_state(), row=torch.tensor(self.loader.row))
        for name, parameter in self.model.named_parameters():
            tensors |= {f"{name}.{key}": value for key, value in self.optimizer.state[parameter].items()}
        return tensors

    def values(self):
        """The same whole, on every rank."""
        return full(self.tensors())


def full(tensors):
    """Copies, gathered."""
    return {name: (t.detach().full_tensor() if isinstance(t, DTensor) else t.detach()).clone()
            for name, t in tensors.items()}


def differing(a, b):
    """Names of the tensors that are not the same bits."""
    assert a.keys() == b.keys()
    return [name for name in a if a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name])]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Every mesh's checkpoint of step 2, {mesh: (path, values at step 2, values at step 3)}."""
    folder, found = tmp_path_factory.mktemp("saved"), {}

    def body(rank):
        results = {}
        for seed, mesh in enumerate(MESHES):
            if world_of(mesh) == dist.get_world_size():
                run = Run(mesh, seed)
                run.step(1)
                run.step(2)
                torch.manual_seed(1000 + rank)
                path = run.save(folder / mesh, 2, best_loss=2.5, extra={"scale": 2.0**seed})
                results[mesh] = str(path), run.values(), (run.step(3), run.values())[1]
        return results
    for world in (1, 2, 4):
        (folder / str(world)).mkdir()
        found |= run_ranks(world, body, folder / str(world))[0]
    assert found.keys() == MESHES.keys()
    return found


@pytest.mark.parametrize("world", [1, 2, 4])
def test_any_mesh_loads_any_other(tmp_path, saved, world):
    """Values, moments, steps and what is not a tensor; and on the same mesh the next step is the same bits."""
    def body(rank):
        for mesh in MESHES:
            if world_of(mesh) != world:
                continue
            for seed, (other, (path, then, after)) in enumerate(saved.items()):
                run = Run(mesh, seed=50 + rank)
                state = run.load(path)
                assert not differing(run.values(), then), f"{other} -> {mesh}"
                assert (state.step, state.best_loss, state.extra) == (2, 2.5, {"scale": 2.0**seed})
                for p in run.model.parameters():
                    for key, value in run.optimizer.state[p].items():
                        like = (value.device_mesh, value.placements) if isinstance(value, DTensor) else None
                        wanted = (p.device_mesh, p.placements) if isinstance(p, DTensor) and key != "step" else None
                        assert like == wanted, f"{other} -> {mesh}: {key}"
                if mesh == other:
                    run.step(3)
                    assert not differing(run.values(), after), mesh
    run_ranks(world, body, tmp_path)


def boxes(path):
    """{stored name: [(first index, size of each dimension)]} over all files of a checkpoint."""
    found = {}
    for file in sorted(Path(path).glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            offsets = json.loads(tensors.metadata()["DCP_SHARDING_INFO"])
            for name in tensors.keys():
                box = offsets[name]["saved_offsets"], tensors.get_slice(name).get_shape()
                found.setdefault(name, []).append(box)
    return found


def test_what_is_on_disk(saved):
    """Every box once, whoever has it, every plain tensor once, and rank 0's generator."""
    path, then, _ = saved["rep2 ep2"]
    found = boxes(path)
    assert sorted(found["model.experts.w2_EDF"]) == [([0, 0, 0], [2, 8, 6]), ([2, 0, 0], [2, 8, 6])]
    assert sorted(found["optim.row.bias.exp_avg"]) == [([0], [4]), ([4], [3])]
    assert found["model.select_bias_E"] == [([0], [4])] and found["optim.row.bias.step"] == [([], [])]
    assert len(found["rng.cpu"]) == 1 and torch.equal(then["rng"], torch.manual_seed(1000).get_state())
    assert len(list(Path(path).iterdir())) == 5
    assert sorted(boxes(saved["fsdp4"][0])["model.norm.weight"]) == [([0], [1]), ([1], [1]), ([2], [1]), ([3], [0])]
    found = boxes(saved["fsdp2 tp2 ep2"][0])["model.experts.w13_E2FD"]
    assert sorted(found) == [([e, 0, 0, d], [2, 2, 6, 4]) for e in (0, 2) for d in (0, 4)]


# ---- the GPT under fully_shard ---------------------------------------------------------------------------------------
SHAPE = ModelConfig(vocab_size=64, seq_len=8, layers=2, dim=16, heads=2, hidden=32, tied=True,
                    moe=MoEConfig(experts=4, hidden=16, dense_layers=1, score="sigmoid", select_bias_rate=0.01))


class Training:
    """The GPT, sharded as it comes: each block, and the root, which stays gathered after a forward."""

    def __init__(self, seed, rep=1):
        self.model, world = GPT(SHAPE, seed=seed), dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        if world > 1:
            mesh = init_device_mesh("cpu", (rep, world // rep), mesh_dim_names=("rep", "fsdp"))
            for block in self.model.layers:
                fully_shard(block, mesh=mesh)
            fully_shard(self.model, mesh=mesh, reshard_after_forward=False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01, fused=True)

    def step(self, number):
        tokens = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(10 * number + self.rank))
        out = self.model(tokens[:, :-1], tokens[:, 1:])
        (out.token_loss + out.aux_loss).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.model.update_select_bias(torch.tensor([[number, 1, 2, 3]]))

    def evaluate(self):
        with torch.no_grad():
            tokens = torch.arange(9)[None]
            return self.model(tokens[:, :-1], tokens[:, 1:]).token_loss.item()

    def gathered(self):
        return not isinstance(self.model.embed_tokens.weight, DTensor)

    def values(self):
        tensors = dict(self.model.state_dict())
        for name, parameter in self.model.named_parameters():
            tensors |= {f"{name}.{key}": value for key, value in self.optimizer.state[parameter].items()}
        return full(tensors)

    def save(self, folder):
        return save(folder, model=self.model, optimizer=self.optimizer, loader=Stream(), step=2, config=CONFIG)

    def load(self, path):
        load(path, model=self.model, optimizer=self.optimizer, loader=Stream(), config=CONFIG)


@pytest.mark.parametrize("when", ["after an evaluation", "after a step", "before the update"])
def test_the_gpt(tmp_path, when):
    """Saved and loaded where FSDP2 holds gathered parameters; continued bitwise; and in one process the same model."""
    def body(rank):
        training = Training(seed=1)
        training.step(1)
        training.step(2)
        if when == "after an evaluation":
            training.evaluate()
        if when == "before the update":     # forward and backward are done
            tokens = torch.arange(9)[None]
            training.model(tokens[:, :-1], tokens[:, 1:]).token_loss.backward()
            training.optimizer.zero_grad()
        assert training.gathered() == (when == "after an evaluation")
        path = training.save(tmp_path)
        saved = training.values()
        training.step(3)
        straight = training.values()

        again = Training(seed=2)
        again.evaluate()
        assert again.gathered()
        again.load(path)
        assert not differing(again.values(), saved)
        again.step(3)
        assert not differing(again.values(), straight)
        return str(path), saved
    path, saved = run_ranks(2, body, tmp_path)[0]

    alone = Training(seed=3)
    alone.load(path)
    assert not differing(alone.values(), saved)

    def on_four(rank):
        training = Training(seed=4, rep=2)
        training.load(path)
        assert not differing(training.values(), saved)
    (tmp_path / "four").mkdir()
    run_ranks(4, on_four, tmp_path / "four")


# ---- an error of one rank is an error of all -------------------------------------------------------------------------
def raised(action):
    """Type and text of what an action raises."""
    with pytest.raises(Exception) as error:
        action()
    return type(error.value).__name__, str(error.value)


def fail(*_, **__):
    raise OSError(28, "No space left on device")


def fail_to_write(run, patch):
    patch.setattr("torch.distributed.checkpoint.filesystem.os.fsync", fail)


def fail_to_travel(run, patch):
    class Local(Exception):
        pass

    def state_dict():
        raise Local("no position")
    run.loader.state_dict = state_dict


def hold_no_tensor(run, patch):
    run.optimizer.state[run.model.norm.weight]["note"] = "text"


@pytest.mark.parametrize("spoil, on, message", [
    (fail_to_write, 1, r"CheckpointError: .*step-000003 was not saved, .*: rank 1: OSError: .*No space left on device"),
    (fail_to_write, 0, r"CheckpointError: .*step-000003 was not saved, .*: rank 0: OSError: .*No space left on device"),
    (fail_to_travel, 1, r"CheckpointError: rank 1: Local: no position"),
    (hold_no_tensor, 1, r"CheckpointError: optim.norm.weight.note: got str, wanted a tensor"),
    (lambda run, patch: patch.setattr(Path, "mkdir", fail), 0, r"OSError: .*No space left on device"),
    (lambda run, patch: patch.setattr(Path, "rename", fail), 0, r"OSError: .*No space left on device"),
    (lambda run, patch: patch.setattr(Path, "is_dir", lambda path: False), 1,
     r"CheckpointError: .*step-000003.*: made by rank 0, but rank 1 does not see it")])
def test_a_save_that_fails_on_one_rank(tmp_path, spoil, on, message):
    """Every rank raises the same, the old checkpoint stays the newest, and the next save is a save."""
    def body(rank):
        run, folder = Run("fsdp2", 1), tmp_path / "ckpt"
        run.step(1)
        run.save(folder, 1)
        values = run.values()
        run.step(2)
        with pytest.MonkeyPatch.context() as patch:
            if rank == on:
                spoil(run, patch)
            error = raised(lambda: run.save(folder, 3))
        assert on_rank_0(lambda: whole(folder)) == [folder / "step-000001"]
        other = Run("fsdp2", 2)
        other.load(folder / "step-000001")
        assert not differing(other.values(), values)
        other.save(folder, 4, keep_last=1)
        assert on_rank_0(lambda: os.listdir(folder)) == ["step-000004"]
        return error
    first, second = run_ranks(2, body, tmp_path)
    assert first == second and re.match(message, ": ".join(first))


def drop_last_box(path):
    """The file of the rank that holds the last rows."""
    next(file for file in path.glob("*.safetensors") if "00002" in file.name).unlink()


def cut(path):
    file = max(path.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize("spoil, message", [
    (lambda path: (path / "state.json").unlink(), r"FileNotFoundError: no checkpoint"),
    (lambda path: (path / "state.json").write_text("{"), r"CheckpointError: .*damaged"),
    (cut, r"CheckpointError: .*truncated or damaged .safetensors"),
    (drop_last_box, r"CheckpointError: .* use another checkpoint")])
def test_a_damaged_checkpoint(tmp_path, spoil, message):
    """The same refusal on every rank, and nothing has been touched."""
    def body(rank):
        run = Run("fsdp2", 1)
        run.step(1)
        path = run.save(tmp_path / "ckpt", 1)
        on_rank_0(lambda: spoil(path))
        other = Run("fsdp2", 2)
        other.step(1)
        values = other.values()
        error = raised(lambda: other.load(path))
        assert not differing(other.values(), values)
        return error
    first, second = run_ranks(2, body, tmp_path)
    assert first == second and re.match(message, ": ".join(first))


@pytest.mark.parametrize("file", range(4))
def test_a_missing_box_is_missed(tmp_path, saved, file):
    """Without any one of its files a checkpoint does not load: also where the hole is in the middle of every tensor."""
    path = Path(shutil.copytree(saved["fsdp4"][0], tmp_path / "step-000002"))
    sorted(path.glob("*.safetensors"))[file].unlink()
    model = Model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"copy all files of its folder|missing from the"):
        load(path, model=model)
    assert not differing(model.state_dict(), before)


def test_one_rank_that_does_not_fit_holds_back_all(tmp_path):
    def body(rank):
        run = Run("fsdp2", 1)
        run.step(1)
        path = run.save(tmp_path / "ckpt", 1)
        other = Run("fsdp2", 2)
        other.step(1)
        values = other.values()
        error = raised(lambda: other.load(path, config={"model": {"dim": 8 + rank}}))
        assert not differing(other.values(), values)
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:
                patch.setattr("safetensors.safe_open", fail)
            unopened = raised(lambda: other.load(path))
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:
                patch.setattr("moe_ext.checkpoint.HuggingFaceStorageReader.read_data", fail)
            unread = raised(lambda: other.load(path))
        return error, unopened, unread
    first, second = run_ranks(2, body, tmp_path)
    assert first == second and "model.dim: the checkpoint has 8, this run wants 9" in first[0][1]
    assert first[1][0] == "OSError" and first[2][0] == "CheckpointError"
    assert "use an earlier checkpoint: rank 1: OSError" in first[2][1]


def test_ranks_agree_on_the_newest(tmp_path):
    """What rank 0 sees holds, and what it raises."""
    (tmp_path / "0" / "step-000007").mkdir(parents=True)
    (tmp_path / "1" / "step-000008").mkdir(parents=True)

    def body(rank):
        name = on_rank_0(lambda: latest(tmp_path / str(rank))).name
        return name, raised(lambda: on_rank_0(lambda: os.listdir(tmp_path / f"none{rank}")))
    first, second = run_ranks(2, body, tmp_path)
    assert first == second and first[0] == "step-000007" and "none0" in first[1][1]


@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_that_dies_while_it_saves(tmp_path, killed):
    """The others end with an exception, and the old checkpoint is the newest."""
    folder, children = tmp_path / "ckpt", []
    for rank in range(3):
        child = fork()
        if child == 0:
            status = 1
            try:
                torch.set_num_threads(1)
                store = dist.FileStore(f"{tmp_path}/store", 3)
                limit = timedelta(seconds=30)
                dist.init_process_group("gloo", store=store, rank=rank, world_size=3, timeout=limit)
                model = fully_shard(nn.Linear(8, 7))
                optimizer = torch.optim.AdamW(model.parameters())
                arguments = dict(model=model, optimizer=optimizer, loader=Stream(), config=CONFIG)
                save(folder, step=1, **arguments)
                if rank == killed:
                    os.fsync = lambda descriptor: os._exit(7)
                save(folder, step=2, **arguments)
            except RuntimeError:    # gloo's: closed connection or timeout
                status = 8
            finally:
                os._exit(status)
        children.append(child)
    ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert ends == [7 if rank == killed else 8 for rank in range(3)]
    assert [path.name for path in whole(folder)] == ["step-000001"]


# ---- pipelines, and ranks that share sequences -----------------------------------------------------------------------
PIPELINES = {   # name -> mesh, chunks
    "one": (dict(), 1),
    "pp2": (dict(pp=2), 1), "sp2 ep2": (dict(sp=2, ep=2), 1),
    "pp4": (dict(pp=4), 1), "pp2 tp2 ep2": (dict(pp=2, tp=2, ep=2), 2), "pp2 fsdp2": (dict(pp=2, fsdp=2), 2),
    "pp2 sp2": (dict(pp=2, sp=2), 2)}
DEEP = ModelConfig(vocab_size=50, seq_len=8, layers=4, dim=16, heads=2, hidden=32, tied=True,
                   moe=MoEConfig(experts=4, hidden=16, dense_layers=1, score="sigmoid", select_bias_rate=0.01,
                                 shared_hidden=8, shared_gate=True))


class Staged(Run):
    """A stage of the GPT, with gradients that are a function of the step's number and the parameter's name."""

    def __init__(self, pipeline, seed, model=DEEP):
        mesh, chunks = PIPELINES[pipeline]
        config = Config(model=model, mesh=MeshConfig(**mesh), pipeline=PipelineConfig(chunks=chunks),
                        train=TrainConfig(seed=seed))
        self.model = build(config, Mesh(config.mesh))
        self.optimizer = build_optimizer(self.model, OptimConfig(lr=0.01))
        self.loader = Stream(row=seed)

    def step(self, number):
        for name, p in self.model.named_parameters():
            generator = torch.Generator().manual_seed(1000 * number + sum(map(ord, name)))
            p.grad = torch.randn(p.shape, generator=generator)
            if isinstance(p, DTensor):
                p.grad = distribute_tensor(p.grad, p.device_mesh, p.placements, src_data_rank=None)
        self.optimizer.step()
        self.model.update_select_bias(torch.arange(12).view(3, 4) * number)

    def values(self):
        own = super().values()
        return self.model.joined(own) if isinstance(self.model, Stage) else own

    def differing(self, whole):
        """Names of this rank's parts that are not those of the whole tensors."""
        return [name for name, t in self.tensors().items() if not torch.equal(local(t), own(whole[name], t))]


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    """As `saved`, of every pipeline."""
    folder, found = tmp_path_factory.mktemp("staged"), {}

    def body(rank):
        results = {}
        for seed, (pipeline, (mesh, _)) in enumerate(PIPELINES.items(), start=1):
            if MeshConfig(**mesh).world == dist.get_world_size():
                run = Staged(pipeline, seed)
                run.step(1)
                run.step(2)
                path = run.save(folder / pipeline, 2)
                results[pipeline] = str(path), run.values(), (run.step(3), run.values())[1]
        return results
    for world in (1, 2, 4):
        (folder / str(world)).mkdir()
        found |= run_ranks(world, body, folder / str(world))[0]
    assert found.keys() == PIPELINES.keys()
    return found


@pytest.mark.parametrize("world", [1, 2, 4])
def test_any_pipeline_loads_any_other(tmp_path, staged, world):
    """Values, moments and steps; the next step is the same bits, also on another pipeline, for gradients of the same
    bits; and what is saved again is what was saved."""
    def body(rank):
        for pipeline, (mesh, _) in PIPELINES.items():
            if MeshConfig(**mesh).world != world:
                continue
            run = Staged(pipeline, seed=50)
            for other, (path, then, after) in staged.items():
                run.load(path)
                assert not run.differing(then), f"{other} -> {pipeline}"
                run.step(3)
                assert not run.differing(after), f"{other} -> {pipeline}"
    run_ranks(world, body, tmp_path)


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_a_pipeline_writes_every_value_once(staged, pipeline):
    """The boxes tile the tensors: plain ones of stages with one rank, the tied table that two stages have, states."""
    path, then, _ = staged[pipeline]
    found = boxes(path)
    states = json.loads((Path(path) / "state.json").read_text())["optimizer"]["states"]
    names = {f"optim.{name}.{key}" for name, of in states.items() for key in of}
    assert found.keys() == {*names, "rng.cpu", *(f"model.{name}" for name in GPT(DEEP, device="meta").state_dict()
                                                if name != "lm_head.weight")}
    for name, parts in found.items():
        filled = torch.zeros(then["rng" if name == "rng.cpu" else name.partition(".")[2]].shape, dtype=torch.int)
        for first, size in parts:
            filled[tuple(slice(begin, begin + n) for begin, n in zip(first, size, strict=True))] += 1
        assert (filled == 1).all(), name


def test_a_pipeline_refuses_as_one(tmp_path, staged):
    """Other models, and a parameter that one stage alone does not move: the same sentence on every rank of every stage,
    that of one process where it can find the fault."""
    models = {"missing": dataclasses.replace(DEEP, layers=5), "unexpected": dataclasses.replace(DEEP, layers=3),
              "shape": dataclasses.replace(DEEP, vocab_size=64)}
    path = staged["pp2 fsdp2"][0]

    def body(rank, pipeline="pp2"):
        said = {}
        for name, model in models.items():
            run = Staged(pipeline, seed=9, model=model)
            before = run.values()
            said[name] = raised(lambda run=run: run.load(path))
            assert not differing(run.values(), before)
        run = Staged(pipeline, seed=9)
        frozen = dict(run.model.named_parameters()).get("layers.3.mlp.gate.weight")
        for group in run.optimizer.param_groups:
            group["params"] = [p for p in group["params"] if p is not frozen]
        said["frozen"] = raised(lambda: run.load(path))
        run = Staged(pipeline, seed=9)
        with pytest.MonkeyPatch.context() as patch:
            if rank == dist.get_world_size() - 1:
                fail_to_write(run, patch)
            said["full disk"] = raised(lambda: run.save(tmp_path / "ckpt", 3))
        return said
    for world in ("one", "two"):
        (tmp_path / world).mkdir()
    alone, = run_ranks(1, lambda rank: body(rank, "one"), tmp_path / "one")
    first, last = run_ranks(2, body, tmp_path / "two")
    assert first == last
    assert {name: said for name, said in first.items() if name != "full disk"} == \
        {name: said for name, said in alone.items() if name != "full disk"}
    assert "missing from the checkpoint: model.layers.4." in first["missing"][1]
    assert "unexpected in the checkpoint: model.layers.3." in first["unexpected"][1]
    assert "rank 1: OSError" in first["full disk"][1] and "layers.3.mlp.gate.weight" in first["frozen"][1]


# ---- Muon, Shampoo and AdamW by rule: states of owners ---------------------------------------------------------------
SMALL = dataclasses.replace(DEEP, layers=2, moe=dataclasses.replace(DEEP.moe, experts=2))


def optimizer_of(model, which, state="full", most=24):
    """`which` moves matrices and stacks of them, or of "muon shampoo" each one of these; AdamW the rest."""
    def part(p):
        return "adamw" if p.ndim < 2 or p.shape[0] == 50 else which.split()[-1 if p.ndim == 2 else 0]
    make = {"adamw": lambda params: AdamW(params, 0.01, (0.9, 0.95), state=state),
            "muon": lambda params: Muon(params, 0.01, ns_dtype=torch.float64, state=state),
            "shampoo": lambda params: Shampoo(params, 0.01, (0.9, 0.95), precondition_frequency=2, state=state,
                                              max_preconditioner_dim=most)}
    of = {}
    for _, p in sorted(model.named_parameters()):
        of.setdefault(part(p), []).append(p)
    return Together([make[name](params) for name, params in sorted(of.items())])


class Owned(Staged):
    """fp64, several optimizers; the first step leaves two parameters alone, which have no state until the second."""

    def __init__(self, which, seed, mesh, **options):
        config = Config(model=SMALL, mesh=mesh.config, train=TrainConfig(seed=seed, dtype="fp64"))
        self.model = build(config, mesh)
        self.optimizer = optimizer_of(self.model, which, **options)
        self.loader = Stream(row=seed)

    def step(self, number):
        for name, p in self.model.named_parameters():
            generator = torch.Generator().manual_seed(1000 * number + sum(map(ord, name)))
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            if isinstance(p, DTensor):
                p.grad = distribute_tensor(p.grad, p.device_mesh, p.placements, src_data_rank=None)
            if number == 1 and name in ("layers.1.input_layernorm.weight", "layers.1.mlp.experts.w2_EDF"):
                p.grad = None
        self.optimizer.step()

    def values(self):
        found = [None] * dist.get_world_size()
        dist.all_gather_object(found, full(self.tensors()))
        return {name: t for own in reversed(found) for name, t in own.items()}

    def apart(self, whole):
        """The largest difference of this rank's parts from those of the whole tensors."""
        return max(float((local(t).double() - own(whole[name], t).double()).abs().amax()) if local(t).numel() else 0.0
                   for name, t in self.tensors().items() if name != "row")


MIXTURES = {"shampoo muon": "full", "muon shampoo": "bf16"}     # -> optim.state
ROUTE = [   # ranks, meshes that save, whose checkpoints they load before
    (2, {"fsdp2": dict(fsdp=2), "rep2": dict(rep=2)}, []),
    (4, {"fsdp2 tp2 ep2": dict(fsdp=2, tp=2, ep=2), "pp2 fsdp2": dict(pp=2, fsdp=2)}, ["fsdp2"]),
    (1, {"one": {}}, ["rep2", "fsdp2 tp2 ep2", "pp2 fsdp2"]),
    (2, {"pp2": dict(pp=2)}, ["one"])]


def test_owners_states_on_any_mesh(tmp_path):
    """From mesh to mesh, saved before there are roots and after: the same bits come back, the next step is the same to
    the last digits on another mesh, and the same bits on the same."""
    saved = {}      # mesh, mixture -> path, values, values after the next step, that step's number

    def stage(mesh, which, sources):
        """Load, step, save."""
        run, number = Owned(which, 1, mesh, state=MIXTURES[which]), 1
        if not sources:
            run.step(1)
        for source in sources:
            path, then, after, number = saved[source, which]
            run.load(path)
            assert not run.differing(then), path
            run.step(number)
            assert run.apart(after) < 1e-12, path
        path, then = run.save(tmp_path / str(len(saved)) / f"{mesh.config.sizes}" / which, number), run.values()
        run.step(number + 1)
        after = run.values()
        again = Owned(which, 2, mesh, state=MIXTURES[which])
        again.step(3)
        again.load(path)
        again.step(number + 1)
        assert not again.differing(after), path
        return str(path), then, after, number + 1

    def body(rank, meshes, sources):
        found = {}
        for name, sizes in meshes.items():
            mesh = Mesh(MeshConfig(**sizes))
            found |= {(name, which): stage(mesh, which, sources) for which in MIXTURES}
        return found
    for world, meshes, sources in ROUTE:
        saved |= run_ranks(world, functools.partial(body, meshes=meshes, sources=sources))[0]
    for which in MIXTURES:
        assert saved["pp2 fsdp2", which][1].keys() <= saved["one", which][1].keys() <= saved["pp2", which][1].keys()
        path = saved["pp2 fsdp2", which][0]
        listed = json.loads((Path(path) / "state.json").read_text())["optimizer"]
        names = {f"optim.{name}.{key}" for name, of in listed["states"].items() for key in of}
        assert names == {name for name in boxes(path) if name.startswith("optim.")}
        assert ("optim.layers.0.mlp.gate_proj.weight.factor0.24,0" in names) == (which == "muon shampoo")
        assert ("optim.layers.1.mlp.experts.w2_EDF.factor1.1,0,0" in names) == (which == "shampoo muon")
        assert listed["movers"]["layers.1.input_layernorm.weight"] == "AdamW" in listed["class"].split(" + ")


def test_owners_states_that_do_not_fit(tmp_path):
    """Another optimizer, rule or size of blocks, a part missing: one sentence on every rank, and nothing is touched."""
    def body(rank):
        mesh, said = Mesh(MeshConfig(fsdp=2)), {}
        run = Owned("shampoo", 1, mesh)
        run.step(1)
        run.step(2)
        path = run.save(tmp_path / "ckpt", 2)
        mixed = Owned("muon shampoo", 1, mesh)
        mixed.step(2)
        other = mixed.save(tmp_path / "other", 2)

        def try_to(name, path, run):
            before = run.values()
            said[name] = raised(lambda: run.load(path))[1].partition(": ")[2]
            assert not differing(run.values(), before), name

        try_to("class", path, Owned("muon", 2, mesh))
        try_to("rule", other, Owned("shampoo muon", 2, mesh))
        try_to("blocks", path, Owned("shampoo", 2, mesh, most=8))

        def spoil(of):      # an owner's tensor that is not where state.json says
            listed = json.loads((path / "state.json").read_text())
            of(listed["optimizer"]["states"]["layers.1.mlp.experts.w2_EDF"])
            (path / "state.json").write_text(json.dumps(listed))
        on_rank_0(lambda: spoil(lambda shapes: shapes.update({"factor0.1,0,8": shapes.pop("factor0.1,0,0")})))
        try_to("missing", path, Owned("shampoo", 2, mesh))
        on_rank_0(lambda: spoil(lambda shapes: shapes.update({"factor0.1,0,0": shapes.pop("factor0.1,0,8")[:1]})))
        try_to("shape", path, Owned("shampoo", 2, mesh))
        return said
    first, second = run_ranks(2, body, tmp_path)
    assert first == second
    assert first["class"].startswith("optimizer: got the state of AdamW + Shampoo, wanted that of AdamW + Muon: ")
    assert re.match(r"parameter layers\.\S+: the checkpoint's (Muon|Shampoo) moved it, this run's (Muon|Shampoo) does: "
                    "set optim.rule", first["rule"])
    assert "max_preconditioner_dim 8" in first["blocks"] and "config.toml" in first["blocks"]
    assert "tensors missing from the checkpoint: optim.layers.1.mlp.experts.w2_EDF.factor0.1,0,8" in first["missing"]
    assert first["shape"].startswith("optim.layers.1.mlp.experts.w2_EDF.factor0.1,0,0: ")


def test_a_checkpoint_of_another_optim_state(tmp_path):
    """Rounded when it is loaded, and widened; and one from before the first step, with no state at all."""
    def body(rank):
        mesh = Mesh(MeshConfig())
        runs = {state: Owned("muon shampoo", 1, mesh, state=state) for state in ("full", "bf16")}
        paths = {}
        fresh = runs["full"].save(tmp_path / "fresh", 0)
        for state, run in runs.items():
            run.step(2)
            paths[state] = run.save(tmp_path / state, 2)
        values = {state: run.values() for state, run in runs.items()}
        for state, other in (("full", "bf16"), ("bf16", "full")):
            run = Owned("muon shampoo", 3, mesh, state=state)
            run.load(paths[other])
            now, kept = run.values(), values[state]
            assert {name: t.dtype for name, t in now.items()} == {name: t.dtype for name, t in kept.items()}
            assert all(torch.equal(t.to(torch.bfloat16), values[other][name].to(torch.bfloat16))
                       for name, t in now.items() if t.is_floating_point())
            run.load(fresh)
            assert not any(run.optimizer.state.values())
            run.step(2)
            assert not differing(run.values(), values[state])
    run_ranks(1, body, tmp_path)
