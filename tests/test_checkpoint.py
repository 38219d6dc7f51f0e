"""Checkpoints: bitwise continuation, nothing loaded by halves, a kill at any moment leaves the previous one whole."""
import copy
import json
import os
import signal
import sys

import pytest
import torch
from ranks import fork
from safetensors import safe_open
from torch import nn

from moe_ext.checkpoint import CheckpointError, latest, load, read_state, save, whole
from moe_ext.config import OptimConfig
from moe_ext.optim import build_optimizer
from moe_ext.optim.adamw import AdamW

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = {"model": {"dim": 8, "moe": {"experts": 4, "top_k": 2}}, "train": {"steps": 100}}


class Model(nn.Module):
    """Dropout (torch's generator), a tied head, a strided parameter, and a buffer that moves outside autograd."""

    def __init__(self, dim=8, head=True):
        super().__init__()
        self.embed = nn.Embedding(16, dim)
        self.w_EOI = nn.Parameter(torch.randn(4, dim, dim).transpose(1, 2))
        self.scale = nn.Parameter(torch.tensor(1.0))
        if head:
            self.head = nn.Linear(dim, 16, bias=False)
            self.head.weight = self.embed.weight
        self.register_buffer("select_bias_E", torch.zeros(4))
        self.register_buffer("cache", torch.zeros(3), persistent=False)

    def forward(self, ids_T):
        x_TD = nn.functional.dropout(self.embed(ids_T), 0.2)
        x_ETD = torch.tanh(x_TD @ self.w_EOI + self.select_bias_E[:, None, None])
        return self.head(self.scale * x_ETD.sum(0))


class Stream:
    """A data loader in miniature."""

    def __init__(self):
        self.row = 0

    def batch(self):
        self.row += 1
        return (torch.arange(12) * self.row) % 16

    def state_dict(self):
        return {"row": self.row}

    def load_state_dict(self, state):
        self.row = state["row"]


class Run:
    def __init__(self, seed=0, **options):
        torch.manual_seed(seed)
        self.model = Model(**options)
        self.optimizer = build_optimizer(self.model, OptimConfig(lr=0.01))
        self.loader = Stream()

    def train(self, steps):
        losses = []
        for _ in range(steps):
            ids = self.loader.batch()
            loss = nn.functional.cross_entropy(self.model(ids), ids.roll(1))
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.model.select_bias_E += 0.1 * torch.rand(4)
            losses.append(loss.item())
        return losses

    def save(self, folder, step, **options):
        return save(folder, model=self.model, optimizer=self.optimizer, loader=self.loader, step=step, config=CONFIG,
                    **options)

    def load(self, path, config=CONFIG):
        return load(path, model=self.model, optimizer=self.optimizer, loader=self.loader, config=config)

    def bits(self):
        """Everything that a checkpoint must restore, by value."""
        moved = {name: dict(self.optimizer.state[p]) for name, p in self.model.named_parameters()}
        return copy.deepcopy((self.model.state_dict(), moved, self.loader.row, torch.get_rng_state()))


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, torch.Tensor) else a == b


@pytest.fixture
def run():
    run = Run()
    run.train(3)
    return run


# ---- continuation ----------------------------------------------------------------------------------------------------
def test_training_continues_bitwise(tmp_path, run):
    path = run.save(tmp_path, 3, best_loss=2.123456789012345)
    saved = run.bits()
    straight = run.train(4), run.bits()

    other = Run(seed=99)
    other.train(2)
    state = other.load(path)
    assert equal(other.bits(), saved)
    assert (other.train(4), other.bits())[0] == straight[0] and equal(other.bits(), straight[1])
    assert (state.step, state.best_loss, state.config) == (3, 2.123456789012345, CONFIG)
    assert other.model.head.weight is other.model.embed.weight
    assert other.optimizer.state[other.model.w_EOI]["exp_avg"].stride() == other.model.w_EOI.stride()


