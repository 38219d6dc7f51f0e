"""The run folder: one process at a time, one branch at a time, from any working directory; what a resume may change."""
import dataclasses
import errno
import fcntl
import json
import os
import shutil
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from ranks import fork, run_ranks
from test_checkpoint import die_at
from test_train import RECIPE, assert_same_checkpoint, data, flags, main, records, run  # noqa: F401

import moe_ext.train
from moe_ext import checkpoint, evaluate, generate
from moe_ext.checkpoint import TRAINING_ONLY, CheckpointError
from moe_ext.config import ConfigError, ModelConfig, MoEConfig, TuneConfig, load, parse
from moe_ext.data import IndexedWriter
from moe_ext.layers.lora import lora_parameters
from moe_ext.log import plot, split_events, split_metrics
from moe_ext.model import GPT
from moe_ext.run import lock, locked, set_aside

NOTHING = dict(data__tokenizer="", data__valid="")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def said(folder):
    return (folder / "run.log").read_text()


def scalars(folder, tag="loss"):
    """What TensorBoard shows: (step, value) by rising step."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder), purge_orphaned_data=False)
    events.Reload()
    return [(event.step, pytest.approx(event.value)) for event in events.Scalars(tag)]


# ---- one branch at a time --------------------------------------------------------------------------------------------
def test_rolling_back_sets_the_later_branch_aside(data, tmp_path):                          # noqa: F811
    def start(resume="", **options):
        config = parse([*flags(data, tmp_path, train__save_every=5, **NOTHING, **options), "--log.tensorboard"])
        return moe_ext.train.train(config, resume)

    folder = start(train__keep_last=0)
    before = records(folder)
    start(str(folder / "ckpt" / "step-000010"), train__steps=18, optim__lr=5e-3)

    assert names(folder / "ckpt") == ["step-000015", "step-000018"]        # keep_last counts this branch alone
    assert checkpoint.latest(folder / "ckpt").name == "step-000018" and evaluate.load_run(folder).step == 18
    aside = folder / "abandoned" / "after-000010-1"
    plotted = ["plot.png"] if find_spec("matplotlib") else []
    assert names(aside) == ["ckpt", "config.toml", "metrics.jsonl", *plotted, "tb"]
    assert names(aside / "ckpt") == ["step-000015", "step-000020"] and load(aside / "config.toml").optim.lr == 1e-2
    assert [r["step"] for r in records(folder)] == [1, 5, 10, 11, 15, 18]
    assert records(folder)[:3] == before[:3] and records(aside) == before[3:]
    for place in (folder, aside):
        assert scalars(place / "tb") == [(r["step"], r["loss"]) for r in records(place)]
    assert not plotted or plot(aside, tmp_path / "aside.png").is_file()
    (events,) = names(aside / "tb")
    assert (f"set aside in {aside} what lay beyond step 10: step-000015, step-000020, tb/{events}, metrics.jsonl\n"
            "changed since step 10: train.steps was 20 and is 18\n") in said(folder)
    moe_ext.train.train(load(folder / "config.toml"), str(aside / "ckpt" / "step-000015"))      # and back
    assert [r["step"] for r in records(folder)] == [16, 18] and checkpoint.latest(folder / "ckpt").name == "step-000018"
    assert names(folder / "abandoned") == ["after-000000-1", "after-000010-1"]


def test_a_killed_run_leaves_no_lines_to_the_next(data, tmp_path, monkeypatch):             # noqa: F811
    def fail_in_step(number):
        monkeypatch.setattr(moe_ext.train, "set_learning_rate",
                            lambda optimizer, lr: 1 / (number - len(calls)) and calls.append(lr))

    options = dict(log__every=1, train__save_every=5, **NOTHING)
    for number in (4, 9):                       # before the first checkpoint, and after it
        calls = []
        fail_in_step(number)
        with pytest.raises(ZeroDivisionError):
            run(data, tmp_path, "auto", **options)
    monkeypatch.undo()
    folder = run(data, tmp_path, "auto", **options)
    assert [r["step"] for r in records(folder)] == list(range(1, 21))
    assert [[r["step"] for r in records(folder / "abandoned" / name)] for name in ("after-000000-1", "after-000005-1")
            ] == [[1, 2, 3, 4], [6, 7, 8, 9]]
    assert not (folder / "lock").exists()


@pytest.fixture(scope="module")
def branch(tmp_path_factory):
    """A folder as a run leaves it: checkpoints 2, 4, 6, 8 of which 8 also as .old, lines and events of steps 1 to 9."""
    folder = tmp_path_factory.mktemp("branch") / "run"
    for name in ("step-000002", "step-000004", "step-000006", "step-000008", "step-000008.old"):
        (folder / "ckpt" / name).mkdir(parents=True)
        (folder / "ckpt" / name / "state.json").write_text(name)
    (folder / "config.toml").write_text("# theirs")
    (folder / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 10)))
    writer = pytest.importorskip("torch.utils.tensorboard").SummaryWriter(str(folder / "tb"))
    for step in range(1, 10):
        writer.add_scalar("loss", 0.5 * step, step)
    writer.close()
    return folder


def test_a_kill_at_any_moment_of_setting_aside(tmp_path, branch):
    """The newest checkpoint is the old branch's until it is the start's; nothing is lost; the next start, from whatever
    is the newest, has all lines up to it and no other."""
    newest = []
    for event in range(1, 200):
        folder = tmp_path / str(event)
        shutil.copytree(branch, folder)
        child = fork()
        if child == 0:
            die_at(event, folder)
            set_aside(folder, 4)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        newest.append(checkpoint.step_of(checkpoint.latest(folder / "ckpt")))
        set_aside(folder, newest[-1])
        assert {path.name for path in folder.glob("**/step-*")} == {path.name for path in branch.glob("ckpt/step-*")}
        assert [r["step"] for r in records(folder)] == list(range(1, newest[-1] + 1))
        assert [step for step, _ in scalars(folder / "tb")] == list(range(1, newest[-1] + 1))
        kept = {r["step"] for place in (folder / "abandoned").iterdir() if (place / "metrics.jsonl").exists()
                for r in records(place)}
        assert kept == set(range(newest[-1] + 1, 10))
        if not os.WIFSIGNALED(status):
            break
    assert os.WEXITSTATUS(status) == 0 and len(newest) > 10
    assert newest == sorted(newest, reverse=True) and set(newest) == {8, 4}
    assert set_aside(folder, 4) == []
    assert (folder / "abandoned" / "after-000004-1" / "config.toml").read_text() == "# theirs"


def test_what_is_no_record_stays(branch):
    (file,) = (branch / "tb").iterdir()
    events = file.read_bytes()
    assert split_events(events, 9) == (events, b"")
    assert split_events(events[:-1], 8) == (split_events(events, 8)[0], b"")        # a record cut by a kill
    header = split_events(events, 0)[0]
    assert len(header) > 16 and split_events(events, 0) == (header, events)
    writer = pytest.importorskip("torch.utils.tensorboard").SummaryWriter(str(branch.parent / "large"))
    writer.add_scalar("loss", 1.0, 3_000_000_000)
    writer.close()
    (file,) = (branch.parent / "large").iterdir()
    assert [split_events(file.read_bytes(), step)[1] == b"" for step in (2_999_999_999, 3_000_000_000)] == [False, True]
    assert split_metrics(b'{"step": 7}\nnonsense\n[]\n{"step": 9}\n{"st', 7) == (
        b'{"step": 7}\nnonsense\n[]\n{"st', b'{"step": 9}\n')


# ---- one process at a time -------------------------------------------------------------------------------------------
def test_a_second_run_in_the_folder_is_refused(data, tmp_path, monkeypatch, capsys):        # noqa: F811
    folder = run(data, tmp_path, train__steps=5, train__save_every=0)
    ready, hold = os.pipe()
    child = fork()
    if child == 0:
        held = lock(folder)
        os.write(hold, b"!")
        signal.pause()
        held.close()
    os.read(ready, 1)
    try:
        with pytest.raises(ConfigError, match=rf"in use by process {child} on \S+: wait .* choose another --log.name"):
            run(data, tmp_path, "auto", train__steps=6)
        assert len(records(folder)) == 3 and names(folder / "ckpt") == ["step-000005"]
        main(monkeypatch, evaluate, folder)                                 # readers need no lock
        main(monkeypatch, generate, folder, "--max-tokens", "2")
        main(monkeypatch, moe_ext.train, *flags(data, tmp_path), "--dry-run", "--resume", "auto")
        assert not find_spec("matplotlib") or plot(folder) == folder / "plot.png"
        assert "step 5 | valid loss" in capsys.readouterr().out
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert (folder / "lock").exists()                                       # the crash leaves the file, not the lock
    run(data, tmp_path, "auto", train__steps=6)
    assert checkpoint.latest(folder / "ckpt").name == "step-000006" and not (folder / "lock").exists()


def test_every_rank_is_refused(tmp_path):
    (tmp_path / "store").mkdir()

    def body(rank):
        with pytest.raises(ConfigError) as error, locked(tmp_path / "run", rank):
            pass
        return str(error.value)

    with locked(tmp_path / "run", 0):
        sentences = run_ranks(2, body, tmp_path / "store")
        assert sentences[0] == sentences[1] and f"in use by process {os.getpid()} on" in sentences[0]
        assert (tmp_path / "run" / "lock").exists()
    assert not (tmp_path / "run").exists()


def test_a_lock_that_its_holder_removed_is_none(tmp_path, monkeypatch):
    """Opened just before the holder ended: the file that is locked is no longer the folder's."""
    flock, removed = fcntl.flock, []

    def late(file, how):
        if not removed:
            removed.append((tmp_path / "lock").unlink())
        flock(file, how)
    monkeypatch.setattr(fcntl, "flock", late)
    with lock(tmp_path) as held:
        assert os.path.samestat(os.fstat(held.fileno()), os.stat(tmp_path / "lock"))
        with pytest.raises(ConfigError, match="in use"):
            lock(tmp_path)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"the run folder \S+/file/run cannot be written: Not a directory: mend that"):
        lock(tmp_path / "file" / "run")


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    def none(file, how):
        raise OSError(37, "No locks available")
    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.warns(UserWarning, match="No locks available: this file system has no locks"):
        lock(tmp_path).close()


