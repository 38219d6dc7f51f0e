"""The step line and its rates on a clock that the test turns; metrics that survive a kill and a full disk; what
TensorBoard and wandb get; what the plots show."""
import dataclasses
import io
import json
import math
import mmap
import runpy
import sys
import types
from datetime import datetime
from pathlib import Path

import pytest
import torch

from moe_ext.config import Config, ConfigError, LogConfig, TrainConfig
from moe_ext.log import Log, Memory, Timers, beside, peak_flops, plot, read_metrics
from moe_ext.log.draw import centred_mean
from moe_ext.log.files import Lines, Progress
from moe_ext.log.line import duration, scientific, step_line, thousands
from moe_ext.log.meter import Meter, Spending
from moe_ext.log.writer import cost_of_optimizers, expert_load
from moe_ext.preflight import check_wandb


class Clock:
    now = 100.0

    def __call__(self):
        return self.now

    def run(self, seconds):
        self.now += seconds


@pytest.fixture
def clock():
    return Clock()


def config_of(folder, **options):
    """options: of the log."""
    return Config(log=LogConfig(str(folder.parent), folder.name, **{"tensorboard": False, **options}),
                  train=TrainConfig(steps=100))


def new_log(folder, clock, config=None, **options):
    """Sequences of one token, so that both count alike."""
    config = config or config_of(folder)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, seq_len=1))
    return Log(config, **{"clock": clock, "stream": io.StringIO(), **options})


# ---- rates -----------------------------------------------------------------------------------------------------------
def test_rates_leave_out_the_first_step(clock):
    meter = Meter(clock)
    for seconds in (30.0, 0.5, 0.5, 0.5):
        clock.run(seconds)
        meter.tick(1000)
    assert meter.rates() == pytest.approx((500, 2000))
    clock.run(2.0)
    meter.tick(1000)
    assert meter.rates() == pytest.approx((2000, 500))


def test_a_line_for_the_first_step_shows_it(clock):
    meter = Meter(clock)
    clock.run(30.0)
    meter.tick(1000)
    assert meter.rates() == pytest.approx((30000, 1000 / 30)) and meter.eta(9) == pytest.approx(270)
    clock.run(0.5)
    meter.tick(1000)
    assert meter.rates() == pytest.approx((500, 2000)) and meter.eta(8) == pytest.approx(4)


def test_pauses_count_for_the_eta_alone(clock):
    meter = Meter(clock)
    for step in range(5):
        clock.run(1.0)
        meter.tick(10)
        if step == 2:
            with meter.paused():
                clock.run(40.0)
    assert meter.rates() == pytest.approx((1000, 10))
    assert meter.eta(10) == pytest.approx(10 * 44 / 4)


# ---- the line --------------------------------------------------------------------------------------------------------
def test_the_step_line_verbatim():
    record = {"step": 120, "loss": 3.21449, "aux": 0.0101, "grad_norm": 0.614, "lr": 3e-4, "ms": 412.3,
              "tokens_per_s": 318123.0, "load": 1.312, "dead": 0, "counts_LE": [[10, 30], [20, 20]]}
    line = ("step 120/10000 | loss 3.2145 | aux 1.0e-2 | gnorm 0.61 | lr 3.0e-4 | 412 ms | 318k tok/s | "
            "load 1.31x dead 0{} | eta 1h08m")
    assert step_line(record, 10000, 4100) == line.format("")
    assert step_line(record | {"dropped_L": [0, 0]}, 10000, 4100) == line.format("")
    assert step_line(record | {"dropped_L": [6, 2]}, 10000, 4100) == line.format(" dropped 10.0%")


def test_the_step_line_says_what_optimizers_take():
    record = {"step": 1, "loss": 1.0, "lr": 1.0, "ms": 50.0, "tokens_per_s": 10.0}
    costs = cost_of_optimizers(["adamw", "shampoo"], [[1.0, 3.0, 0.0, 0, 6.0, 1.0, 0.5, 2],
                                                      [0.5, 2.0, 0.0, 0, 4.0, 2.0, 0.25, 1]], 50.0)
    assert costs == {"adamw": {"ms": 1.0, "share": 0.02, "state_mib": 3.0, "sent_mib": 0.0},
                     "shampoo": {"ms": 6.0, "share": 0.12, "state_mib": 2.0, "sent_mib": 0.5, "fallbacks": 3}}
    line = "step 1/2 | loss 1.0000 | lr 1.0e0 | 50 ms | 10 tok/s | {}eta 1s"
    assert step_line(record | {"optimizer": costs}, 2, 1) == line.format("adamw 2% shampoo 12% fell back 3 times | ")
    unmeasured = cost_of_optimizers(["adamw", "muon"], [[0.0, 3.0, 0.0, 0, 0.0, 1.0, 0.5, 0]], 50.0)
    assert step_line(record | {"optimizer": unmeasured}, 2, 1) == line.format("")


