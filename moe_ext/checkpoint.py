"""Checkpoints that are whole or absent, load completely or not at all, and continue bit for bit, on any mesh.

    RUN/ckpt/step-000500/
        shard-*.safetensors     tensors, by torch.distributed.checkpoint and snapshot.py, one file of each rank
            model.NAME          parameters and persistent buffers
            optim.NAME.STATE    the optimizer's state of parameter NAME (exp_avg, exp_avg_sq, step, ...), or what the
                                owner of a matrix of it has (factor0.3,0,0: of the one that begins there)
            rng.cpu, rng.cuda   torch's generators, those of rank 0
        state.json              format, step, best_loss, config, the loader's position, which states each parameter has

A save writes a folder step-000500.tmp-*, syncs every file and the folder to disk, and renames it: a kill at any moment
leaves a folder that does not count, beside the previous checkpoint. `save` holds the run up for that long; a Saver
takes a copy and has it written by a thread. Tied parameters are stored once, under their first name. Learning rate,
weight decay and betas are not state: they come from the config of the run that continues.

With torch.distributed, all ranks of the default group call save and load together, on a folder that all of them see; an
error of one rank is raised on every rank. A DTensor is stored as boxes: a rank's file holds its box under the tensor's
name, and the JSON under DCP_SHARDING_INFO in the file's metadata gives the first index of each box, {NAME:
{"saved_offsets": [..]}}. A box that several ranks have is written by one of them, so the boxes tile the tensor. The
stages of a pipeline write and read each its own tensors, and so do the owners of matrices: state.json lists what all
have. What one process saves is one file of whole tensors, or one for each block (`source`), for any reader of
safetensors; what a mesh saves becomes that when one process loads and saves it.

Adapters (model.tune) are parameters as others, and what rests is stored without state: a run continues with the same
parameters moving. A run that starts with a checkpoint's weights (`start`) may have adapters that those lack.

An optimizer that is Keeping (optim.state) makes room for its own state, in its own way, so a run may continue with
another optim.state: tensors are converted on the way, and only with the same one it continues bit for bit.
"""
import copy
import dataclasses
import functools
import json
import math
import os
import pickle
import re
import shutil
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from moe_ext.config import Config
from moe_ext.layers.fused import norm_power
from moe_ext.layers.lora import is_factor
from moe_ext.optim.together import parts_of
from moe_ext.parallel.stages import Stage
from moe_ext.snapshot import CheckpointError, File, Image, Piece

FORMAT = 1
WHOLE = re.compile(r"step-(\d{6,})(\.old)?")       # .old: set aside while a save of the same step takes its place

# The fields of model.* that change neither a tensor nor what the model computes outside training (nor does another
# select_bias_rate above 0): a checkpoint continues with other values of these. Any other field makes another model, one
# that is not decided yet too. A new field's default is what versions without it did.
TRAINING_ONLY = {"model." + name for name in (
    "seq_len", "dropout", "init_std", "tune.train", "tune.freeze", "moe.jitter", "moe.balanced", "moe.capacity_factor",
    "moe.drop_by", "moe.scope", "moe.balance_form", "moe.balance_weight", "moe.z_weight")}


class State(NamedTuple):
    """What a checkpoint knows besides tensors."""
    step: int                   # optimizer steps done
    best_loss: float | None     # lowest held-out loss so far, nats per token
    config: dict                # dataclasses.asdict of the run's Config
    loader: dict                # Loader.state_dict()
    optimizer: dict             # of each parameter that it moves, the state and the class of the optimizer:
                                # {"class": "AdamW + Muon", "states": {NAME: {STATE: shape}}, "movers": {NAME: "Muon"}}
    extra: dict                 # what else the run needs, as save was given it: JSON values
    best_step: int | None = None    # checkpoint of the lowest held-out loss, if such ones are kept


def save(folder: str | Path, **content) -> Path:
    """Write folder/step-NNNNNN and return it; then keep only the newest keep_last checkpoints (0: all) and of each of
    them the best one that it knows. Collective. Arguments and errors: as of draft."""
    checkpoint = draft(folder, **content)
    checkpoint.complete()
    return checkpoint.final