# ---- what a resume may change ----------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def five(data, tmp_path_factory):                                                           # noqa: F811
    """A run of five steps, made with relative paths; copy it before you continue it."""
    folder = tmp_path_factory.mktemp("five")
    there, = [os.path.relpath(data, folder)]
    before = os.getcwd()
    os.chdir(folder)
    try:
        return folder / run(Path(there), "runs", train__steps=5, train__save_every=0)
    finally:
        os.chdir(before)


def resume(five, tmp_path, **changed):
    """Continue a copy of `five` with options as section__field or section__part__field."""
    shutil.copytree(five, tmp_path / "run")
    config = load(tmp_path / "run" / "config.toml")
    for name, value in changed.items():
        config = changed_field(config, name.split("__"), value)
    moe_ext.train.train(config, "auto")
    return tmp_path / "run"


def changed_field(node, path, value):
    inner = changed_field(getattr(node, path[0]), path[1:], value) if len(path) > 1 else value
    return dataclasses.replace(node, **{path[0]: inner})


def test_changed_options_are_listed(five, tmp_path):
    folder = resume(five, tmp_path, train__steps=6, train__micro_batch=2, optim__lr=2e-2, model__dropout=0.0,
                    model__moe__jitter=0.5, model__moe__capacity_factor=1.5, model__moe__balance_weight=0.5)
    lines = [line for line in said(folder).splitlines() if line.startswith("changed")]
    assert sorted(line.removeprefix("changed since step 5: ") for line in lines) == [
        f"log.folder was '{five.parent}' and is '{tmp_path}'", "log.name was 'debug' and is 'run'",
        "model.dropout was 0.1 and is 0.0", "model.moe.balance_weight was 0.01 and is 0.5",
        "model.moe.capacity_factor was 0.0 and is 1.5", "model.moe.jitter was 0.01 and is 0.5",
        "optim.lr was 0.01 and is 0.02", "train.micro_batch was 4 and is 2", "train.steps was 5 and is 6"]
    assert checkpoint.read_state(folder / "ckpt" / "step-000006").config["optim"]["lr"] == 2e-2


