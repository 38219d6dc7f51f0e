"""The driver on many ranks: the losses of one process, resume here and on other meshes, and how a run ends."""
import dataclasses
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ranks import run_ranks
from test_train import assert_same_checkpoint, data, flags, records  # noqa: F401

import moe_ext.train
from moe_ext import checkpoint
from moe_ext.config import parse, plain
from moe_ext.parallel.mesh import Mesh

MESHES = {
    "fsdp2-ep2": dict(mesh__fsdp=2, mesh__ep=2, train__micro_batch=2),
    "rep2": dict(mesh__rep=2, train__micro_batch=2),
    "tp2": dict(mesh__tp=2),
    "tp2-etp2": dict(mesh__tp=2, mesh__etp=2),
    "fsdp2-tp2-ep4": dict(mesh__fsdp=2, mesh__tp=2, mesh__ep=4, train__micro_batch=2),
}
COLUMNS = "loss", "aux", "grad_norm", "balance", "zeros", "parameter_norm", "tokens", "sequences", "load"
EVALUATIONS = "valid_loss", "choices_acc", "choices_acc_norm"
ALL = dict(log__every=1, data__tokenizer="", train__device="cpu")


def fit(data, folder, store, resume="", *more, **options):                                  # noqa: F811
    """A run over forked ranks, or in this process; -> the run folder. more: flags."""
    config = plain(parse([*flags(data, folder, **ALL | options), *more]))
    store.mkdir(exist_ok=True)
    if config.mesh.world == 1:
        moe_ext.train.fit(config, Mesh(config.mesh), resume)
    else:
        run_ranks(config.mesh.world, lambda rank: moe_ext.train.fit(config, Mesh(config.mesh), resume)[1], store)
    return config.run_folder


def numbers(folder, *names):
    return [[r[name] for name in names] for r in records(folder) if names[0] in r]


def same(folder, alone, begin=0):
    """Steps from `begin` on, and evaluations, are those of a run of one process in fp64."""
    np.testing.assert_allclose(numbers(folder, *COLUMNS), numbers(alone, *COLUMNS)[begin:], rtol=1e-9)
    assert numbers(folder, "counts_LE") == numbers(alone, "counts_LE")[begin:]
    for name in EVALUATIONS:
        np.testing.assert_allclose(numbers(folder, name), numbers(alone, name), rtol=1e-9)


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):                                                          # noqa: F811
    """Ten steps of one process in fp64 and in fp32; checkpoints at 5 and 10."""
    folder = tmp_path_factory.mktemp("alone")
    return {dtype: fit(data, folder / dtype, folder / "store", train__dtype=dtype, train__steps=10, train__keep_last=0)
            for dtype in ("fp64", "fp32")}


@pytest.mark.parametrize("name", MESHES)
def test_every_step_is_that_of_one_process(data, alone, tmp_path, name):                   # noqa: F811
    folder = fit(data, tmp_path, tmp_path / "store", train__dtype="fp64", train__steps=10, **MESHES[name])
    for columns in (("loss", "aux", "grad_norm", "lr", "balance", "zeros", "parameter_norm", "tokens", "load"),
                    ("valid_loss",)):
        np.testing.assert_allclose(numbers(folder, *columns), numbers(alone["fp64"], *columns), rtol=1e-9)
    assert numbers(folder, "counts_LE") == numbers(alone["fp64"], "counts_LE")
    said = (folder / "run.log").read_text()
    assert "eval 10/10" in said and said.count("step 7/10 |") == 1
    world = math.prod(size for name, size in MESHES[name].items() if name in ("mesh__rep", "mesh__fsdp", "mesh__tp"))
    assert [row[1] for row in numbers(folder, "loss", "world")] == [world] * 10


def test_a_batch_ramp_on_a_mesh_is_that_of_one_process(data, tmp_path):                    # noqa: F811
    """Of 4 sequences per step, then 8, 12 and 16, and resumed on another mesh while they grow."""
    ramp = dict(train__dtype="fp64", train__batch_ramp="4,4,48", train__accumulation=4, train__steps=9,
                train__save_every=5, train__keep_last=0)
    columns = "loss", "aux", "balance", "grad_norm", "zeros", "tokens", "sequences"
    one = fit(data, tmp_path / "one", tmp_path / "s1", **ramp)
    assert [row[-1] for row in numbers(one, *columns)] == [4, 4, 4, 4, 8, 8, 12, 12, 16]
    two = fit(data, tmp_path / "two", tmp_path / "s2", **ramp, **MESHES["fsdp2-ep2"])
    np.testing.assert_allclose(numbers(two, *columns), numbers(one, *columns), rtol=1e-9)
    shutil.copytree(one / "ckpt" / "step-000005", tmp_path / "three" / "debug" / "ckpt" / "step-000005")
    three = fit(data, tmp_path / "three", tmp_path / "s3", "auto", **ramp, **MESHES["fsdp2-ep2"])
    np.testing.assert_allclose(numbers(three, *columns), numbers(one, *columns)[5:], rtol=1e-9)