class Saver:
    """Saves while training goes on, one checkpoint at a time:

        with Saver(device, told=log.saved) as saver:    # leaving, for whatever reason, waits for what is under way
            for step in range(1, steps + 1):
                ..                                      # failed: saver.failed(), summed over all ranks
                if failed:
                    saver.wait()                        # raises, on every rank the same
                if step % 500 == 0:
                    saver.save(folder, model=model, ..)

    `save` copies what this rank writes into the host's memory, which it keeps for the next time, and returns; a thread
    writes the copy. The threads of all ranks have a process group of their own, in which they learn that all have
    written, and then one of them lets the checkpoint count; or they all get the error of the one that has failed. The
    main threads take no part in that, so one that has raised, or waits for such a one, does not hold it up.

    device: of the parameters. timeout: how long a thread waits for those of the other ranks, None: torch's default.
    told: the main thread calls told(path, step, waited, written) when a checkpoint is whole: the seconds that training
    waited for it, and those from the end of that until it counted. Making one, `reserve`, `save` and `wait` are
    collective.
    """

    def __init__(self, device: torch.device, timeout: timedelta | None = None,
                 told: Callable[[Path, int, float, float], None] = lambda *what: None):
        self.group = dist.new_group(backend="gloo", timeout=timeout) if ranks() > 1 else None
        self.image, self.told = Image(device), told
        self.draft = self.thread = self.error = None        # thread: there is one until `settle` has seen its end
        self.waited = self.took = 0.0

    def reserve(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Have the memory now that `save` would need now: what does not fit ends a run at its beginning. Errors:
        CheckpointError."""
        file = layout(Path(), tensors_of(model, optimizer)[0])[0]
        together(lambda: self.image.reserve(file.size))

    def save(self, folder: str | Path, *, behind: bool = True, **content) -> None:
        """As checkpoint.save, which it is with behind=False: it returns when all is done, and takes no copy."""
        self.wait()
        began = time.perf_counter()
        self.draft = draft(folder, **content)
        if behind:
            together(lambda: self.image.take(self.draft.files[0]))
            self.written = threading.Event()
            thread = threading.Thread(target=self.run, name="checkpoint", daemon=True)
            thread.start()          # or a RuntimeError: then there is none to wait for
            self.thread = thread
        else:
            self.draft.complete()
        self.waited += time.perf_counter() - began
        if not behind:
            self.tell()

    def run(self) -> None:
        began = time.perf_counter()
        try:
            self.draft.complete(self.image, self.written, self.group)
        except Exception as error:
            self.error = error
        self.took = time.perf_counter() - began

    def failed(self) -> bool:
        """Whether `wait` would raise; if not now, then soon on every rank, when it is so on one. To be asked once a
        step, for it also tells of a checkpoint that has become whole."""
        if self.thread and not self.thread.is_alive():
            self.settle()
        return self.error is not None

    def wait(self) -> None:
        """Until the checkpoint under way is whole. Errors: as of checkpoint.save."""
        began = time.perf_counter()
        self.settle()
        self.waited += time.perf_counter() - began      # which the next one has cost
        if self.error:
            error, self.error, self.waited = self.error, None, 0.0
            raise error

    def settle(self) -> None:
        """Until the thread has ended, well or not: of this rank alone, and whatever becomes of the others."""
        if self.thread:
            self.written.wait()
            arrived(self.thread)
            self.thread = None
            if not self.error:
                self.tell()

    def tell(self) -> None:
        self.told(self.draft.final, step_of(self.draft.final), self.waited, self.took)
        self.waited = self.took = 0.0

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if error is None:
            self.wait()
        else:
            self.settle()
            if self.error:
                error.add_note(str(self.error))


def arrived(thread: threading.Thread) -> None:
    """This rank has written, and waits for the others (so parallel.failure takes it)."""
    thread.join()


class Draft(NamedTuple):
    """A checkpoint that is not on disk yet."""
    work: Path          # the folder to write into
    final: Path         # what it will become
    files: list[File]   # those of this rank, whose values are tensors that are in use
    state: State        # on rank 0 that of all
    keep_last: int

    def complete(self, image: Image | None = None, written: threading.Event | None = None,
                 group: dist.ProcessGroup | None = None) -> None:
        """Write the files of this rank, of the tensors or of an image of one file, and when all ranks have done so let
        it count. written: set when this rank has, or could not. Collective, as together."""
        def write():
            try:
                for file in self.files:
                    file.write(image and image.data())
            except Exception as error:
                raise CheckpointError(f"{self.final} was not saved, earlier checkpoints are as they were: rank "
                                      f"{rank()}: {type(error).__name__}: {error}") from None
            finally:
                if written:
                    written.set()
        together(write, group)
        on_rank_0(lambda: finish(self.work, self.final, self.state, self.keep_last), group)


def draft(folder: str | Path, *, model: torch.nn.Module, optimizer: torch.optim.Optimizer, loader, step: int,
          config: dict, best_loss: float | None = None, keep_last: int = 0, extra: dict | None = None,
          best_step: int | None = None, source: Callable[[str], torch.Tensor] | None = None) -> Draft:
    """What is to be written of model, optimizer and loader as they are now. Collective.

    loader: anything with state_dict() -> JSON values. config: dataclasses.asdict(Config). extra: more JSON values.
    best_step: the step of the best checkpoint, this one or an earlier one, if it is to be kept.
    source: of a model on the meta device, what gives the value of model.NAME when it is to be written: one process then
    writes a file for each block and holds no more than that.
    folder and all that is not a tensor are those of rank 0. Errors: CheckpointError, OSError, on every rank the same.
    """
    work, final = on_rank_0(lambda: begin(Path(folder), f"step-{step:06d}"))
    tensors, moved = tensors_of(model, optimizer)

    def content():
        if not work.is_dir():
            raise CheckpointError(f"{work}: made by rank 0, but rank {rank()} does not see it: give the full path of "
                                  "a folder on storage that all ranks share")
        return copy.deepcopy(State(step, best_loss, config, loader.state_dict(), moved, extra or {}, best_step))

    state = together(content)
    state = state._replace(optimizer=merged(state.optimizer))
    return Draft(work, final, layout(work, tensors, source), state, keep_last)


def tensors_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict]:
    """What this rank has of a checkpoint's tensors, and of State.optimizer. Collective."""
    kind = class_of(optimizer)

    def content():
        if torch.cuda.is_available():
            torch.cuda.synchronize()        # what is on its way to state on the host has arrived
        states = {name: optimizer.state.get(p, {}) for name, p in moved_parameters(model, optimizer).items()}
        tensors = model_tensors(model) | flat(states) | (generator_tensors() if rank() == 0 else {})
        shapes = {name: {key: list(tensor.shape) for key, tensor in of.items()} for name, of in states.items()}
        return tensors, {"class": kind, "states": shapes, "movers": movers(model, optimizer)}

    return together(content)


def layout(folder: Path, tensors: dict[str, torch.Tensor], source=None) -> list[File]:
    """The files of this rank in a checkpoint: one, or with a source one for each block. Collective."""
    taken = Taken()
    with dcp_errors(f"{folder}: the ranks' tensors do not make a checkpoint"):
        dcp.save(tensors, storage_writer=taken, planner=DefaultSavePlanner(flatten_state_dict=False),
                 no_dist=ranks() == 1)
    of = {} if source else {1: taken.pieces}
    for piece in taken.pieces if source else ():
        of.setdefault(file_of(piece.name), []).append(piece)
    name = f"shard-{rank() + 1:05d}-model-{{:05d}}-of-{max(of):05d}.safetensors"
    return together(lambda: [File.of(folder / name.format(number), pieces, source) for number, pieces in of.items()])


class Taken(dcp.StorageWriter):
    """In the place of torch's writer: keeps as `pieces` what a rank is to write, after the ranks have agreed who writes
    a box that several have."""

    def write_data(self, plan, planner):
        self.pieces = [Piece(item.index.fqn, tuple(item.tensor_data.chunk.offsets), planner.resolve_data(item).detach())
                       for item in plan.items]
        done = torch.futures.Future()
        done.set_result([])
        return done

    def reset(self, checkpoint_id=None): pass
    def set_up_storage_writer(self, is_coordinator, *args, **kwargs): pass
    def prepare_local_plan(self, plan): return plan
    def prepare_global_plan(self, plans): return plans
    def finish(self, metadata, results): pass
    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id): return True


