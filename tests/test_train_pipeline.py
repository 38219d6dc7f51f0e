"""The driver on a pipeline: the losses of one process, on any other pipeline again, and how a run with a stage that
dies, stalls or is asked to stop ends."""
import os
import re
import shutil
import signal
import sys
import threading
import traceback
from pathlib import Path

import pytest
import torch
from ranks import fork, run_ranks
from test_choices import quiz, write
from test_failure import server  # noqa: F401
from test_log_megatron import shape
from test_train import data, flags  # noqa: F401
from test_train_mesh import ALL, fit, numbers, same

import moe_ext.train
from moe_ext import checkpoint, evaluate
from moe_ext.config import parse, plain
from moe_ext.data import IndexedDataset
from moe_ext.model import GPT
from moe_ext.parallel.mesh import Mesh

RECIPES = Path(__file__).parent.parent / "recipes"

RAMP = dict(train__batch_ramp="8,8,16", train__accumulation=4, train__steps=4, train__save_every=2,   # 2 micro-batches,
            train__keep_last=0, train__eval_every=0, train__dtype="fp64", model__layers=4,             # later 4
            model__moe__scope="micro_batch", model__moe__dense_layers=1, model__position="learned", optim__warmup=2)
PIPELINES = {
    "interleaved": dict(mesh__pp=2, mesh__fsdp=2, mesh__ep=2, train__micro_batch=2, pipeline__chunks=2),
    "bfc": dict(mesh__pp=2, mesh__tp=2, pipeline__chunks=2, pipeline__schedule="bfc",
                pipeline__transport="windows"),
    "1f1b": dict(mesh__pp=4, pipeline__schedule="1f1b"),
}


@pytest.fixture(scope="module")
def options(data, tmp_path_factory):                                                        # noqa: F811
    """Evaluated by held-out loss and multiple choice too; the tables are tied."""
    recipe = tmp_path_factory.mktemp("recipe") / "debug.toml"
    return RAMP | dict(data__choices=write(recipe.with_name("quiz.jsonl"), *quiz(5)),
                       data__tokenizer=data / "tokenizer.json")


@pytest.fixture(scope="module")
def alone(data, options, tmp_path_factory):                                                 # noqa: F811
    folder = tmp_path_factory.mktemp("alone")
    return fit(data, folder, folder / "store", "", "--model.tied", **options)


@pytest.mark.parametrize("name", PIPELINES)
def test_every_step_is_that_of_one_process(data, alone, options, tmp_path, name):           # noqa: F811
    """Dropout, jitter and a batch ramp; losses, norms, zeros and loads are the whole model's. Then each continues on
    another pipeline, the last one in one process."""
    folder = fit(data, tmp_path / "own", tmp_path / "store", "", "--model.tied", **options, **PIPELINES[name])
    same(folder, alone)
    run, valid = evaluate.load_run(folder), IndexedDataset(data / "valid")      # whole, in this process
    assert evaluate.evaluate(run.model, run.config, valid, run.config.train.eval_batches) == pytest.approx(
        numbers(folder, "valid_loss")[0][0], rel=1e-9)
    other = dict(zip(PIPELINES, [*list(PIPELINES.values())[1:], {}], strict=True))[name]
    shutil.copytree(folder / "ckpt" / "step-000002", tmp_path / "other" / "debug" / "ckpt" / "step-000002")
    folder = fit(data, tmp_path / "other", tmp_path / "store2", "auto", "--model.tied", **options, **other)
    same(folder, alone, 2)
    said = (folder / "run.log").read_text()
    assert f"mesh.pp was {PIPELINES[name]['mesh__pp']} and is 1" in said or other
    assert "pipeline.schedule was" in said


