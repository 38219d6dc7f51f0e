"""The run folder: one run at a time, one branch at a time.

    RUN/lock                    while a run is on: held by its rank 0 (flock), which the kernel lets go when it dies
    RUN/tokenizer.sha256        which tokenizer the run's tokens are of, if that is known, for evaluate and generate
    RUN/ckpt, metrics.jsonl, tb what led to the run's newest checkpoint and what followed, nothing else
    RUN/abandoned/after-000500-1/   ckpt/, metrics.jsonl, tb/, config.toml, plot.png: set aside by a run that started
                                from step 500 (0: anew) when there was more; kept until you delete it

So the newest checkpoint is always the one that was written last. A start sets aside all that lies beyond its step
(`begin`), also the lines of steps that a killed run did and must do again; a start from a checkpoint of another folder
sets aside all. The newest checkpoint goes last: a kill leaves the state before, or the one after with lines that the
next start sets aside. run.log stays whole: it tells what happened, in order.

Only training needs the lock; evaluate, generate, plot and --dry-run read. On NFS, flock holds between hosts from Linux
2.6.12 on, but not when mounted with nolock or local_lock; a host that vanishes keeps it until the server gives it up.
"""
from __future__ import annotations

import dataclasses
import errno
import operator
import os
import shlex
import shutil
import socket
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path

from moe_ext import checkpoint
from moe_ext.checkpoint import CheckpointError, State
from moe_ext.config import Config, ConfigError, OptimConfig, TuneConfig, build, dumps, named_sets, require
from moe_ext.data import Blend, IndexedDataset, Loader, summary, target, totals
from moe_ext.data.blend import read_blend, write_blend
from moe_ext.data.identity import data_meta, tokenizer_hash
from moe_ext.layers.lora import is_factor
from moe_ext.log import split_events, split_metrics
from moe_ext.model import GPT
from moe_ext.optim.groups import choices as optimizer_choices


# ---- one run at a time -----------------------------------------------------------------------------------------------
@contextmanager
def locked(folder: Path, rank: int):
    """Inside, no other process trains in `folder`, which is made if absent, and removed if nothing was put into it.
    Collective: ConfigError on every rank if another run is there."""
    file = checkpoint.together(lambda: lock(folder) if rank == 0 else None)
    try:
        yield
    finally:
        if file:
            (folder / "lock").unlink(missing_ok=True)
            with suppress(OSError):     # not empty
                folder.rmdir()
            file.close()


def lock(folder: Path):
    """The open file that is the lock; closing it, or the end of the process, lets it go."""
    path = folder / "lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = target.lock(path, "a", lockless=lambda error: warnings.warn(
            f"{folder}: {error.strerror}: this file system has no locks, so nothing stops a second run in the same "
            "folder", stacklevel=4))
        file.truncate(0)
        checkpoint.clear(folder / "ckpt")       # the leftovers of a save that was killed take room
        print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
    except BlockingIOError:
        holder = "another process"
        with suppress(FileNotFoundError):       # it may have ended since
            holder = path.read_text().strip() or holder
        raise ConfigError(f"{folder} is in use by {holder}: wait until that run has ended, stop it, or choose another "
                          "--log.name") from None
    except OSError as error:
        raise ConfigError(f"the run folder {folder} cannot be written: {error.strerror}: mend that or choose another "
                          "--log.folder") from None
    return file


# ---- what a run may continue -----------------------------------------------------------------------------------------
def check(path: Path, config: Config, loader: Loader) -> None:
    """CheckpointError, before anything is loaded, if no run of `config` can go on from the checkpoint `path`."""
    state, steps = checkpoint.read_state(path), config.train.steps
    if steps < state.step or (steps == state.step and not own(path, config)):
        raise CheckpointError(f"{path} has {state.step} steps behind it and train.steps is {steps}: give a larger "
                              "train.steps, or --resume an earlier checkpoint")
    if differing := loader.differing(state.loader):
        raise CheckpointError(f"{path} is a place in the text {state.config['data']['train']}, not in "
                              f"{config.data.train} as data.train, model.seq_len and train.seed now have it "
                              f"({'; '.join(differing)}): continue with those that it had, or start a new run with "
                              f"these weights: --weights {path}")
    check_words(path, config)
    check_moving(path, state, config)
    check_optimizers(path, state, config)