def test_fewer_steps_than_done_are_refused(five, tmp_path):
    with pytest.raises(CheckpointError, match=r"has 5 steps behind it and train.steps is 4: give a larger"):
        resume(five, tmp_path / "fewer", train__steps=4)
    assert "train.steps is 4" not in said(tmp_path / "fewer" / "run") and len(records(tmp_path / "fewer" / "run")) == 3
    folder = resume(five, tmp_path / "done")                               # as a scheduler does that starts it again
    assert "all 5 steps are done: to go on, give a larger train.steps" in said(folder)
    another = changed_field(load(folder / "config.toml"), ["log", "name"], "another")
    with pytest.raises(CheckpointError, match=r"train.steps is 5: give a larger"):
        moe_ext.train.train(another, str(folder / "ckpt" / "step-000005"))
    assert not another.run_folder.exists()


def test_other_data_is_refused(five, tmp_path):
    with IndexedWriter(tmp_path / "other", 320) as writer:
        writer.add(list(range(300)))
    with pytest.raises(CheckpointError, match=r"is a place in the text \S+/train, not in \S+/other .*documents 50 "
                       r"there, 1 here; tokens \d+ there, 300 here.* --weights \S+step-000005"):
        resume(five, tmp_path, train__steps=6, data__train=str(tmp_path / "other"))