# ---- the published run -----------------------------------------------------------------------------------------------
BANNER = """\
using world size: 8, data-parallel size: 1, context-parallel size: 1, tensor-model-parallel size: 2, \
encoder-tensor-model-parallel size: 0, pipeline-model-parallel size: 4, encoder-pipeline-model-parallel size: 0
Number of virtual stages per pipeline stage: 4
WARNING: Setting args.check_for_nan_in_loss_and_grad to False since dynamic loss scaling is being used
------------------------ arguments ------------------------
  fp16 ............................................ True
  hysteresis ...................................... 2
  initial_loss_scale .............................. 4294967296.0
  pipeline_model_parallel_size .................... 4
  recompute_granularity ........................... selective
  tensor_model_parallel_size ...................... 2
  use_dpp ......................................... True
  virtual_pipeline_model_parallel_size ............ 4
-------------------- end of arguments ---------------------
 > padded vocab (size: 316) with 196 dummy tokens (new size: 512)
> initialized tensor model parallel with size 2
> initialized pipeline model parallel with size 4
 > number of parameters on (tensor, pipeline) model parallel rank (1, 0): 8864
 > number of parameters on (tensor, pipeline) model parallel rank (0, 3): 8768
    train:      32
training ..."""


def test_the_published_run_scaled_down(data, tmp_path, capfd):                              # noqa: F811
    """gpt_0b9_pipeline on 8 ranks of TP 2 x PP 4 x VPP 4: its banner, a line for the begin and the end of each tensor,
    skipped iterations, footprint. The first overflow leaves the scale, the next halves it."""
    config = plain(parse([str(RECIPES / "gpt_0b9_pipeline.toml"), *f"""
        --model.vocab-size 512 --model.seq-len 8 --model.dim 16 --model.heads 2 --model.hidden 32 --train.steps 2
        --train.eval-every 2 --train.eval-batches 1 --train.sample-tokens 0 --train.device cpu
        --data.train {data}/train --data.valid {data}/valid
        --data.tokenizer {data}/tokenizer.json --log.folder {tmp_path} --log.no-tensorboard --pipeline.transport windows
        """.split()]))
    run_ranks(8, lambda rank: moe_ext.train.fit(config, Mesh(config.mesh), "")[1], tmp_path)
    log, said = (tmp_path / "gpt_0b9_pipeline" / "run.log").read_text(), capfd.readouterr().out.splitlines()
    assert [line for line in log.splitlines() if line in BANNER.splitlines()] == BANNER.splitlines()

    order = {rank: re.findall(rf"^rank {rank} (forward|backward) start tensor (\d+)$", "\n".join(said), re.M)
             for rank in range(8)}
    for rank, lines in order.items():
        for step in (lines[:64], lines[64:]):
            assert sorted(step) == sorted((kind, str(k)) for kind in ("forward", "backward") for k in range(32))
        finished = [line for line in said if line.startswith(f"rank {rank} ") and "finished" in line]
        assert [line.split(" ")[2::3] for line in finished] == [list(pair) for pair in lines]
    assert all(order[rank] == order[rank + 1] for rank in range(0, 8, 2)), "tensor-parallel peers took turns alike"

    iterations = re.findall(r"iteration +(\d+)/ +2 .*loss scale: (\S+) .*number of skipped iterations: +(\d+) \|", log)
    assert iterations == [("1", "4294967296.0", "1"), ("2", "2147483648.0", "1")]
    footprint = log.partition("Number of parameters in transformer block")[2].splitlines()[1:]
    assert [shape(line) for line in footprint[:4]] == [
        "Number of parameters in embedding layers in billions: #", "Total number of parameters in billions: #",
        "Number of parameters in most loaded shard in billions: #",
        "Number of parameters in other shards in billions: #"]
    assert re.fullmatch(r"Theoretical memory footprints: weight and optimizer=\d+\.\d\d MB", footprint[4])
    assert [line[:29] for line in footprint[5:13]] == [f"[Rank {rank}] (after 1 iterations)" for rank in range(8)]
    assert "validation loss at iteration 2 | lm loss value: " in log


# ---- a stage that fails ----------------------------------------------------------------------------------------------
FAILURES = {    # what the rank does, seconds of train.timeout, words about it, options
    "killed": (lambda pid: os.kill(pid, signal.SIGKILL), 60, r"died in step 3 \(killed or crashed\)",
               dict(pipeline__schedule="bfc", pipeline__transport="windows")),
    "stopped": (lambda pid: os.kill(pid, signal.SIGSTOP), 5, r"has given no sign of life for \d\.\d s in step 3.*",
                dict(pipeline__transport="windows")),
    "computes, windows": (lambda pid: threading.Event().wait(), 5, "kept the others waiting in step 3, and .*",
                          dict(pipeline__schedule="dfc", pipeline__transport="windows")),
    "computes, torch": (lambda pid: threading.Event().wait(), 5, "kept the others waiting in step 3, and .*", {}),
}