OPTIMIZERS = {      # of Shampoo three inverse roots in six steps, of blocks; its epsilon is above rounding
    "muon": dict(optim__name="muon", optim__muon__ns_dtype="fp64",
                 optim__rule="matrices: muon, experts: muon 0.5, embeddings: adamw 2, norms: adamw"),
    "shampoo": dict(optim__name="shampoo", optim__shampoo__precondition_frequency=2,
                    optim__shampoo__max_preconditioner_dim=24, optim__shampoo__epsilon=1e-6),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_of_whole_matrices_do_not_know_the_mesh(data, tmp_path, name):          # noqa: F811
    """The steps of one process in fp64, from a checkpoint the same bits again; and what the log says of the cost."""
    mesh = OPTIMIZERS[name] | dict(train__dtype="fp64", train__steps=6, train__save_every=3, train__eval_every=0,
                                   train__keep_last=0)
    one = fit(data, tmp_path / "one", tmp_path, **mesh)
    two = fit(data, tmp_path / "two", tmp_path / "s2", **mesh, **MESHES["fsdp2-ep2"])
    columns = "loss", "grad_norm", "parameter_norm"
    np.testing.assert_allclose(numbers(two, *columns), numbers(one, *columns), rtol=1e-11)
    shutil.copytree(two / "ckpt" / "step-000003", tmp_path / "three" / "debug" / "ckpt" / "step-000003")
    three = fit(data, tmp_path / "three", tmp_path / "s3", "auto", **mesh, **MESHES["fsdp2-ep2"])
    assert_same_checkpoint(two, three, 6)

    costs = {folder: [r["optimizer"] for r in records(folder) if "loss" in r] for folder in (one, two)}
    for folder, sends in ((one, False), (two, True)):
        assert [list(cost) for cost in costs[folder]] == [["adamw", name]] * 6
        for cost in costs[folder]:
            assert (cost[name]["sent_mib"] > 0) == sends and cost["adamw"]["sent_mib"] == 0
            assert 0 < cost["adamw"]["share"] + cost[name]["share"] < 1
    kept = [sum(part["state_mib"] for part in cost[-1].values()) for cost in costs.values()]
    assert 0.4 * kept[0] < kept[1] < 0.8 * kept[0]                  # of the two ranks each has about a half
    assert re.search(rf"tok/s \| adamw \d+% {name} \d+% \| epoch", (two / "run.log").read_text())


def test_times_and_memory_of_all_ranks(data, tmp_path):                                    # noqa: F811
    folder = tmp_path / "debug"
    config = dataclasses.replace(plain(parse([*flags(data, tmp_path, **ALL, train__steps=5, **MESHES["fsdp2-ep2"]),
                                              "--log.timers"])))
    run_ranks(2, lambda rank: moe_ext.train.fit(config, Mesh(config.mesh), "")[1], tmp_path)
    for record in [r for r in records(folder) if "loss" in r]:
        assert list(record["time_ms"]) == ["data", "forward", "backward", "optimizer"]
        assert all(0 < least < most for least, most in record["time_ms"].values())      # two ranks never take the same
        assert 0 < record["memory_mib"] <= record["max_memory_mib"]


def test_fp32_differs_by_rounding(data, alone, tmp_path):                                   # noqa: F811
    folder = fit(data, tmp_path, tmp_path / "store", train__steps=10, **MESHES["fsdp2-ep2"])
    np.testing.assert_allclose(numbers(folder, "loss"), numbers(alone["fp32"], "loss"), rtol=1e-4)


def test_resume_is_bitwise_on_its_mesh_and_right_on_any_other(data, alone, tmp_path):       # noqa: F811
    mesh = dict(train__dtype="fp64", train__steps=10, train__keep_last=0)
    straight = fit(data, tmp_path / "straight", tmp_path / "s1", **mesh, **MESHES["fsdp2-ep2"])
    for number, (name, options) in enumerate({"same": MESHES["fsdp2-ep2"], "one": {}, "tp": MESHES["tp2-etp2"],
                                              "four": MESHES["fsdp2-tp2-ep4"]}.items()):
        folder = tmp_path / name / "debug"
        shutil.copytree(straight / "ckpt" / "step-000005", folder / "ckpt" / "step-000005")
        fit(data, tmp_path / name, tmp_path / f"store{number}", "auto", **mesh, **options)
        if name == "same":
            assert_same_checkpoint(straight, folder, 10)
        np.testing.assert_allclose(numbers(folder, "loss"), numbers(alone["fp64"], "loss")[5:], rtol=1e-9)


def test_16_bits(data, tmp_path):                                                           # noqa: F811
    """bf16 and fp16 learn alike on one rank and on two; the scaler is checkpointed, an overflow skips all steps."""
    for dtype in ("bf16", "fp16"):
        options = dict(train__dtype=dtype, train__steps=10, train__loss_scale=256.0, train__loss_scale_window=4,
                       train__loss_scale_hysteresis=3)
        runs = [fit(data, tmp_path / f"{dtype}{name}", tmp_path / f"store-{dtype}{name}", **options, **mesh)
                for name, mesh in (("one", {}), ("two", MESHES["fsdp2-ep2"]))]
        losses = [np.array(numbers(folder, "loss")) for folder in runs]
        np.testing.assert_allclose(losses[0], losses[1], rtol=0.03)
        assert losses[1][-1] < losses[1][0] - 1
    path = checkpoint.latest(runs[1] / "ckpt")
    extra = checkpoint.read_state(path).extra
    assert extra == {"scale": 1024.0, "good_steps": 2, "tolerated": 2, "seconds": extra["seconds"]}

    folder = fit(data, tmp_path / "overflow", tmp_path / "store-overflow", train__dtype="fp16", train__steps=5,
                 train__loss_scale=2.0**40, **MESHES["fsdp2-ep2"])
    said = (folder / "run.log").read_text()
    assert "step 1: a gradient overflowed, so it moves nothing; the loss scale is 5.49756e+11" in said
    assert numbers(folder, "loss")[0] != numbers(folder, "loss")[-1]        # other rows; the parameters are the first
    state = checkpoint.read_state(checkpoint.latest(folder / "ckpt"))
    assert state.extra["scale"] == 2.0**35 and not state.optimizer["states"]["norm.weight"]


# ---- under torchrun --------------------------------------------------------------------------------------------------

def torchrun(data, folder, *more, ranks=2, **options):                                      # noqa: F811
    """The process of torchrun, its output and that of its ranks in one pipe."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node", str(ranks), "-m",
         "moe_ext.train", *flags(data, folder, **ALL | options), *more],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def wait_for(process, beginning):
    said = ""
    for line in process.stdout:
        said += line
        if line.startswith(beginning):
            return said
    raise AssertionError(said)


def rank_of(process, rank):
    """The pid of a rank among torchrun's children."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return next(int(pid) for pid in children if f"\0RANK={rank}\0" in Path(f"/proc/{pid}/environ").read_text())


def test_a_killed_rank_ends_the_run_and_it_resumes(data, alone, tmp_path):                  # noqa: F811
    options = dict(train__dtype="fp64", train__steps=10, train__timeout=30, **MESHES["fsdp2-ep2"])
    process = torchrun(data, tmp_path, **options | dict(train__steps=100000))
    said = wait_for(process, "saved ")
    said += wait_for(process, "step 7/")
    pid = rank_of(process, 1)
    os.kill(pid, signal.SIGKILL)
    rest, _ = process.communicate(timeout=100)
    assert process.returncode != 0
    sentence = re.search(rf"error: rank 1 \(pid {pid} on \S+\) died in step (\d+).*; rank 0 was in step .*", rest)
    assert sentence and int(sentence[1]) >= 7, rest
    assert "--resume auto continues from" in sentence[0] and "ckpt/step-0000" in sentence[0]

    folder = tmp_path / "debug"
    for path in (folder / "ckpt").iterdir():
        if path.name != "step-000005":
            shutil.rmtree(path)
    (folder / "metrics.jsonl").unlink()
    process = torchrun(data, tmp_path, "--resume", "auto", **options)
    said, _ = process.communicate(timeout=100)
    assert process.returncode == 0, said


def test_sigterm_saves_on_all_ranks(data, tmp_path):                                        # noqa: F811
    process = torchrun(data, tmp_path, train__steps=100000, **MESHES["tp2"])
    wait_for(process, "step 3/")
    os.kill(rank_of(process, 1), signal.SIGTERM)            # one rank alone: its request is everybody's
    said, _ = process.communicate(timeout=100)
    assert process.returncode == 0, said
    step = int(said.rpartition("after step ")[2].split(";")[0])
    assert checkpoint.latest(tmp_path / "debug" / "ckpt").name == f"step-{step:06d}"


@pytest.mark.parametrize("options, words", [
    (dict(mesh__fsdp=4, train__micro_batch=1), ["= 4 ranks, but 2 processes run", "--mesh.fsdp 2"]),
    (dict(data__train="nowhere", **MESHES["tp2"]), ["nowhere"]),
], ids=["another_world", "no_data"])
def test_refused_in_a_sentence(data, tmp_path, options, words):                             # noqa: F811
    said, _ = (process := torchrun(data, tmp_path, **options)).communicate(timeout=100)
    assert process.returncode != 0
    for word in ["error: ", *words]:
        assert word in said, said
    assert not (tmp_path / "debug").exists()