def check_moving(path: Path, state: State, config: Config) -> None:
    """CheckpointError if other parameters moved in the run of a checkpoint than move in that of `config`."""
    was, now = build(TuneConfig, state.config["model"].get("tune", {})), config.model.tune
    if was == now or was != dataclasses.replace(now, train=was.train, freeze=was.freeze):
        return      # with other adapters it is another model
    for name, p in GPT(config.model, device="meta").named_parameters():
        if was.moves(name, is_factor(name)) != p.requires_grad:
            raise CheckpointError(f"{path}: {name} {'rested' if p.requires_grad else 'moved'} in its run, but not in "
                                  f"this one: continue with --model.tune.train {shlex.quote(was.train)} "
                                  f"--model.tune.freeze {shlex.quote(was.freeze)}, or start a new run with these "
                                  f"weights: --weights {path}")


# what decides which state Shampoo has of a parameter: field of optim -> value(optim, shape)
DECISIVE = {
    "shampoo.max_preconditioner_dim": lambda o, shape: [min(n, o.shampoo.max_preconditioner_dim) for n in shape[-2:]],
    "shampoo.grafting": lambda o, shape: o.shampoo.grafting == "adam",
    "beta1": lambda o, shape: o.beta1 > 0,
}


def check_optimizers(path: Path, state: State, config: Config) -> None:
    """CheckpointError if a parameter had another optimizer in the run of a checkpoint, or other state of the same one,
    which is of no use to that of `config`."""
    saved, known = state.config.get("optim", {}), {f.name for f in dataclasses.fields(OptimConfig)}
    before = build(OptimConfig, {name: value for name, value in saved.items() if name in known})
    if before == config.optim:
        return
    model = GPT(config.model, device="meta")
    there, here = (optimizer_choices(model, optim) for optim in (before, config.optim))
    new_run = f"or start a new run with these weights: --weights {path}"
    for name in there:
        was, now = there[name].optimizer, here[name].optimizer
        if was != now:
            rule = f" --optim.rule \"{before.rule}\"" if before.rule or config.optim.rule else ""
            raise CheckpointError(f"{path}: {was} moved {name}, and this run's {now} can do nothing with its state: "
                                  f"continue with --optim.name {before.name}{rule}, {new_run}")
        shape = model.get_parameter(name).shape
        for field, value in DECISIVE.items() if now == "shampoo" else ():
            if value(before, shape) != value(config.optim, shape):
                had, has = (operator.attrgetter(field)(optim) for optim in (before, config.optim))
                raise CheckpointError(f"{path}: optim.{field} was {had} and is {has}, with which Shampoo has other "
                                      f"state of {name}: continue with --optim.{field.replace('_', '-')} {had}, "
                                      f"{new_run}")


def check_words(path: Path, config: Config) -> None:
    """CheckpointError if the checkpoint `path` is of a run with another tokenizer than that of `config`."""
    there, here = tokenizer_of(path.absolute().parents[1]), check_tokenizer(config)
    if there and here and there != here:
        raise CheckpointError(f"{path} is of a run with the tokenizer {there[:12]}, but data.tokenizer and the data "
                              f"are now of {here[:12]}: give the tokenizer that it had")


def own(path: Path, config: Config) -> bool:
    """Whether a checkpoint is one of the run folder's branch."""
    return path.absolute().parent.resolve() == (config.run_folder / "ckpt").resolve()


def same_evaluation(path: Path, state: State, config: Config) -> bool:
    """Whether the best loss so far, of a checkpoint, is one that this run's evaluations can be compared with; with
    train.keep_best also whether its checkpoint was kept."""
    decisive = {"data.valid", "data.split", "data.reset_attention", "data.reset_positions", "data.mask_end",
                "train.eval_batches", "model.seq_len"}
    same = decisive.isdisjoint(name for name, *_ in changes(state, config))
    return same and own(path, config) and (state.best_step is not None or not config.train.keep_best)


def changes(state: State, config: Config) -> list[tuple]:
    """(name, value, new value) of each field that is not as the checkpoint's run had it; a path is compared as an
    absolute one."""
    before = state.config | {name: absolute_paths(state.config[name]) for name in ("data", "log")}
    return list(checkpoint.differences(before, dataclasses.asdict(absolute(config))))