def begin(server, folder, act, arguments):                                                  # noqa: F811
    """The statuses of ranks 0, 1 and 3 of pp 2 x tp 2, forked processes that begin as torchrun's do, and the pid of
    rank 2, which does act(pid) in the last forward of step 3. stderr of each goes to folder/stderrN."""
    calls, forward = [], GPT.forward
    shared = dict(WORLD_SIZE="4", LOCAL_WORLD_SIZE="4", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(server.port),
                  TORCHELASTIC_USE_AGENT_STORE="True")

    def counted(self, *inputs, **more):
        calls.append(self)
        if len(calls) == 6:         # two micro-batches a step
            act(os.getpid())
        return forward(self, *inputs, **more)

    pids, (gate, go) = [], os.pipe()
    for rank in range(4):
        if (pid := fork()) == 0:
            status = 1
            try:
                os.dup2(os.open(folder / f"stderr{rank}", os.O_WRONLY | os.O_CREAT, 0o600), 2)
                os.close(go)
                os.read(gate, 1)    # until all ranks have been forked: see test_failure.run
                os.environ.update(shared, RANK=str(rank), LOCAL_RANK=str(rank))
                torch.set_num_threads(1)
                sys.argv = ["train", *arguments]
                GPT.forward = counted if rank == 2 else forward
                moe_ext.train.main()
                status = 0
            except SystemExit as error:
                os.write(2, f"{error.code}\n".encode())
            except BaseException:
                os.write(2, traceback.format_exc().encode())
            finally:
                os._exit(status)
        pids.append(pid)
    os.close(go)
    os.close(gate)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for rank, pid in enumerate(pids) if rank != 2]
    os.kill(pids[2], signal.SIGKILL)        # the stopped one; the others have ended, or do so in a moment
    os.waitpid(pids[2], 0)
    return statuses, pids[2]


def test_a_tied_table_moves_alike_on_both_its_stages(data, options, tmp_path):              # noqa: F811
    """As a whole matrix, by Shampoo, of which each stage has its own."""
    shampoo = options | dict(optim__name="shampoo", optim__rule="embed_tokens.weight: shampoo, *: adamw",
                             optim__shampoo__precondition_frequency=2, optim__shampoo__max_preconditioner_dim=64,
                             optim__shampoo__epsilon=1e-6, data__choices="")
    one = fit(data, tmp_path / "one", tmp_path, "", "--model.tied", **shampoo)
    same(fit(data, tmp_path / "two", tmp_path / "store", "", "--model.tied", **shampoo, mesh__pp=2), one)


@pytest.mark.parametrize("name", FAILURES)
def test_a_stage_that_fails_ends_all_with_its_name(data, tmp_path, server, name):            # noqa: F811
    act, timeout, words, options = FAILURES[name]
    before = os.listdir("/dev/shm")
    statuses, pid = begin(server, tmp_path, act, flags(data, tmp_path, **ALL, train__timeout=timeout, mesh__pp=2,
                                                       mesh__tp=2, **options))
    assert statuses == [1, 1, 1]
    for rank in (0, 1, 3):
        said = (tmp_path / f"stderr{rank}").read_text()
        assert re.search(rf"^error: rank 2 \(pid {pid} on \S+\) {words}; rank {rank} was in step 3; no checkpoint has "
                         "been saved yet$", said, re.M), said
    assert os.listdir("/dev/shm") == before


def test_sigterm_to_one_stage_saves_all(data, tmp_path, server):                            # noqa: F811
    before = os.listdir("/dev/shm")
    statuses, _ = begin(server, tmp_path, lambda pid: os.kill(pid, signal.SIGTERM), flags(
        data, tmp_path, **ALL, mesh__pp=2, mesh__tp=2, pipeline__schedule="bfc", pipeline__transport="windows"))
    assert statuses == [0, 0, 0], (tmp_path / "stderr0").read_text()
    assert checkpoint.latest(tmp_path / "debug" / "ckpt").name == "step-000003"
    assert "stopped by another rank after step 3; continue" in (tmp_path / "debug" / "run.log").read_text()
    assert os.listdir("/dev/shm") == before