def test_older_run_folders_continue(five, tmp_path):
    """Neither config.toml nor state.json knows the newer fields: they have their defaults, which are no change."""
    shutil.copytree(five, tmp_path / "old")
    file = tmp_path / "old" / "ckpt" / "step-000005" / "state.json"
    state = json.loads(file.read_text())
    for section, name in (("train", "loss_scale"), ("log", "trace_exchange"), ("model", "tied"), ("optim", "decay")):
        del state["config"][section][name]
    del state["config"]["model"]["moe"]["balance_form"], state["config"]["mesh"], state["extra"]
    file.write_text(json.dumps(state))
    toml = (tmp_path / "old" / "config.toml").read_text()
    for line in ("loss_scale = 65536.0\n", "tied = false\n", 'balance_form = "switch"\n', "etp = 1\n"):
        assert line in toml
        toml = toml.replace(line, "")
    (tmp_path / "old" / "config.toml").write_text(toml)
    folder = resume(tmp_path / "old", tmp_path, train__steps=6)
    assert [line.split()[4] for line in said(folder).splitlines() if line.startswith("changed")] == [
        "train.steps", "log.folder", "log.name"]


# another value of each field, of the model BASE
BASE = ModelConfig(vocab_size=64, seq_len=16, layers=2, dim=16, heads=4, kv_heads=2, head_dim=8, hidden=32, dropout=0.1,
                   window=4, qk_norm=True, rope_scale=2.0, rope_context=8,
                   moe=MoEConfig(experts=4, hidden=16, dense_layers=1, shared_hidden=8, select_bias_rate=0.01))
OTHER = dict(
    vocab_size=65, seq_len=32, layers=3, dim=32, heads=2, kv_heads=4, head_dim=4, hidden=16, act="geglu",
    norm="layernorm", norm_eps=1e-2, bias=True, attention_bias="qkv", window=8, window_full_every=2, sinks=True,
    position="learned", rope_base=50.0, rope_fraction=0.5, rope_scale=4.0, rope_context=4, rope_stretch="linear",
    qk_norm=False,
    qk_norm_over="width", tied=True, dropout=0.0, init_std=0.1,
    moe=dict(experts=8, top_k=1, hidden=32, dense_layers=0, shared_hidden=0, shared_gate=True, groups=2, top_groups=2,
             score="sigmoid", norm_p=0.0, scale=2.0,
             select_bias_rate=0.1, router_bias=True, noise=True, jitter=0.1, balanced=True, capacity_factor=1.0,
             drop_by="probability", scope="micro_batch", balance_form="mse", balance_weight=0.5, z_weight=0.1),
    tune=dict(train="norm", freeze="norm", lora_rank=2, lora_alpha=8.0, lora_targets="experts"))