def test_numbers_for_people():
    assert [scientific(x) for x in (3e-4, 1.0, 0.0, 1.25e10)] == ["3.0e-4", "1.0e0", "0.0e0", "1.2e10"]
    assert scientific(math.nan) == "nan"
    assert [thousands(x) for x in (950.4, 4412, 44120, 1.2e6, 3.21e7)] == ["950", "4.4k", "44k", "1.2M", "32M"]
    assert [duration(x) for x in (0.4, 59.6, 725, 3600, 4100, 183600)] == [
        "0s", "1m00s", "12m05s", "1h00m", "1h08m", "2d03h"]


def test_a_step_is_printed_logged_and_recorded(tmp_path, clock):
    log = new_log(tmp_path, clock, flops_per_token=1e9, peak_flops=2e13)
    clock.run(9.0)
    log.tick(4096)
    clock.run(0.8192)
    log.tick(4096)
    counts_LE = torch.tensor([[10, 10, 10, 10], [0, 25, 10, 5]])
    line = log.step(2, sequences=4096, loss=2.5, lr=1e-3, aux=0.02, grad_norm=1.0, counts_LE=counts_LE)
    assert line == ("step 2/100 | loss 2.5000 | aux 2.0e-2 | gnorm 1.00 | lr 1.0e-3 | 819 ms | 5.0k tok/s | "
                    "mfu 25.0% | load 2.50x dead 1 | eta 1m20s")
    log.evaluation(2, 2.75, 6.5)
    log.close()
    assert log.stream.getvalue() == (tmp_path / "run.log").read_text()
    assert log.stream.getvalue().splitlines()[0] == line
    assert "valid loss 2.7500 | unigram entropy 6.5000 | below it by 3.7500 nats" in log.stream.getvalue()
    assert beside(6.5, 2.75) == "unigram entropy 2.7500 | above it by 3.7500 nats"
    (train,), (valid,) = read_metrics(tmp_path / "metrics.jsonl")
    assert train["counts_LE"] == counts_LE.tolist() and train["load"] == 2.5 and train["dead"] == 1
    assert train["ms"] == pytest.approx(819.2) and train["loss"] == 2.5 and train["mfu"] == pytest.approx(0.25)
    assert (train["tokens"], train["samples"], train["seconds"]) == (8192, 8192, pytest.approx(9.8192))
    assert valid == {"step": 2, "tokens": 8192, "seconds": train["seconds"], "valid_loss": 2.75,
                     "valid_perplexity": pytest.approx(math.exp(2.75)), "unigram_entropy": 6.5}


def test_a_dense_model_has_no_load(tmp_path, clock):
    log = new_log(tmp_path, clock)
    clock.run(1)
    log.tick(100)
    assert log.step(1, sequences=100, loss=math.nan, lr=1e-3) == (
        "step 1/100 | loss nan | lr 1.0e-3 | 1000 ms | 100 tok/s | eta 1m39s")
    text = (tmp_path / "metrics.jsonl").read_text()             # flushed
    record = json.loads(text, parse_constant=pytest.fail)       # strict JSON: no NaN
    assert record["loss"] is None and "load" not in record


# ---- the file --------------------------------------------------------------------------------------------------------
def test_a_resumed_run_appends_and_the_later_line_holds(tmp_path, clock):
    for losses in ((5.0, 4.0, 3.0), (3.5, 2.5)):
        log = new_log(tmp_path, clock)
        for step, loss in enumerate(losses, start=1 if len(losses) == 3 else 3):
            clock.run(1)
            log.tick(1)
            log.step(step, sequences=1, loss=loss, lr=1.0)
        log.close()
    train, _ = read_metrics(tmp_path / "metrics.jsonl")
    assert [(record["step"], record["loss"]) for record in train] == [(1, 5.0), (2, 4.0), (3, 3.5), (4, 2.5)]


