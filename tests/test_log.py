"""The step line and its rates on a clock that the test turns; metrics that survive a kill; what the plot shows."""
import io
import json
import math
import runpy
import sys

import pytest
import torch

from moe_ext import log as log_file
from moe_ext.log import Log, Meter, beside, duration, plot, read_metrics, scientific, step_line, thousands


class Clock:
    now = 100.0

    def __call__(self):
        return self.now

    def run(self, seconds):
        self.now += seconds


@pytest.fixture
def clock():
    return Clock()


def new_log(folder, clock, **options):
    return Log(folder, **{"steps": 100, "tensorboard": False, "clock": clock, "stream": io.StringIO(), **options})


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
              "tokens_per_s": 318123.0, "load": 1.312, "dead": 0}
    assert step_line(record, 10000, 4100) == (
        "step 120/10000 | loss 3.2145 | aux 1.0e-2 | gnorm 0.61 | lr 3.0e-4 | 412 ms | 318k tok/s | "
        "load 1.31x dead 0 | eta 1h08m")


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
    line = log.step(2, loss=2.5, lr=1e-3, aux=0.02, grad_norm=1.0, counts_LE=counts_LE)
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
    assert valid == {"step": 2, "valid_loss": 2.75, "unigram_entropy": 6.5}


def test_a_dense_model_has_no_load(tmp_path, clock):
    log = new_log(tmp_path, clock)
    clock.run(1)
    log.tick(100)
    assert log.step(1, loss=math.nan, lr=1e-3) == "step 1/100 | loss nan | lr 1.0e-3 | 1000 ms | 100 tok/s | eta 1m39s"
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
            log.step(step, loss=loss, lr=1.0)
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


def test_tensorboard_gets_the_same_numbers(tmp_path, clock):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = new_log(tmp_path, clock, tensorboard=True)
    clock.run(1)
    log.tick(100)
    log.step(7, loss=2.5, lr=1e-3, counts_LE=torch.tensor([[3, 1]]))
    log.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    got = {tag: (events.Scalars(tag)[0].step, events.Scalars(tag)[0].value) for tag in events.Tags()["scalars"]}
    assert got == {"loss": (7, 2.5), "lr": (7, pytest.approx(1e-3)), "ms": (7, 1000), "tokens_per_s": (7, 100),
                   "load": (7, 1.5), "dead": (7, 0)}


def test_without_tensorboard_the_run_says_so(tmp_path, clock, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    log = new_log(tmp_path, clock, tensorboard=True)
    assert "TensorBoard is not installed" in log.stream.getvalue()
    log.evaluation(1, 2.0, 3.0)


# ---- the plot --------------------------------------------------------------------------------------------------------
def run_folder(tmp_path, clock, experts=4):
    log = new_log(tmp_path / "run", clock)
    for step in range(1, 41):
        clock.run(1)
        log.tick(1)
        counts_LE = torch.tensor([[step] + [1] * (experts - 1), [2] * experts]) if experts else None
        log.step(step, loss=8.0 / step, lr=1.0, counts_LE=counts_LE)
    log.evaluation(20, 3.0, 6.25)
    log.evaluation(40, 2.0, 6.25)
    log.close()
    return tmp_path / "run"


def test_the_plot_shows_losses_entropy_and_load(tmp_path, clock, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    save = figure.Figure.savefig
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, out: (drawn.append(self), save(self, out)))
    out = plot(run_folder(tmp_path, clock), tmp_path / "deep" / "out.png")
    assert out.read_bytes().startswith(b"\x89PNG") and out.stat().st_size > 20_000
    loss, lines, heat = drawn[0].axes[:3]
    curves = {line.get_label().split(" (")[0]: line for line in loss.get_lines()}
    assert list(curves) == ["train", "train, centred mean", "held out", "unigram entropy of held-out tokens"]
    assert list(curves["train"].get_ydata()) == [8.0 / step for step in range(1, 41)]
    assert list(curves["held out"].get_ydata()) == [3.0, 2.0]
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
    assert plot(run_folder(tmp_path, clock, experts=0)) == tmp_path / "run" / "plot.png"


def test_a_centred_mean_does_not_lag():
    line = [3.0 * i for i in range(50)]
    assert log_file.centred_mean(line, 5) == pytest.approx(line)
    assert log_file.centred_mean([0.0, 3.0, 0.0, 3.0, 0.0], 1) == pytest.approx([0, 1, 2, 1, 0])


def test_plot_says_what_is_missing(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(FileNotFoundError, match=r"holds metrics.jsonl"):
        plot(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="no step line"):
        plot(tmp_path)


def test_plot_without_matplotlib(tmp_path, clock, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(RuntimeError, match="pip install matplotlib"):
        plot(run_folder(tmp_path, clock))


def test_the_command(tmp_path, clock, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    run = run_folder(tmp_path, clock)
    monkeypatch.setattr(sys, "argv", ["moe_ext.log", "plot", str(run), "-o", str(tmp_path / "curves.png")])
    runpy.run_path(log_file.__file__, run_name="__main__")
    assert capsys.readouterr().out.strip() == str(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(sys, "argv", ["moe_ext.log", "plot", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"error: no .*metrics.jsonl"):
        runpy.run_path(log_file.__file__, run_name="__main__")