def file_of(name: str) -> int:
    """The number of a tensor's file, from 1: of its block, or of what is in none."""
    block = re.match(r"model\.layers\.(\d+)\.", name)
    return 1 if block is None else 2 + int(block[1])


def begin(folder: Path, name: str) -> tuple[Path, Path]:
    """The folder to write into, and the one that it will become."""
    folder.mkdir(parents=True, exist_ok=True)
    clear(folder)
    work = Path(tempfile.mkdtemp(prefix=name + ".tmp-", dir=folder))
    work.chmod(0o755)
    return work, folder / name


def finish(work: Path, final: Path, state: State, keep_last: int) -> None:
    """Every rank has written and synced its file: complete the folder, let it count, and discard old ones."""
    (work / "state.json").write_text(json.dumps({"format": FORMAT, **state._asdict()}, indent=1))
    sync(work / "state.json")
    sync(work)
    if final.exists():                                  # the same step again: whole under one name or the other
        final.rename(final.with_name(final.name + ".old"))
    work.rename(final)
    sync(final.parent)
    clear(final.parent)
    others = [path for path in whole(final.parent) if path != final]
    old = others[:max(0, len(others) + 1 - keep_last)] if keep_last else []
    bests = set()
    if state.best_step is not None:     # also those of earlier checkpoints, to which a run may go back
        bests = {state.best_step} | {read_state(path).best_step for path in others[len(old):]}
    for path in old:
        if step_of(path) not in bests:
            discard(path)


