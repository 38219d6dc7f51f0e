"""log.style "megatron" beside lines of Megatron's own logs (megatron_log.txt), token for token and, where a number
follows from others, number for number."""
import math
import re
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest
from test_train import data, flags, records, tensors  # noqa: F401

import moe_ext.train
from moe_ext.config import (
    Config,
    DataConfig,
    LogConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    TrainConfig,
    parse,
)
from moe_ext.log.megatron import Megatron, arguments, timers
from moe_ext.log.meter import Memory
from moe_ext.optim import learning_rate

ITERATION = re.compile(
    r" \[(?P<time>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)\] iteration +(?P<step>\d+)/ +(?P<steps>\d+) \| consumed samples: "
    r"+(?P<samples>\d+) \| elapsed time per iteration \(ms\): (?P<ms>\d+\.\d) \| throughput per GPU \(TFLOP/s/GPU\): "
    r"(?P<tflops>\d+\.\d) \| learning rate: (?P<lr>\d\.\d{6}E[+-]\d\d) \| global batch size: +(?P<sequences>\d+) \|"
    r"( lm loss: (?P<mean_loss>\d\.\d{6}E[+-]\d\d) \|)?( load_balancing_loss: (?P<balance>\d\.\d{6}E[+-]\d\d) \|)? "
    r"loss scale: (?P<loss_scale>\d+\.\d) \|"
    r"( grad norm: (?P<grad_norm>\d+\.\d{3}) \| num zeros: (?P<zeros>\d+\.\d) \|)?"
    r" params norm: (?P<parameter_norm>\d+\.\d{3}) \| number of skipped iterations: +(?P<skipped>\d+) \| number of nan "
    r"iterations: +(?P<nan>\d+) \|")
DENSE, ONE = MoEConfig(), MeshConfig()
MOE = MoEConfig(experts=64, top_k=1, hidden=1792)
RUNS = {    # the runs of megatron_log.txt
    "dense": dict(mesh=MeshConfig(fsdp=8)),
    "capacity": dict(moe=replace(MOE, capacity_factor=1.0), mesh=MeshConfig(fsdp=8, ep=4)),
    "dropless": dict(moe=MOE, mesh=MeshConfig(fsdp=8, ep=4)),
    "dropless, 8 ranks of experts": dict(moe=MOE, mesh=MeshConfig(fsdp=8, ep=8), accumulation=2),
}


def sections():
    text = (Path(__file__).parent / "megatron_log.txt").read_text()
    return {part.partition("\n")[0]: part.splitlines()[1:] for part in text.split("# ")[1:]}