def test_a_line_cut_by_a_kill_is_dropped(tmp_path, clock):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 5.0}\n{"step": 2, "lo')
    assert [record["step"] for record in read_metrics(path)[0]] == [1]
    log = new_log(tmp_path, clock)
    log.evaluation(2, 3.0, 6.0)
    assert [len(records) for records in read_metrics(path)] == [1, 1]
    path.write_text('{"step": 1}\nnonsense\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl: line 2: got 'nonsense'"):
        read_metrics(path)


def board(folder):
    """What TensorBoard shows: {tag: [(step, value)]}"""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder / "tb"))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


NUMBERS = dict(sequences=100, loss=2.5, lr=1e-3, zeros=7, parameter_norm=3.0, counts_LE=torch.tensor([[3, 1], [2, 2]]),
               dropped_L=torch.tensor([1, 0]), memory=[Memory(1, 5, 8, 9), Memory(2, 3, 8, 9)],
               times=[[1, 20, 300, 4], [2, 10, 500, 4]], spent=[[50, 3, 0, 0], [100, 2, 0, 0]])
SCALARS = {"tokens": 100, "samples": 100, "seconds": 1, "sequences": 100, "world": 1, "loss": 2.5, "mean_loss": 2.25,
           "zeros": 7, "parameter_norm": 3, "lr": 1e-3, "loss_scale": 1, "skipped": 0, "ms": 1000,
           "tokens_per_s": 100, "load": 1.5, "dead": 0, "load/layer_00": 1.5, "load/layer_01": 1, "dead/layer_00": 0,
           "dead/layer_01": 0, "entropy/layer_00": 0.811278, "entropy/layer_01": 1, "dropped/layer_00": 1,
           "dropped/layer_01": 0, "memory_mib": 2, "max_memory_mib": 5, "time_ms/data_min": 1, "time_ms/data_max": 2,
           "time_ms/forward_min": 10, "time_ms/forward_max": 20, "time_ms/backward_min": 300,
           "time_ms/backward_max": 500, "time_ms/optimizer_min": 4, "time_ms/optimizer_max": 4,
           "optimizer/adamw_ms": 100, "optimizer/adamw_share": 0.1, "optimizer/adamw_state_mib": 3,
           "optimizer/adamw_sent_mib": 0}
VALID = {"valid_loss": 2.0, "valid_perplexity": math.exp(2), "unigram_entropy": 6.0, "tokens": 100, "seconds": 1}


def tell(log, clock):
    clock.run(1)
    log.tick(100, 2.25)
    log.step(7, **NUMBERS)
    log.evaluation(8, 2.0, 6.0)
    log.close()


def test_tensorboard_gets_the_same_numbers(tmp_path, clock):
    tell(new_log(tmp_path, clock, config_of(tmp_path, tensorboard=True)), clock)
    got = board(tmp_path)
    assert {tag: values[0] for tag, values in got.items()} == (
        {tag: (8, pytest.approx(value)) for tag, value in VALID.items()}
        | {tag: (7, pytest.approx(value, rel=1e-5)) for tag, value in SCALARS.items()})
    assert got["tokens"][1] == (8, 100)