def clear(folder: Path) -> None:
    """Delete what killed saves left behind: unfinished folders, and old ones whose successor is in place."""
    for path in folder.glob("step-*.tmp-*"):
        shutil.rmtree(path)
    for path in folder.glob("step-*.old"):
        if path.with_suffix("").exists():
            discard(path)


def whole(folder: str | Path) -> list[Path]:
    """The complete checkpoints of a folder by rising step."""
    found = [(int(match[1]), match[2] is None, path) for path in Path(folder).glob("step-*")
             if (match := WHOLE.fullmatch(path.name))]
    return [path for _, _, path in sorted(found)]


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(WHOLE.fullmatch(path.name)[1])


def latest(folder: str | Path) -> Path | None:
    """The newest complete checkpoint of a folder, None if there is none. Ranks that must agree: on_rank_0."""
    return next(reversed(whole(folder)), None)


def best(folder: str | Path) -> Path | None:
    """The checkpoint of the lowest held-out loss that the newest one knows; None if none is kept."""
    newest = latest(folder)
    step = read_state(newest).best_step if newest else None
    return next((path for path in reversed(whole(folder)) if step_of(path) == step), None)


def read_state(path: str | Path) -> State:
    """state.json of a checkpoint. Errors: FileNotFoundError, CheckpointError."""
    file = Path(path) / "state.json"
    if not file.is_file():
        raise FileNotFoundError(f"no checkpoint {path}: {file.name} is not there; give a folder ckpt/step-NNNNNN")
    try:
        state = json.loads(file.read_text())
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}; a damaged file: use an earlier checkpoint") from None
    if state.pop("format", None) != FORMAT:
        raise CheckpointError(f"{file}: not of format {FORMAT}: load it with the version of moe_ext that wrote it")
    return State(**{"extra": {}, **state})              # the first checkpoints had none


def load(path: str | Path, *, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None, loader=None,
         config: dict | None = None, start: bool = False) -> State:
    """Read a checkpoint into model, and with an optimizer and a loader continue its run: their state and torch's RNG.

    Without an optimizer only the model is read (evaluation, sampling). config: the wanted dataclasses.asdict(Config);
    if its "model" is another one, that is an error naming the fields (TRAINING_ONLY). Every tensor of the model and the
    optimizer must be in the checkpoint with its shape and dtype, and every such tensor of the checkpoint in them;
    nothing is touched before that is certain on every rank. Collective; rank 0's path holds. The mesh is free: each
    rank reads the boxes that it needs. start: of a run that starts with these weights: adapters that the checkpoint
    lacks stay as they are, and floats of fewer bits than the model's are widened. Errors: FileNotFoundError,
    CheckpointError, OSError, on every rank the same.
    """
    path, state = on_rank_0(lambda: (Path(path), read_state(path)))
    reader = HuggingFaceStorageReader(str(path))
    if optimizer is not None and (kind := class_of(optimizer)) != state.optimizer["class"]:
        raise CheckpointError(f"{path}: optimizer: got the state of {state.optimizer['class']}, wanted that of {kind}: "
                              "resume with the optimizer that wrote it, optim.name and optim.rule as they were")
    stored, tensors = together(lambda: fitting(path, state, reader, model, optimizer, config, start))
    states = {}
    if optimizer is not None:
        for part in parts_of(optimizer):
            getattr(part, "owners", None)       # makes its process groups, which all ranks do, or none
        states = together(lambda: empty_states(path, model, optimizer, state.optimizer["states"], stored))
        tensors |= flat(states) | {name: t for name, t in generator_tensors().items() if name in stored}
    if loader is not None:
        together(lambda: loader.load_state_dict(state.loader))
    with dcp_errors(f"{path}: damaged or unreadable, use an earlier checkpoint"):
        dcp.load(tensors, storage_reader=reader, no_dist=ranks() == 1)
    if optimizer is not None:
        for name, parameter in moved_parameters(model, optimizer).items():
            optimizer.state[parameter] = states[name]
        torch.set_rng_state(tensors["rng.cpu"])
        if "rng.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng.cuda"])
    return state