def test_the_table_is_what_the_model_does():
    """A field is TRAINING_ONLY if and only if with another value the same tensors fit and compute the same bits."""
    bases = {"balanced": changed_field(BASE, ["moe", "select_bias_rate"], 0.0),     # what does not go with a field
             "position": changed_field(BASE, ["rope_scale"], 1.0),
             "top_groups": changed_field(BASE, ["moe", "groups"], 2)}
    bases |= dict.fromkeys(("lora_alpha", "lora_targets"), changed_field(BASE, ["tune", "lora_rank"], 4))
    pairs, parts = {}, ("moe", "tune")
    for path, value in [([name], OTHER[name]) for name in OTHER if name not in parts] + [
            ([part, name], value) for part in parts for name, value in OTHER[part].items()]:
        base = bases.get(path[-1], BASE)
        pairs["model." + ".".join(path)] = base, changed_field(base, path, value)
    assert {name.split(".")[-1] for name in pairs} == {
        field.name for part in (ModelConfig, MoEConfig, TuneConfig) for field in dataclasses.fields(part)} - {*parts}
    tokens = torch.arange(16)[None]
    for name, (base, other) in pairs.items():
        was, now = GPT(base, seed=1).eval(), GPT(other, seed=2).eval()
        for factor in lora_parameters(was).values():        # which add nothing at first
            torch.nn.init.normal_(factor)
        shapes = [{key: t.shape for key, t in model.state_dict().items()} for model in (was, now)]
        same = shapes[0] == shapes[1]
        if same:
            now.load_state_dict(was.state_dict())
            same = torch.equal(was.logits(tokens), now.logits(tokens))
        differing = list(checkpoint.differences(*({"model": dataclasses.asdict(c)} for c in (base, other))))
        assert differing and same == (not any(checkpoint.changes_model(*leaf) for leaf in differing)), name
    assert TRAINING_ONLY <= pairs.keys() and checkpoint.changes_model("model.moe.select_bias_rate", 0.0, 0.1)


# ---- from any working directory --------------------------------------------------------------------------------------
def test_a_run_folder_is_used_from_anywhere_and_moved(data, five, tmp_path, monkeypatch, capsys):      # noqa: F811
    """five/ was made with relative paths in another folder."""
    moved = tmp_path / "moved"
    shutil.copytree(five, moved)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for name in ("train", "valid", "tokenizer"):
        assert os.path.isabs(getattr(load(five / "config.toml").data, name))
    assert load(five / "config.toml").run_folder == five and load(moved / "config.toml").run_folder == moved
    for folder in (five, Path("../moved")):
        main(monkeypatch, evaluate, folder)
        main(monkeypatch, generate, folder, "--max-tokens", "2")
    assert capsys.readouterr().out.count("step 5 | valid loss") == 2
    monkeypatch.setattr(sys, "argv", ["train", "../moved/config.toml", "--resume", "auto", "--train.steps", "6"])
    moe_ext.train.main()
    assert names(moved / "ckpt") == ["step-000005", "step-000006"] and names(five / "ckpt") == ["step-000005"]
    assert not list(Path.cwd().iterdir())
    monkeypatch.setattr(sys, "argv", ["train", "../moved/config.toml", "--log.name", "again", "--train.steps", "5",
                                      "--data.tokenizer", "../moved/tokenizer.json"])
    moe_ext.train.main()                                                    # the same run again, in a folder beside it
    assert_same_checkpoint(tmp_path / "again", five, 5)


def test_a_recipe_called_config_is_a_recipe(tmp_path):
    shutil.copyfile(RECIPE, tmp_path / "config.toml")
    assert load(tmp_path / "config.toml").run_folder == Path("runs/config")