def config_of(moe=DENSE, mesh=ONE, accumulation=1):
    model = ModelConfig(vocab_size=128256, seq_len=2048, layers=24, dim=512, heads=4, kv_heads=1, hidden=1792,
                        rope_base=1e5, moe=moe)
    return Config(model=model, data=DataConfig(valid="", tokenizer=""), mesh=mesh, log=LogConfig(style="megatron"),
                  train=TrainConfig(steps=40000, micro_batch=8 // accumulation, accumulation=accumulation),
                  optim=OptimConfig(lr=6e-4, min_lr=6e-5, warmup=1000))


def parsed(line):
    """The numbers of an iteration line; None for what it leaves out."""
    match = ITERATION.fullmatch(line)
    assert match, line
    numbers = {name: text and (int(text) if text.isdigit() else float(text))
               for name, text in match.groupdict().items() if name != "time"}
    return match["time"], numbers


def shape(line):
    """A line without its numbers."""
    return re.sub(r"-?\d+(\.\d+)?(E[+-]\d+)?", "#", line.rstrip())


@pytest.mark.parametrize("name", RUNS)
def test_each_iteration_of_megatron_comes_out_again(name):
    """From the numbers of its line, with TFLOP/s and learning rate computed anew; so does what stands beside the first.
    One of the 49 was printed at 37.8 TFLOP/s for 515.1 ms, whose rounding leaves 37.7 as well."""
    config, lines = config_of(**RUNS[name]), sections()[name]
    iterations = [line for line in lines if " iteration " in line]
    style, footprint = None, []
    for line in iterations:
        time, numbers = parsed(line)
        style = style or Megatron(config)
        style.clock = lambda time=time: datetime.fromisoformat(time)
        lr = learning_rate(numbers["step"], config.optim, 38000)
        record = numbers | {"lr": lr, "memory": [Memory(1550.404296875, 2.0, 3.0, 4.0)]}
        mine, *more = style.step(record, 0.0).split("\n")
        if numbers["ms"] == 515.1:
            mine, line = (text.replace("37.7", "37.8") for text in (mine, line))
        assert mine == line
        footprint = footprint or more
        assert more == ([] if line != iterations[0] else footprint)
    theirs = [line for line in lines if line.startswith(("Number", "Total", "Theoretical", "[Rank"))]
    assert footprint[:-1] == theirs[:-1] and shape(footprint[-1]) == shape(theirs[-1])
    assert footprint[-1].startswith("[Rank 0] (after 20 iterations) memory (MB) | allocated: 1550.404296875 | max al")


def test_every_line_of_the_seed_is_looked_at():
    assert sum(" iteration " in line for lines in sections().values() for line in lines) == 49


def test_the_timers_verbatim():
    lines = sections()["dropless"]
    at = next(i for i, line in enumerate(lines) if line.startswith("(min, max)"))
    theirs = [line.removesuffix("training ...") for line in lines[at:at + 3]]
    assert timers({"model-and-optimizer-setup": (245.01, 247.4),
                   "train/valid/test-data-iterators-setup": (171.11, 179.284)}).splitlines() == theirs


def test_optimizers_have_megatrons_names():
    adam, muon = arguments(Config()), arguments(Config(optim=OptimConfig("muon")))
    assert (adam["optimizer"], muon["optimizer"]) == ("adam", "muon")
    assert {name: value for name, value in muon.items() if name.startswith("muon_")} == {
        "muon_momentum": 0.95, "muon_use_nesterov": True, "muon_num_ns_steps": 5}
    assert not [name for name in adam if name.startswith("muon_")] and muon["optim.muon.adjust_lr_fn"]


def test_the_banner_line_by_line():
    """Each line of the seeds' banners, in their order, and of the arguments the lines of the same ones."""
    config = replace(config_of(MOE, MeshConfig(fsdp=2, ep=2)),
                     train=TrainConfig(steps=1000, batch_ramp="16,16,64", accumulation=4))
    banner = Megatron(config).start(None, None, 0, ["told"], ["> data"], [[1.0, 20.0], [2.0, 10.0]]).splitlines()
    theirs = sections()["banner"]
    place = theirs.index("training ...(min, max) time across ranks (ms):")
    theirs[place:place + 1] = ["(min, max) time across ranks (ms):"]        # two processes wrote at once

    def key(line):
        return re.sub(r"( \.{3,}) .*", r"\1", shape(line))

    wanted = dict.fromkeys(key(line) for line in theirs if "GPT2BPETokenizer" not in line)
    ours = dict.fromkeys(line for line in map(key, banner) if line in wanted)
    assert wanted.keys() - ours.keys() == set()
    leave = {"(min, max) time across ranks (ms):"}                          # there also of a load
    assert [line for line in ours if line not in leave] == [line for line in wanted if line not in leave]
    assert banner[0] == theirs[0].replace("size: 8, data-parallel size: 8", "size: 2, data-parallel size: 2")
    begin, end = (next(i for i, line in enumerate(banner) if words in line) for words in ("- arguments -", "- end of "))
    arguments = dict(re.fullmatch(r"  (\S+) \.* (.*)", line).groups() for line in banner[begin + 1:end])
    assert list(arguments) == sorted(arguments, key=str.lower)
    for name, value in dict(num_experts=64, hidden_size=512, moe_router_topk=1, expert_model_parallel_size=2,
                            rampup_batch_size=[16, 16, 64], global_batch_size=64, train_iters=1000, lr="0.0006",
                            params_dtype="torch.float32", untie_embeddings_and_output_weights=True).items():
        assert arguments[name] == str(value), name
    assert arguments["model.moe.experts"] == "64" and arguments["log.style"] == "megatron"
    assert " > padded vocab (size: 128256) with 0 dummy tokens (new size: 128256)" in banner
    samples = 16 + 16 + 32 + 997 * 64
    assert f"    train:      {samples}" in banner and "    validation: 0" in banner
    assert banner[-3:-1] == ["told", "training ..."]


# ---- a run -----------------------------------------------------------------------------------------------------------
def test_a_run_in_this_style(data, tmp_path):                                               # noqa: F811
    folder = moe_ext.train.train(parse([*flags(
        data, tmp_path, log__style="megatron", train__steps=6, log__every=2, train__eval_every=3, train__save_every=3,
        train__keep_last=0), "--log.timers"]))
    said, told = (folder / "run.log").read_text().splitlines(), [r for r in records(folder) if "loss" in r]
    lines = [parsed(line)[1] for line in said if " iteration " in line and "|" in line and "valid" not in line]
    assert [line["step"] for line in lines] == [1, 2, 4, 6] and [line["samples"] for line in lines] == [8, 16, 32, 48]
    for line, record in zip(lines, told, strict=True):
        for name in line.keys() & record.keys() - {"step"}:
            digits = dict(ms=0.05, grad_norm=5e-4, parameter_norm=5e-4).get(name, 0)
            assert line[name] == pytest.approx(record[name], abs=digits, rel=1e-6), name
    config = parse(flags(data, tmp_path))
    assert lines[0]["balance"] == pytest.approx(told[0]["aux"] / config.model.moe.balance_weight, rel=1e-5)
    for record in told[2:]:
        if (folder / "ckpt" / f"step-{record['step']:06d}").is_dir():
            squares = [t.double().square().sum() for name, t in tensors(folder, record["step"]).items()
                       if name.startswith("model.")]
            assert record["parameter_norm"] == pytest.approx(math.sqrt(sum(squares)), rel=1e-7)
    valid = next(r for r in records(folder) if "valid_loss" in r)["valid_loss"]
    at = said.index(f" validation loss at iteration 3 | lm loss value: {valid:.6E} | lm loss PPL: "
                    f"{math.exp(valid):.6E} | ")
    assert said[at - 1] == said[at + 1] == "-" * (len(said[at]) + 1)
    assert sum(line.startswith("[Rank 0] (after 1 iterations) memory (MB) | allocated: ") for line in said) == 1
    assert said.count("(min, max) time across ranks (ms):") == 1 + len(lines)
    timed = [line for line in said if "forward-compute" in line]
    assert all(re.fullmatch(r"    forward-compute \.{32}: \(\d+\.\d\d, \d+\.\d\d\)", line) for line in timed)
    place = folder / "ckpt"
    assert f"saving checkpoint at iteration       3 to {place} in torch_dist format" in said
    assert f"  successfully saved checkpoint from iteration       3 to {place} [ t 1/1, p 1/1 ]" in said

    config = replace(config, log=replace(config.log, style="megatron"), train=replace(config.train, steps=7))
    moe_ext.train.train(config, "auto")
    said = (folder / "run.log").read_text()
    assert f"  successfully loaded checkpoint from {place} [ t 1/1, p 1/1 ] at iteration 6\n" in said
    assert "changed since step 6: train.steps was 6 and is 7" in said


def test_a_skipped_iteration_has_no_gradient_norm():
    """As Megatron's first one in fp16: neither a loss nor a norm."""
    numbers = {"step": 1, "samples": 16, "ms": 4493.2, "lr": 0.0, "sequences": 16, "mean_loss": None, "balance": None,
               "loss_scale": 2.0**32, "grad_norm": None, "zeros": None, "parameter_norm": 3.0, "skipped": 1,
               "memory": []}
    line = Megatron(config_of()).step(numbers, 0.0).split("\n")[0]
    assert line.endswith("global batch size:    16 | loss scale: 4294967296.0 | params norm: 3.000 | number of skipped "
                         "iterations:   1 | number of nan iterations:   0 |") and parsed(line)[1]["skipped"] == 1