def fitting(path: Path, state: State, reader: HuggingFaceStorageReader, model: torch.nn.Module,
            optimizer: torch.optim.Optimizer | None, config: dict | None, start: bool) -> tuple[dict, dict]:
    """The stored tensors' metadata and those of the model's tensors that are to be read. CheckpointError unless the
    checkpoint is one of this model and optimizer (and of this config's model, if one is given)."""
    if config is not None:
        differing = [f"{name}: the checkpoint has {was!r}, this run wants {now!r}"
                     for name, was, now in differences(state.config, config) if changes_model(name, was, now)]
        if differing:
            raise CheckpointError(f"{path} is a checkpoint of another model:\n  " + "\n  ".join(differing) +
                                  "\nresume with the config.toml of its run folder, or start a new run")
    try:
        stored = reader.read_metadata().state_dict_metadata
    except SafetensorError as error:
        raise CheckpointError(f"{path}: {error}; a truncated or damaged .safetensors file: use an earlier "
                              "checkpoint") from None
    without = start and not any(map(is_factor, stored))

    def wanted(model):
        return {name: tensor for name, tensor in model_tensors(model).items() if not (without and is_factor(name))}

    whole = wanted(model.whole if isinstance(model, Stage) else model)
    if any(map(is_factor, stored)) and not any(map(is_factor, whole)):
        raise CheckpointError(f"{path} has adapters (model.tune.lora_rank), which this model has not: add them to "
                              f"their matrices, python -m moe_ext.tune merge {path} --out FOLDER, and take that")
    check(path, "model.", stored, whole, widened=start)
    if optimizer is not None:
        check_moved(path, model, optimizer, state.optimizer)
        check_names(path, "optim.", stored, {f"optim.{name}.{key}" for name, of in state.optimizer["states"].items()
                                             for key in of})
        check(path, "rng.cpu", stored, {"rng.cpu": torch.get_rng_state()})
    return stored, wanted(model)


def check_model(path: str | Path, model: torch.nn.Module, *, config: dict | None = None, start: bool = False) -> None:
    """What load would refuse of the model and the config; the model may lie on the meta device. Errors: as load."""
    fitting(Path(path), read_state(path), HuggingFaceStorageReader(str(path)), model, None, config, start)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def together(action: Callable, group: dist.ProcessGroup | None = None):
    """action() of this rank; an error of any rank is raised on every rank, that of the lowest one. Collective, over all
    ranks: in `group`, None: the default one."""
    value, error = None, None
    try:
        value = action()
    except Exception as caught:
        error = caught
    errors = [error]
    if ranks() > 1:
        errors = [None] * ranks()
        dist.all_gather_object(errors, portable(error), group)
    for error in errors:
        if error is not None:
            raise error
    return value


def on_rank_0(action: Callable, group: dist.ProcessGroup | None = None):
    """What action() gives on rank 0, or its error, on every rank: `on_rank_0(lambda: latest(folder))`. Collective, as
    together."""
    value = [together(action if rank() == 0 else lambda: None, group)]
    if ranks() > 1:
        dist.broadcast_object_list(value, src=0, group=group)
    return value[0]


def merged(own: dict) -> dict:
    """The nested dicts of all ranks in one, on rank 0. Collective."""
    if ranks() == 1:
        return own
    found = [None] * ranks() if rank() == 0 else None
    dist.gather_object(own, found)

    def add(into: dict, other: dict) -> dict:
        for key, value in other.items():
            into[key] = add(into.setdefault(key, {}), value) if isinstance(value, dict) else value
        return into
    return functools.reduce(add, found) if rank() == 0 else own