def test_torchs_adamw_and_ours_continue_each_other(tmp_path):
    """Bit for bit; a checkpoint from before there were several optimizers does not say which one moved what."""
    runs = [Run(seed=seed) for seed in (0, 1)]
    runs[0].optimizer = torch.optim.AdamW(runs[0].model.parameters(), 0.01, fused=True)
    runs[1].optimizer = AdamW(runs[1].model.parameters(), 0.01)
    for one, other in (runs, runs[::-1]):
        one.train(2)
        path = one.save(tmp_path, 2)
        listed = json.loads((path / "state.json").read_text())
        assert set(listed["optimizer"].pop("movers").values()) == {"AdamW"}
        (path / "state.json").write_text(json.dumps(listed))
        other.load(path)
        assert equal(other.bits(), one.bits())
        losses = one.train(2), one.bits()
        other.load(path)
        assert other.train(2) == losses[0] and equal(other.bits(), losses[1])


def test_an_optimizer_before_its_first_step(tmp_path):
    fresh = Run()
    path = fresh.save(tmp_path, 0)
    straight = fresh.train(2)
    other = Run(seed=1)
    other.train(2)
    other.load(path)
    assert other.train(2) == straight and read_state(path).best_loss is None


@pytest.mark.parametrize("make", [
    lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, foreach=True),
    lambda model: torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)], ids=["unfused AdamW", "SGD"])
def test_other_optimizers(tmp_path, make):
    run, other = Run(), Run(seed=1)
    run.optimizer, other.optimizer = make(run.model), make(other.model)
    run.train(2)
    path, saved, straight = run.save(tmp_path, 2), run.bits(), run.train(2)
    other.load(path)
    assert equal(other.bits(), saved) and other.train(2) == straight


def test_the_model_alone(tmp_path, run):
    path = run.save(tmp_path, 3)
    other = Run(seed=1)
    before = torch.get_rng_state()
    assert load(path, model=other.model, config=CONFIG).step == 3
    assert equal(other.model.state_dict(), run.model.state_dict())
    assert torch.equal(torch.get_rng_state(), before) and not other.optimizer.state


def test_what_is_on_disk(tmp_path, run):
    """safetensors and JSON, no pickle; tied parameters once; no non-persistent buffer."""
    path = run.save(tmp_path, 3)
    files = sorted(file.name for file in path.iterdir())
    assert files[-1] == "state.json" and all(name.endswith(".safetensors") for name in files[:-1]) and len(files) == 2
    with safe_open(path / files[0], "pt") as file:
        names = set(file.keys())
    states = {f"optim.{name}.{key}" for name in ("embed.weight", "w_EOI", "scale")
              for key in ("exp_avg", "exp_avg_sq", "step")}
    assert names - {"rng.cuda"} == states | {"model.embed.weight", "model.w_EOI", "model.scale", "model.select_bias_E",
                                             "rng.cpu"}


# ---- which checkpoints there are -------------------------------------------------------------------------------------
def test_keep_last_and_latest(tmp_path, run):
    assert latest(tmp_path / "nothing") is None
    for step in (3, 9, 10, 1_000_000):
        path = run.save(tmp_path, step, keep_last=2)
        assert latest(tmp_path) == path
    assert sorted(file.name for file in tmp_path.iterdir()) == ["step-000010", "step-1000000"]


def test_an_earlier_step_is_kept_when_it_was_just_saved(tmp_path, run):
    """A run resumed from an old checkpoint saves below the newest one."""
    run.save(tmp_path, 9)
    run.save(tmp_path, 3, keep_last=1)
    assert [file.name for file in tmp_path.iterdir()] == ["step-000003"]


def test_the_same_step_again_takes_the_place_of_the_first(tmp_path, run):
    run.save(tmp_path, 3)
    run.train(1)
    run.save(tmp_path, 3)
    assert [file.name for file in tmp_path.iterdir()] == ["step-000003"]
    other = Run(seed=1)
    other.load(tmp_path / "step-000003")
    assert equal(other.bits(), run.bits())


def test_unfinished_folders_do_not_count_and_are_cleared(tmp_path, run):
    path = run.save(tmp_path, 3)
    (tmp_path / "step-000004.tmp-x").mkdir()
    (tmp_path / "step-000005.tmp-discarded").mkdir()
    assert latest(tmp_path) == path
    run.save(tmp_path, 6)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["step-000003", "step-000006"]