def test_without_tensorboard_the_run_says_so(tmp_path, clock, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    log = new_log(tmp_path, clock, config_of(tmp_path, tensorboard=True))
    assert "TensorBoard is not installed (pip install tensorboard)" in log.stream.getvalue()
    log.evaluation(1, 2.0, 3.0)


class StandIn(types.ModuleType):
    """In place of the package wandb: notes what it is told."""
    def __init__(self, **fails):
        super().__init__("wandb")
        self.told, self.fails, self.id, self.ended = [], fails, None, 0

    def init(self, **options):
        self.options = options
        self.id = options["id"] or f"id{len(self.told)}"
        if "init" in self.fails:
            raise self.fails["init"]
        return self

    def define_metric(self, name, step_metric):
        assert (name, step_metric) == ("*", "step")

    def log(self, numbers):
        if "log" in self.fails:
            raise self.fails["log"]
        self.told.append(numbers)

    def finish(self):
        self.ended += 1


def test_wandb_gets_the_same_numbers_and_goes_on_with_its_run(tmp_path, clock, monkeypatch):
    wandb = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    check_wandb()
    tell(new_log(tmp_path, clock), clock)
    assert wandb.told == [] and wandb.id is None                # nobody asked for it
    config = config_of(tmp_path, wandb="experts")
    tell(new_log(tmp_path, clock, config), clock)
    assert (wandb.options["project"], wandb.options["name"], wandb.ended) == ("experts", tmp_path.name, 1)
    assert wandb.options["config"]["optim.lr"] == 1e-3 and wandb.options["dir"] == str(tmp_path)
    assert wandb.told == [{"step": 7} | {tag: pytest.approx(value) for tag, value in SCALARS.items()},
                          {"step": 8} | {tag: pytest.approx(value) for tag, value in VALID.items()}]
    for samples, same in ((100, "id0"), (0, None)):             # resumed; anew in the same folder
        new_log(tmp_path, clock, config, samples=samples).close()
        assert (wandb.options["id"], wandb.options["resume"]) == (same, "allow")


@pytest.mark.parametrize("place", ["init", "log"])
def test_what_wandb_fails_at_ends_nothing(tmp_path, clock, monkeypatch, place):
    monkeypatch.setitem(sys.modules, "wandb", StandIn(**{place: RuntimeError("no network")}))
    log = new_log(tmp_path, clock, config_of(tmp_path, wandb="experts"))
    tell(log, clock)
    assert (tmp_path / "run.log").read_text().count("no wandb from here on: RuntimeError: no network") == 1
    assert [len(records) for records in read_metrics(tmp_path / "metrics.jsonl")] == [1, 1]


@pytest.mark.parametrize("module", [None, types.ModuleType("wandb")], ids=["absent", "a folder of that name"])
def test_wandb_must_be_there_if_it_is_asked_for(monkeypatch, module):
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(ConfigError, match=r"needs its package: pip install wandb"):
        check_wandb()


def test_a_full_disk_is_told_once_and_the_lines_wait(tmp_path, clock):
    log = new_log(tmp_path, clock)
    full, metrics = Lines(Path("/dev/full"), log.trouble), log.metrics
    log.metrics = full
    log.evaluation(1, 2.0, 3.0)
    log.evaluation(2, 2.0, 3.0)
    assert (tmp_path / "run.log").read_text().count("/dev/full cannot be written: No space left on device: the ") == 1
    full.file = metrics.file                    # somebody has made room
    log.evaluation(3, 2.0, 3.0)
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")[1]] == [1, 2, 3]
    log.text = full
    full.file = Lines(Path("/dev/full"), None).file
    log.say("the console shows it")
    assert log.stream.getvalue().endswith("the console shows it\n")


def test_other_sets_and_choices_have_names_of_their_own(tmp_path, clock):
    log = new_log(tmp_path, clock)
    log.evaluation(5, 2.0, 6.0)
    log.evaluation(5, 1.5, 4.0, "code", bits_per_byte=0.75)
    log.choices(5, {"questions": 40, "acc": 0.25, "acc_stderr": 0.07})
    said = log.stream.getvalue().splitlines()
    assert said[1:] == ["eval 5/100 | code loss 1.5000 | bits per byte 0.7500 | unigram entropy 4.0000 | below it by "
                        "2.5000 nats", "eval 5/100 | choices of 40 | acc 0.2500 +- 0.0700"]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert (lines[1]["code_loss"], lines[1]["code_bits_per_byte"], lines[1]["code_unigram_entropy"]) == (1.5, 0.75, 4.0)
    assert lines[1]["code_perplexity"] == pytest.approx(math.exp(1.5)) and lines[2]["choices_acc"] == 0.25
    assert [[r["step"] for r in kind] for kind in read_metrics(tmp_path / "metrics.jsonl")] == [[], [5]]


# ---- numbers about a step --------------------------------------------------------------------------------------------
def test_expert_load_by_layer():
    counts_LE = torch.tensor([[8, 0, 0, 0], [2, 2, 2, 2], [4, 4, 0, 0], [0, 0, 0, 0]])
    got = expert_load(counts_LE, torch.tensor([3.0, 0.0, 0.0, 0.0]))
    assert got == {"load": 4.0, "dead": 3 + 0 + 2 + 4, "load_L": [4, 1, 2, 0], "dead_L": [3, 0, 2, 4],
                   "entropy_L": pytest.approx([0, 1, 0.5, 0]), "dropped_L": [3, 0, 0, 0],
                   "counts_LE": counts_LE.tolist()}
    assert expert_load(torch.tensor([[5]]))["entropy_L"] == [1.0]


def test_means_and_skipped_steps_since_the_last_line(tmp_path, clock):
    log = new_log(tmp_path, clock)
    for step, (loss, balance) in enumerate([(5.0, 1.5), (None, None), (3.0, 1.0), (2.0, 1.25)], start=1):
        clock.run(1)
        log.tick(10, loss, balance)
        if step in (3, 4):
            log.step(step, sequences=10, loss=loss, lr=1.0)
    records = read_metrics(tmp_path / "metrics.jsonl")[0]
    assert [(r["mean_loss"], r["balance"], r["skipped"], r["tokens"]) for r in records] == [
        (4.0, 1.25, 1, 30), (2.0, 1.25, 0, 40)]


class Slow(torch.optim.Optimizer):
    """A step takes two seconds of the test's clock and leaves 1 MiB of state."""
    fallbacks, owners = 0, types.SimpleNamespace(sent=2**19)

    def __init__(self, clock):
        super().__init__([torch.nn.Parameter(torch.ones(2**18))], {})
        self.clock = clock

    def step(self, closure=None):
        p, = self.param_groups[0]["params"]
        self.state[p]["mean"] = torch.zeros_like(p)
        self.clock.run(2.0)


def test_spending_is_that_of_all_steps_since_the_last_line(monkeypatch):
    """Of three steps one is skipped; fallbacks count once. Muon is another stage's."""
    clock = Clock()
    monkeypatch.setattr("moe_ext.log.meter.time", types.SimpleNamespace(perf_counter=clock))
    optimizer = Slow(clock)
    spending = Spending(optimizer, ["slow", "muon"], Timers(torch.device("cpu")), False)
    spending.tick()
    assert spending.now() == [0, 0, 0.5, 0] + [0] * 4
    for skipped in (False, True, False):
        if not skipped:
            optimizer.step()
            optimizer.fallbacks += 2
        spending.tick()
    assert spending.now() == [pytest.approx(4000 / 3), 1, 0.5, 4] + [0] * 4
    optimizer.step()
    spending.tick()
    assert spending.now() == [pytest.approx(2000), 1, 0.5, 0] + [0] * 4


def test_timers_sum_the_spans_of_a_step_that_has_a_line(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("moe_ext.log.meter.time", types.SimpleNamespace(perf_counter=clock))
    timers = Timers(torch.device("cpu"))

    def step():
        for seconds in (0.25, 0.5):
            with timers("data"):
                clock.run(seconds)
            with timers("backward"):
                clock.run(2 * seconds)
        return timers.milliseconds()

    assert step() == [0, 0, 0, 0]
    timers.on = True
    assert step() == step() == [750, 0, 1500, 0]


def test_memory_of_this_process():
    before = Memory.now(torch.device("cpu"))
    with mmap.mmap(-1, 64 * 2**20) as x:        # malloc may give what other tests have freed, and nothing grows
        for i in range(0, len(x), mmap.PAGESIZE):
            x[i] = 1
        after = Memory.now(torch.device("cpu"))
    assert 50 < after.allocated - before.allocated < 80 and after.max_allocated >= after.allocated


@pytest.mark.parametrize("device, dtype, tflops", [
    ("NVIDIA A100-SXM4-80GB", "bf16", 312), ("NVIDIA A100-PCIE-40GB", "fp32", 19.5),
    ("NVIDIA H100 80GB HBM3", "fp16", 989), ("NVIDIA H100 PCIe", "bf16", 756), ("NVIDIA H200", "bf16", 989),
    ("NVIDIA GeForce RTX 4090", "bf16", 165),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", 0), ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16", 0),
    ("NVIDIA GB200", "bf16", 0), ("Some other card", "fp32", 0)])
def test_the_peak_of_a_device(device, dtype, tflops, monkeypatch):
    config = config_of(Path("runs/x"))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, dtype=dtype))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: device)
    assert peak_flops(config, torch.device("cuda")) == tflops * 1e12
    assert peak_flops(config, torch.device("cpu")) == 0                     # no "mfu" on a CPU
    assert peak_flops(config_of(Path("runs/x"), peak_tflops=2.5), torch.device("cpu")) == 2.5e12