def portable(error: Exception | None) -> Exception | None:
    """The error, or a CheckpointError that says the same if it does not survive the way to another rank."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return CheckpointError(f"rank {rank()}: {type(error).__name__}: {error}")


def differences(got: dict, wanted: dict, default: dict | None = None, prefix: str = "") -> Iterator[tuple]:
    """(name, got value, wanted value) of each leaf that differs between two dataclasses.asdict(Config); where a dict
    lacks a field, of which its version did not know, it has the default."""
    if default is None:
        default, got, wanted = dataclasses.asdict(Config()), norm_said(got), norm_said(wanted)
    for key in dict.fromkeys([*wanted, *got]):
        a, b = (side.get(key, default.get(key, "absent")) for side in (got, wanted))
        if isinstance(a, dict) and isinstance(b, dict):
            yield from differences(a, b, default.get(key, {}), f"{prefix}{key}.")
        elif a != b:
            yield prefix + key, a, b


def norm_said(config: dict) -> dict:
    """The config with what norm_p "auto" stands for."""
    moe = config.get("model", {}).get("moe", {})
    if "top_k" not in moe:
        return config
    norm_p = norm_power(moe.get("norm_p", "auto"), moe["top_k"])
    return config | {"model": config["model"] | {"moe": moe | {"norm_p": norm_p}}}


def changes_model(name: str, was, now) -> bool:
    """Whether this difference of two configs makes another model."""
    if name == "model.moe.select_bias_rate":
        return not (was and now)        # 0: there is no bias
    return name.startswith("model.") and name not in TRAINING_ONLY


def named_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """NAME -> parameter or persistent buffer, one name for tied ones.

    From state_dict, not named_parameters: it makes FSDP2 put the sharded parameters back, which are the optimizer's,
    where a forward has left the gathered ones.
    """
    tensors = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        tensors.setdefault(id(tensor), (name, tensor))
    return dict(tensors.values())


def model_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """model.NAME -> parameter or persistent buffer."""
    return {"model." + name: tensor.detach() for name, tensor in named_tensors(model).items()}


def moved_parameters(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.nn.Parameter]:
    """NAME -> parameter, of those that the optimizer moves, in its order."""
    names = {id(tensor): name for name, tensor in named_tensors(model).items()}
    return {names[id(parameter)]: parameter for group in optimizer.param_groups for parameter in group["params"]}


def class_of(optimizer: torch.optim.Optimizer) -> str:
    """"AdamW", or "AdamW + Muon": of the optimizers of all ranks, as stages may have different ones. Collective."""
    classes = [{type(part).__name__ for part in parts_of(optimizer) for group in part.param_groups if group["params"]}]
    if ranks() > 1:
        own, classes = classes[0], [None] * ranks()
        dist.all_gather_object(classes, own)
    return " + ".join(sorted(set().union(*classes)))


def movers(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """NAME -> class of the optimizer that moves the parameter."""
    return {name: type(part).__name__ for part in parts_of(optimizer) for name in moved_parameters(model, part)}


def flat(states: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """{NAME: {STATE: tensor}} -> {optim.NAME.STATE: tensor}. CheckpointError for state that is no tensor."""
    tensors = {f"optim.{name}.{key}": value for name, state in states.items() for key, value in state.items()}
    for name, value in tensors.items():
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(f"{name}: got {type(value).__name__}, wanted a tensor: an optimizer keeps the state "
                                  "of a parameter in tensors")
    return tensors


def generator_tensors() -> dict[str, torch.Tensor]:
    """rng.* -> state of torch's generators, uint8. Nothing here draws from Python's or NumPy's."""
    tensors = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    return tensors