def die_at(event, folder):
    """From now on this process is killed at its event-th file operation in `folder`; nothing more is written."""
    left = [event]

    def hook(name, arguments):
        if name in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir") and str(folder) in str(arguments[0]):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)


@pytest.mark.parametrize("old_step, new_step, keep_last", [(3, 5, 1), (5, 5, 1)], ids=["next step", "same step"])
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path, run, old_step, new_step, keep_last):
    """One child per file operation of a save, killed there by SIGKILL; then the folder is used as a run would."""
    old = run.bits()
    run.train(2)
    new = run.bits()
    outcomes = []
    for event in range(1, 200):
        folder = tmp_path / str(event)
        previous = Run(seed=7)
        torch.set_rng_state(old[3])
        previous.model.load_state_dict(old[0])
        for name, p in previous.model.named_parameters():
            previous.optimizer.state[p] = copy.deepcopy(old[1][name])
        previous.loader.row = old[2]
        previous.save(folder, old_step)

        child = fork()
        if child == 0:
            torch.set_rng_state(new[3])
            die_at(event, folder)
            run.save(folder, new_step, keep_last=keep_last)
            os._exit(0)
        status = os.waitpid(child, 0)[1]

        survivor = Run(seed=8)
        for path in whole(folder):          # none of them in pieces, the newest last
            survivor.load(path)
        found = [bits for bits in (old, new) if equal(survivor.bits(), bits)]
        assert len(found) == 1, f"killed at file operation {event}: neither the old nor the new checkpoint"
        outcomes.append(found[0] is new)
        assert survivor.save(folder, 9, keep_last=1) == latest(folder)
        assert [file.name for file in folder.iterdir()] == ["step-000009"]
        if not os.WIFSIGNALED(status):
            break
    assert os.WEXITSTATUS(status) == 0 and len(outcomes) > 10
    assert not outcomes[0] and outcomes[-1] and outcomes == sorted(outcomes)    # old up to one operation, then new


# ---- what does not fit -----------------------------------------------------------------------------------------------
def edit(path, change):
    """Rewrite the tensors of a checkpoint after change(dict)."""
    from safetensors.torch import load_file, save_file
    (file,) = path.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    info = {name: {"saved_offsets": [0] * tensor.ndim} for name, tensor in tensors.items()}
    save_file(tensors, file, metadata={"DCP_SHARDING_INFO": json.dumps(info), "DCP_VERSION": "1.0"})


def set_to(name, value):
    return lambda tensors: tensors.update({name: value})


def removed(name):
    return lambda tensors: tensors.pop(name)


@pytest.mark.parametrize("change, message", [
    (removed("model.w_EOI"), "missing from the checkpoint: model.w_EOI"),
    (removed("model.select_bias_E"), "missing from the checkpoint: model.select_bias_E"),
    (set_to("model.extra", torch.zeros(2)), "unexpected in the checkpoint: model.extra"),
    (set_to("model.scale", torch.zeros(2)), r"model.scale: got torch.float32 \[2\], wanted torch.float32 \[\]"),
    (set_to("model.w_EOI", torch.zeros(4, 8, 8).half()), "model.w_EOI: got torch.float16"),
    (removed("optim.w_EOI.exp_avg_sq"), "missing from the checkpoint: optim.w_EOI.exp_avg_sq"),
    (set_to("optim.w_EOI.other", torch.zeros(2)), "unexpected in the checkpoint: optim.w_EOI.other"),
    (set_to("optim.w_EOI.exp_avg", torch.zeros(2)), r"optim.w_EOI.exp_avg: got .* \[2\], wanted .* \[4, 8, 8\]"),
    (set_to("rng.cpu", torch.zeros(3, dtype=torch.uint8)), r"rng.cpu: got torch.uint8 \[3\], wanted"),
    (removed("rng.cpu"), "missing from the checkpoint: rng.cpu"),
])
def test_every_tensor_must_fit(tmp_path, run, change, message):
    path = run.save(tmp_path, 3)
    edit(path, change)
    other = Run(seed=1)
    before = other.bits()
    with pytest.raises(CheckpointError, match=message) as error:
        other.load(path)
    assert str(path) in str(error.value) and "use another checkpoint" in str(error.value)
    assert equal(other.bits(), before)