# ---- what may go wrong around a run ----------------------------------------------------------------------------------
def test_a_start_from_elsewhere_is_saved_at_once(data, five, tmp_path, monkeypatch):        # noqa: F811
    """Killed before its first own checkpoint, the run goes on from there all the same."""
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(moe_ext.train, "learning_rate", stop)
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path, str(five / "ckpt" / "step-000005"), train__steps=8)
    assert names(tmp_path / "debug" / "ckpt") == ["step-000005"]


def test_a_linked_checkpoint_is_the_runs_own(data, tmp_path):                               # noqa: F811
    folder = run(data, tmp_path, train__steps=5, train__save_every=5, **NOTHING)
    newest = checkpoint.latest(folder / "ckpt")
    newest.rename(tmp_path / newest.name)
    newest.symlink_to(tmp_path / newest.name)
    run(data, tmp_path, "auto", train__steps=6, **NOTHING)
    assert not (folder / "abandoned").exists() and [r["step"] for r in records(folder)][-1] == 6


def test_setting_aside_across_file_systems(tmp_path, monkeypatch):
    """ckpt is a link to another disk: renaming is not possible there."""
    rename = Path.rename

    def within(path, target):
        if "abandoned" in str(target) and "abandoned" not in str(path):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return rename(path, target)

    (tmp_path / "ckpt" / "step-000007").mkdir(parents=True)
    (tmp_path / "ckpt" / "step-000007" / "state.json").write_text("{}")
    monkeypatch.setattr(Path, "rename", within)
    assert "step-000007" in set_aside(tmp_path, 5)[0]
    aside = tmp_path / "abandoned" / "after-000005-1" / "ckpt"
    assert names(aside) == ["step-000007"] and names(aside / "step-000007") == ["state.json"]
    assert names(tmp_path / "ckpt") == []


def test_a_lock_clears_what_a_killed_save_left(tmp_path):
    (tmp_path / "ckpt" / "step-000005.tmp-abc").mkdir(parents=True)
    with locked(tmp_path, 0):
        assert names(tmp_path / "ckpt") == []


@pytest.mark.parametrize("change", [dict(data__valid="other/valid"), dict(train__eval_batches=1),
                                    dict(data__mask_end=True)], ids=str)
def test_another_evaluation_has_a_best_of_its_own(data, tmp_path, change):                  # noqa: F811
    def start(steps, resume="", **changed):
        config = parse([*flags(data, tmp_path, train__steps=steps, train__eval_every=2, data__tokenizer=""),
                        "--train.keep-best"])
        for name, value in changed.items():
            config = changed_field(config, name.split("__"), value)
        return moe_ext.train.train(config, resume)

    newest = checkpoint.latest(start(4) / "ckpt")
    state = json.loads((newest / "state.json").read_text())
    (newest / "state.json").write_text(json.dumps(state | {"best_loss": -1.0}))         # which no evaluation beats
    shutil.copytree(data, tmp_path / "other")
    change = {name: str(tmp_path / value) if name == "data__valid" else value for name, value in change.items()}
    folder = start(6, "auto", **change)
    assert checkpoint.read_state(checkpoint.latest(folder / "ckpt")).best_step == 6


@pytest.mark.parametrize("options, words", [
    (dict(resume="nowhere"), "no checkpoint nowhere"),
    (dict(resume="auto", train__steps=4), "5 steps behind it and train.steps is 4"),
    (dict(resume="auto", model__dim=64), "another model:\n  model.dim"),
    (dict(weights="five", model__dim=64, log__name="new"), "embed_tokens.weight: got .*, wanted"),
    (dict(resume="auto"), None),
    (dict(weights="five", log__name="new"), None),
], ids=str)  # fmt: skip
def test_a_dry_run_refuses_what_the_run_would(data, five, tmp_path, monkeypatch, options, words):      # noqa: F811
    shutil.copytree(five, tmp_path / "debug")
    options = {name: five if value == "five" else value for name, value in options.items()}
    arguments = [*flags(data, tmp_path, **{"train__steps": 8} | options), "--dry-run"]
    if words is None:
        return main(monkeypatch, moe_ext.train, *arguments)
    with pytest.raises(SystemExit, match=words):
        main(monkeypatch, moe_ext.train, *arguments)