# ---- progress.txt ----------------------------------------------------------------------------------------------------
def test_progress_over_restarts(tmp_path, monkeypatch):
    """Two starts on 4 ranks, one on 2, again one on 4; 10 TFLOP per token."""
    day = [datetime(2026, 1, 31, 12)]
    later = lambda minutes: day.__setitem__(0, day[0].replace(minute=day[0].minute + minutes))      # noqa: E731
    monkeypatch.setenv("SLURM_JOB_ID", "17")

    def start(world, step, tokens):
        progress = Progress(tmp_path, None, world=world, flops_per_token=1e13, clock=lambda: day[0])
        progress.started(step, tokens)
        return progress

    start(4, 0, 0).saved(0, 0)
    later(1)
    progress = start(4, 0, 0)
    later(1)
    progress.saved(500, 2400)
    progress.file.write("somebody's own line")
    start(2, 500, 2400)
    later(1)
    progress = start(4, 500, 2400)
    later(2)
    progress.saved(1000, 7200)
    lines = (tmp_path / "progress.txt").read_text().splitlines()
    assert lines[0] == ("2026-01-31 12:00:00\tJob ID: 17\t# GPUs: 4\tStarting job\tIteration: 0\t"
                        "Floating-point operations: 0.00e+00\tTokens (in billions): 0.000000")
    assert lines[3] == ("2026-01-31 12:02:00\tJob ID: 17\t# GPUs: 4\tSaved checkpoint\tIteration: 500\tJob throughput: "
                        "100.0 TFLOP/s/GPU\tCumulative throughput: 50.0 TFLOP/s/GPU\t"
                        "Floating-point operations: 2.40e+16\tTokens (in billions): 0.000002")
    assert "# GPUs: 2\tStarting job\tIteration: 500" in lines[5]
    assert "Job throughput: 100.0 TFLOP/s/GPU\tCumulative throughput: 100.0 TFLOP/s/GPU" in lines[7]