def absolute(config: Config) -> Config:
    """The config with paths that hold from any working directory, as the run folder and its checkpoints keep it."""
    return dataclasses.replace(config, **{name: dataclasses.replace(section, **absolute_paths(vars(section)))
                                          for name, section in (("data", config.data), ("log", config.log))})


def absolute_paths(section: dict) -> dict:
    def blend(text):
        return write_blend([(weight, os.path.abspath(prefix)) for weight, prefix in read_blend(text)])

    paths = {name: blend(section[name]) for name in ("train", "valid") if section.get(name)}
    if section.get("eval_sets"):
        paths["eval_sets"] = " ".join(f"{name}={shlex.quote(blend(text))}"
                                      for name, text in named_sets(section["eval_sets"]).items())
    return section | paths | {name: os.path.abspath(section[name]) for name in ("choices", "tokenizer", "folder",
                                                                               "cache") if section.get(name)}


def loader_options(config: Config) -> dict:
    """The fields of data.* that Loader takes."""
    return {name: getattr(config.data, name) for name in ("reset_attention", "reset_positions", "mask_end", "cache",
                                                          "prefetch")}


def data_lines(config: Config, data: IndexedDataset | Blend) -> list[str]:
    """What the training data of a run are, in log.style, and what is not known of any of its tokens."""
    rows = config.tokens_in_all // config.model.seq_len
    if config.log.style == "megatron":
        lines = totals(data, config.model.seq_len, rows)
    else:
        lines = [f"{'data':10}  {line}" for line in summary(data, config.model.seq_len, rows)]
    if unknown := [name for name, value in tokenizers(config).items() if not value]:
        lines.append(f"not checked, for no meta.json tells it: which tokenizer {', '.join(unknown)} is of")
    return lines


# ---- one tokenizer ---------------------------------------------------------------------------------------------------
def tokenizers(config: Config) -> dict[str, str | None]:
    """Which tokenizer all that a run reads is of: data.tokenizer and each prefix of tokens -> its hash; None for tokens
    without meta.json, those of other programs."""
    data = config.data
    texts = filter(None, (data.train, data.valid, *named_sets(data.eval_sets).values()))
    prefixes = [prefix for text in texts for _, prefix in read_blend(text)]
    own = {data.tokenizer: tokenizer_hash(data.tokenizer)} if data.tokenizer else {}
    return own | {prefix: hash_of(prefix) for prefix in prefixes}


def hash_of(prefix: str | Path) -> str | None:
    return (data_meta(prefix) or {}).get("tokenizer_sha256")


def check_tokenizer(config: Config) -> str | None:
    """The hash of the one tokenizer that all that a run reads is of; None if nothing is known. ConfigError if there are
    two."""
    known = {name: value for name, value in tokenizers(config).items() if value}
    name, value = next(iter(known.items()), (None, None))
    for other, its in known.items():
        require(its == value, f"{other} is of another tokenizer ({its[:12]}) than {name} ({value[:12]}), so the same "
                "id is another text in each: prepare both with one (python -m moe_ext.data prepare --tokenizer FILE)")
    return value


def tokenizer_of(folder: Path) -> str | None:
    """The hash of a run's tokenizer; None if it is not known."""
    kept = folder / "tokenizer.sha256"
    if kept.is_file():
        return kept.read_text().split()[0]
    return tokenizer_hash(folder / "tokenizer.json") if (folder / "tokenizer.json").is_file() else None


def same_tokenizer(folder: str | Path, path: str | Path) -> None:
    """ConfigError if `path`, a prefix of tokens or a tokenizer.json, is of another tokenizer than the run in `folder`.
    A warning if that is not known of the tokens."""
    there, here = tokenizer_of(Path(folder)), tokenizer_hash(path) if str(path).endswith(".json") else hash_of(path)
    if there and not here:
        warnings.warn(f"not checked, for no meta.json tells it: whether {path} is of the tokenizer of {folder}",
                      stacklevel=2)
    require(not (there and here) or there == here, f"{path} is of another tokenizer ({str(here)[:12]}) than the run "
            f"{folder} ({str(there)[:12]}), which would read other words in it: give tokens prepared with --tokenizer "
            f"{folder}/tokenizer.json")