def check_moved(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """CheckpointError unless the same parameters of this stage are moved, each by the same optimizer. saved: of State.
    """
    moved, here = moved_parameters(model, optimizer), named_tensors(model)
    were = {name for name in saved["states"] if name in here}
    for name in moved.keys() ^ were:
        had = "the checkpoint's optimizer moved it" if name in were else "the checkpoint's optimizer did not move it"
        raise CheckpointError(f"{path}: parameter {name}: {had}, this run's {'does' if name in moved else 'does not'}: "
                              "freeze the same parameters, or load the model alone and start the optimizer anew")
    for name, mover in movers(model, optimizer).items():
        was = saved.get("movers", {}).get(name, saved["class"])     # without them there was one
        if was != mover:
            raise CheckpointError(f"{path}: parameter {name}: the checkpoint's {was} moved it, this run's {mover} "
                                  "does: set optim.rule as the config.toml of its run folder has it")


def empty_states(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, listed: dict,
                 stored: dict) -> dict[str, dict[str, torch.Tensor]]:
    """Room for the optimizer's stored state, {NAME: {STATE: tensor}}, this rank's; `listed` has the shapes of all, from
    state.json.

    An optimizer that is Keeping makes it. For another, a state of the parameter's shape lies as the parameter does
    (device, strides, sharding), and a scalar such as AdamW's step lies on the CPU unless the optimizer is fused or
    capturable, as torch wants it.
    """
    scalar = {id(parameter): "cpu" for group in optimizer.param_groups for parameter in group["params"]
              if not (group.get("fused") or group.get("capturable"))}

    def like(parameter, key, shape, dtype):
        if shape == list(parameter.shape) and key != "step":
            return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
        return torch.empty(shape, dtype=dtype, device=scalar.get(id(parameter), parameter.device))

    place, states, tensors = getattr(optimizer, "place", like), {}, {}
    for name, parameter in moved_parameters(model, optimizer).items():
        states[name] = {}
        for key, shape in listed[name].items():
            full = f"optim.{name}.{key}"
            try:
                tensor = place(parameter, key, shape, stored[full].properties.dtype)
            except ValueError as error:
                raise CheckpointError(f"{path}: {full}: {error}; resume with the config.toml of its run folder"
                                      ) from None
            if tensor is not None:
                states[name][key] = tensors[full] = tensor
    check_tensors(path, stored, tensors, converted=True)
    return states


def check(path: Path, section: str, stored: dict, tensors: dict[str, torch.Tensor], **options) -> None:
    """CheckpointError unless the stored names of a section are those of `tensors`, and as check_tensors."""
    check_names(path, section, stored, tensors.keys())
    check_tensors(path, stored, tensors, **options)


def check_tensors(path: Path, stored: dict, tensors: dict[str, torch.Tensor], converted: bool = False,
                  widened: bool = False) -> None:
    """CheckpointError unless the stored tensors have the shapes and dtypes of `tensors`, and every one is complete: its
    boxes, which are disjoint, hold as many values as it has. converted: any floating-point dtype is as good as another;
    widened: one of fewer bits is."""
    for name, tensor in tensors.items():
        values = sum(math.prod(box.sizes) for box in stored[name].chunks)
        dtype = stored[name].properties.dtype
        if dtype.is_floating_point and tensor.is_floating_point() and (
                converted or (widened and torch.promote_types(dtype, tensor.dtype) == tensor.dtype)):
            dtype = tensor.dtype
        got = f"{dtype} {list(stored[name].size)}"
        if values != math.prod(stored[name].size):
            got += f" in boxes of together {values} values"
        wanted = f"{tensor.dtype} {list(tensor.shape)}"
        if got != wanted:
            raise CheckpointError(f"{path}: {name}: got {got}, wanted {wanted}: build the model with the config of the "
                                  "checkpoint, copy all files of its folder, or use another checkpoint")


def check_names(path: Path, section: str, stored: dict, wanted) -> None:
    got = {name for name in stored if name.startswith(section)}
    for problem, names in (("missing from", sorted(wanted - got)), ("unexpected in", sorted(got - wanted))):
        if names:
            raise CheckpointError(f"{path}: {len(names)} tensors {problem} the checkpoint: {listed(names)}: build the "
                                  "model with the config of the checkpoint, or use another checkpoint")


def listed(names: list[str]) -> str:
    """The first of them, for a sentence."""
    return ", ".join([*names[:4], "..."] if len(names) > 4 else names)


@contextmanager
def dcp_errors(what: str):
    """Around torch.distributed.checkpoint: no warning about a single process, and instead of its BaseException, which
    would pass every `except Exception`, a CheckpointError with the first rank's error, on every rank."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except dcp.api.CheckpointException as error:
            first = min(error.failures)
            cause = error.failures[first][0]
            raise CheckpointError(f"{what}: rank {first}: {type(cause).__name__}: {cause}") from None


def sync(path: Path) -> None:
    """Force a file, or a folder's list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def discard(path: Path) -> None:
    """Delete a checkpoint; it stops counting at once, so a kill leaves no half of it."""
    doomed = path.with_name(path.name + ".tmp-discarded")
    path.rename(doomed)
    shutil.rmtree(doomed)