# ---- the plot --------------------------------------------------------------------------------------------------------
def run_folder(folder, clock, experts=4, seconds=1, slope=8.0):
    log = new_log(folder, clock)
    for step in range(1, 41):
        clock.run(seconds)
        log.tick(10)
        counts_LE = torch.tensor([[step] + [1] * (experts - 1), [2] * experts]) if experts else None
        log.step(step, sequences=10, loss=slope / step, lr=1.0, counts_LE=counts_LE)
        if step % 20 == 0:
            log.evaluation(step, 2.0 + slope / step, 6.25)
    log.close()
    return folder


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved."""
    figure, figures = pytest.importorskip("matplotlib.figure"), []
    save = figure.Figure.savefig
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, out: (figures.append(self), save(self, out)))
    return figures


def test_the_plot_shows_losses_entropy_and_load(tmp_path, clock, drawn):
    out = plot(run_folder(tmp_path / "run", clock), tmp_path / "deep" / "out.png")
    assert out.read_bytes().startswith(b"\x89PNG") and out.stat().st_size > 20_000
    loss, lines, heat = drawn[0].axes[:3]
    curves = {line.get_label().split(" (")[0]: line for line in loss.get_lines()}
    assert list(curves) == ["train", "train, centred mean", "held out", "unigram entropy of held-out tokens"]
    assert list(curves["train"].get_ydata()) == [8.0 / step for step in range(1, 41)]
    assert list(curves["held out"].get_ydata()) == [2.4, 2.2]
    assert set(curves["unigram entropy of held-out tokens"].get_ydata()) == {6.25}
    assert (loss.get_xlabel(), loss.get_ylabel()) == ("step", "loss (nats per token)")
    layer0, layer1 = lines.get_lines()[:2]
    assert list(layer0.get_ydata()) == pytest.approx([4 * step / (step + 3) for step in range(1, 41)])
    assert set(layer1.get_ydata()) == {1.0} and lines.get_ylabel() and lines.get_xlabel() == "step"
    shares = heat.get_images()[0].get_array()
    assert shares.shape == (2, 4) and shares[0, 0] == pytest.approx(4 * 355 / 385)      # steps 31 to 40
    assert (heat.get_xlabel(), heat.get_ylabel()) == ("expert", "MoE layer")


def test_a_dense_run_plots_its_loss_alone(tmp_path, clock):
    pytest.importorskip("matplotlib")
    assert plot(run_folder(tmp_path / "run", clock, experts=0)) == tmp_path / "run" / "plot.png"


def test_a_comparison_draws_each_run_over_each_axis_and_its_load(tmp_path, clock, drawn, monkeypatch):
    runs = [run_folder(tmp_path / "dense" / "run", clock, experts=0),
            run_folder(tmp_path / "moe" / "run", clock, seconds=1.8, slope=6.0),
            run_folder(tmp_path / "coarse" / "run", clock, experts=2, seconds=3.6)]
    monkeypatch.chdir(tmp_path)
    assert plot(runs) == Path("comparison.png") and Path("comparison.png").read_bytes().startswith(b"\x89PNG")
    step, tokens, minutes, moe, coarse, bar = drawn[0].axes
    labels = [text.get_text() for text in step.get_legend().get_texts()]
    assert labels == ["dense/run (2.200)", "moe/run (2.150)", "coarse/run (2.200)"]
    for panel, places, name in ((step, [20, 40], "step"), (tokens, [200, 400], "tokens"),
                                (minutes, [0.6, 1.2], "running time (minutes)")):
        heldout = {line.get_label(): line for line in panel.get_lines() if line.get_marker() == "o"}
        assert list(heldout) == labels and panel.get_xlabel() == name and len(panel.get_lines()) == 6
        assert list(heldout["moe/run (2.150)"].get_xdata()) == pytest.approx(places)
        assert list(heldout["moe/run (2.150)"].get_ydata()) == pytest.approx([2.3, 2.15])
    loads = [panel.get_images()[0] for panel in (moe, coarse)]
    assert [load.get_array().shape for load in loads] == [(2, 4), (2, 2)] and "moe/run" in moe.get_title()
    assert loads[0].norm.vmax == loads[1].norm.vmax == pytest.approx(4 * 355 / 385)         # one scale
    assert bar.get_ylabel() == "tokens / layer's mean"
    assert plot(runs[:2], tmp_path / "time.png", "time") == tmp_path / "time.png"
    assert [panel.get_xlabel() for panel in drawn[1].axes[:2]] == ["running time (minutes)", "expert"]


def test_files_of_earlier_versions_plot_by_step(tmp_path, clock, drawn):
    new, old = run_folder(tmp_path / "new", clock), tmp_path / "old"
    old.mkdir()
    lines = [json.loads(line) for line in (new / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["tokens"], line["seconds"]
    (old / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plot(old)
    with pytest.raises(ValueError, match=r"old/metrics.jsonl has lines without 'tokens'.* plot it --by step"):
        plot(old, by="tokens")
    plot([new, old], tmp_path / "both.png")
    assert [len(panel.get_lines()) for panel in drawn[1].axes[:3]] == [4, 2, 2]
    assert drawn[1].axes[1].get_title() == "not known of old"


def test_a_centred_mean_does_not_lag():
    line = [3.0 * i for i in range(50)]
    assert centred_mean(line, 5) == pytest.approx(line)
    assert centred_mean([0.0, 3.0, 0.0, 3.0, 0.0], 1) == pytest.approx([0, 1, 2, 1, 0])


def test_plot_says_what_is_missing(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(FileNotFoundError, match=r"holds metrics.jsonl"):
        plot(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="no step line"):
        plot(tmp_path)
    with pytest.raises(ValueError, match="got no run to plot: give one"):
        plot([])
    with pytest.raises(ValueError, match=r"-o .*/out: wanted the name of an image, as in -o .*/out/plot.png"):
        plot(tmp_path, tmp_path / "out")


def test_plot_without_matplotlib(tmp_path, clock, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(RuntimeError, match="pip install matplotlib"):
        plot(run_folder(tmp_path, clock))


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["moe_ext.log", *map(str, arguments)])
    runpy.run_module("moe_ext.log", run_name="__main__")


def test_the_command(tmp_path, clock, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    run = run_folder(tmp_path / "run", clock)
    for options in ([run], [run, "--by", "tokens"], [run, run_folder(tmp_path / "two", clock)]):
        out = tmp_path / "curves.png"
        command(monkeypatch, "plot", *options, "-o", out)
        assert capsys.readouterr().out.strip() == str(out) and out.read_bytes().startswith(b"\x89PNG")
        out.unlink()
    with pytest.raises(SystemExit, match=r"error: no .*metrics.jsonl"):
        command(monkeypatch, "plot", tmp_path)