def test_an_untouched_copy_still_loads(tmp_path, run):
    """edit() itself does no harm: the cases above fail for their own reason."""
    path = run.save(tmp_path, 3)
    edit(path, lambda tensors: None)
    other = Run(seed=1)
    other.load(path)
    assert equal(other.bits(), run.bits())


def test_another_model_is_refused_by_its_fields(tmp_path, run):
    path = run.save(tmp_path, 3)
    wanted = copy.deepcopy(CONFIG)
    wanted["model"]["moe"]["top_k"] = 1
    wanted["model"]["bias"] = True
    wanted["train"]["steps"] = 7        # not the model's: allowed
    with pytest.raises(CheckpointError) as error:
        Run().load(path, config=wanted)
    assert "model.moe.top_k: the checkpoint has 2, this run wants 1" in str(error.value)
    assert "model.bias: the checkpoint has False, this run wants True" in str(error.value)
    assert "dim" not in str(error.value) and "train" not in str(error.value)
    del wanted["model"]["bias"]
    wanted["model"]["moe"]["top_k"] = 2
    assert Run().load(path, config=wanted).step == 3


def test_other_parameters_or_another_optimizer_are_refused(tmp_path, run):
    path = run.save(tmp_path, 3)
    wider = Run(dim=16)
    with pytest.raises(CheckpointError, match=r"model.w_EOI: got .*\[4, 8, 8\], wanted .*\[4, 16, 16\]"):
        wider.load(path, config=None)
    other = Run()
    other.model.scale.requires_grad_(False)
    other.optimizer = build_optimizer(other.model, OptimConfig())
    with pytest.raises(CheckpointError, match="parameter scale: the checkpoint's optimizer moved it, this run's "):
        other.load(path)
    with pytest.raises(CheckpointError, match=r"parameter scale: .* did not move it, this run's does"):
        Run().load(other.save(tmp_path, 4))
    other = Run()
    other.optimizer = torch.optim.SGD(other.model.parameters(), lr=1.0)
    with pytest.raises(CheckpointError, match="got the state of AdamW, wanted that of SGD"):
        other.load(path)


def test_damaged_and_missing_files(tmp_path, run):
    with pytest.raises(FileNotFoundError, match="give a folder ckpt/step-NNNNNN"):
        read_state(tmp_path / "nothing")
    path = run.save(tmp_path, 3)
    (file,) = path.glob("*.safetensors")
    intact = file.read_bytes()
    for data in (intact[:-1], intact[:100], b"", b"\xff" * 200):
        file.write_bytes(data)
        with pytest.raises(CheckpointError, match="use an earlier checkpoint"):
            Run().load(path)
    file.unlink()
    with pytest.raises(CheckpointError, match="missing from the checkpoint"):
        Run().load(path)
    for text, message in (("{", "damaged"), ('{"format": 99}', "not of format 1")):
        (path / "state.json").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            Run().load(path)


def test_state_that_is_no_tensor_is_refused_when_it_is_saved(tmp_path, run):
    run.optimizer.state[run.model.scale]["note"] = "text"
    with pytest.raises(CheckpointError, match=r"optim.scale.note: got str, wanted a tensor"):
        run.save(tmp_path, 3)
    assert latest(tmp_path) is None


def test_a_failed_write_is_an_ordinary_error(tmp_path, run, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr("torch.distributed.checkpoint.filesystem.os.fsync", full)
    with pytest.raises(CheckpointError, match="No space left"):
        run.save(tmp_path, 3)
    monkeypatch.undo()
    assert latest(tmp_path) is None
    assert run.save(tmp_path, 3) == latest(tmp_path) and whole(tmp_path) == [tmp_path / "step-000003"]