# ---- one branch at a time --------------------------------------------------------------------------------------------
def begin(config: Config, path: Path | None, state: State | None) -> list[str]:
    """Make the run folder that of a run which starts from the checkpoint `path`, or anew (None) -> what to tell of it,
    line by line."""
    folder = config.run_folder
    folder.mkdir(parents=True, exist_ok=True)
    lines = set_aside(folder, state.step if state and own(path, config) else 0)
    if state:
        lines += [f"changed since step {state.step}: {name} was {was!r} and is {now!r}"
                  for name, was, now in changes(state, config)]
        if state.step == config.train.steps:
            lines.append(f"all {state.step} steps are done: to go on, give a larger train.steps")
    write(folder, "config.toml", dumps(absolute(config)).encode())
    if known := check_tokenizer(config):
        write(folder, "tokenizer.sha256", f"{known}  tokenizer.json\n".encode())
    elif state is None:
        (folder / "tokenizer.sha256").unlink(missing_ok=True)
    if config.data.tokenizer:
        write(folder, "tokenizer.json", Path(config.data.tokenizer).read_bytes())
    return lines


def carry(path: Path, folder: Path) -> None:
    """Copy to a run folder what an imported model brought along (moe_ext.hf) to the one of the checkpoint `path`, in
    place of what another did."""
    source = path.absolute().parents[1] / "hf"
    if source.is_dir() and source.resolve() != (folder / "hf").resolve():
        shutil.rmtree(folder / "hf", ignore_errors=True)
        shutil.copytree(source, folder / "hf", ignore=shutil.ignore_patterns("*.tmp-*"))


def set_aside(folder: Path, step: int) -> list[str]:
    """Move to a new folder RUN/abandoned/after-STEP-N what lies beyond `step` -> a line that says so, if anything does.

    The checkpoints go by rising step: until the newest has gone it is as if nothing had happened, and from then on what
    is left to do are lines beyond `step`, which any later start finds."""
    checkpoints = [path for path in checkpoint.whole(folder / "ckpt") if checkpoint.step_of(path) > step]
    cut = {}
    for name, split in [*((f"tb/{path.name}", split_events) for path in sorted((folder / "tb").glob("*tfevents*"))),
                        ("metrics.jsonl", split_metrics)]:
        kept, beyond = split((folder / name).read_bytes(), step) if (folder / name).is_file() else (b"", b"")
        if beyond:
            cut[name] = kept, beyond
    if not checkpoints and not cut:
        return []

    number = 1
    while (aside := folder / "abandoned" / f"after-{step:06d}-{number}").exists():
        number += 1
    aside.mkdir(parents=True)
    if (folder / "config.toml").is_file():
        shutil.copyfile(folder / "config.toml", aside / "config.toml")
    for path in checkpoints:
        (aside / "ckpt").mkdir(exist_ok=True)
        move(path, aside / "ckpt" / path.name)
        checkpoint.sync(aside / "ckpt")
        checkpoint.sync(folder / "ckpt")
    if (folder / "plot.png").is_file():
        (folder / "plot.png").rename(aside / "plot.png")
    for name, (kept, beyond) in cut.items():
        (aside / name).parent.mkdir(exist_ok=True)
        write(folder, (aside / name).relative_to(folder), beyond)
        write(folder, name, kept)
    return [f"set aside in {aside} what lay beyond step {step}: {', '.join([*(p.name for p in checkpoints), *cut])}"]


def move(path: Path, to: Path) -> None:
    """A checkpoint to another place, which may lie on another file system: whole here or there."""
    try:
        path.rename(to)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        copy = shutil.copytree(path, to.with_name(to.name + ".tmp-copy"), dirs_exist_ok=True)
        for file in (*copy.iterdir(), copy):
            checkpoint.sync(file)
        copy.rename(to)
        checkpoint.discard(path)


def write(folder: Path, name: str | Path, data: bytes) -> None:
    """A file of the run folder, whole or as it was. A linked file stays one."""
    file = (folder / name).resolve()
    unfinished = file.with_name("unfinished")
    unfinished.write_bytes(data)
    checkpoint.sync(unfinished)
    unfinished.rename(file)
    checkpoint.sync(file.parent)
