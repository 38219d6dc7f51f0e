"""Checkpoints that are whole or absent, load completely or not at all, and continue bit for bit.

    RUN/ckpt/step-000500/
        shard-*.safetensors     tensors, by torch.distributed.checkpoint: readable on any mesh, without pickle
            model.NAME          parameters and persistent buffers
            optim.NAME.STATE    the optimizer's state of parameter NAME (exp_avg, exp_avg_sq, step, ...)
            rng.cpu, rng.cuda   torch's generators
        state.json              format, step, best_loss, config, the loader's position, which states each parameter has

A save writes a folder step-000500.tmp-*, syncs every file and the folder to disk, and renames it: a kill at any moment
leaves a folder that does not count, beside the previous checkpoint. Tied parameters are stored once, under their
first name. Learning rate, weight decay and betas are not state: they come from the config of the run that continues.
"""
import json
import os
import re
import shutil
import tempfile
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

FORMAT = 1
WHOLE = re.compile(r"step-(\d{6,})(\.old)?")       # .old: set aside while a save of the same step takes its place


class CheckpointError(ValueError):
    """A checkpoint that does not fit or is damaged; the message names the tensor, field or file and what to do."""


class State(NamedTuple):
    """What a checkpoint knows besides tensors."""
    step: int                   # optimizer steps done
    best_loss: float | None     # lowest held-out loss so far, nats per token
    config: dict                # dataclasses.asdict of the run's Config
    loader: dict                # Loader.state_dict()
    optimizer: dict             # {"class": "AdamW", "states": {NAME: {STATE: shape}}} of each parameter that it moves


def save(folder: str | Path, *, model: torch.nn.Module, optimizer: torch.optim.Optimizer, loader, step: int,
         config: dict, best_loss: float | None = None, keep_last: int = 0) -> Path:
    """Write folder/step-NNNNNN and return it; then keep only the newest keep_last checkpoints (0: all).

    loader: anything with state_dict() -> JSON values. config: dataclasses.asdict(Config).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    clear(folder)
    final = folder / f"step-{step:06d}"
    work = Path(tempfile.mkdtemp(prefix=final.name + ".tmp-", dir=folder))
    work.chmod(0o755)

    moved = moved_parameters(model, optimizer)
    states = {name: optimizer.state.get(parameter, {}) for name, parameter in moved.items()}
    tensors = model_tensors(model) | flat(states) | generator_tensors()
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with one_process():
        dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(work), save_distributed=True), no_dist=True)
    shapes = {name: {key: list(tensor.shape) for key, tensor in of.items()} for name, of in states.items()}
    state = State(step, best_loss, config, loader.state_dict(), {"class": type(optimizer).__name__, "states": shapes})
    (work / "state.json").write_text(json.dumps({"format": FORMAT, **state._asdict()}, indent=1))

    for path in [*work.iterdir(), work]:
        sync(path)
    if final.exists():                                  # the same step again: whole under one name or the other
        final.rename(final.with_name(final.name + ".old"))
    work.rename(final)
    sync(folder)
    clear(folder)
    others = [path for path in whole(folder) if path != final]
    for path in others[:max(0, len(others) + 1 - keep_last)] if keep_last else []:
        discard(path)
    return final


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


def latest(folder: str | Path) -> Path | None:
    """The newest complete checkpoint of a folder, None if there is none."""
    return next(reversed(whole(folder)), None)


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
    return State(**state)


def load(path: str | Path, *, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None, loader=None,
         config: dict | None = None) -> State:
    """Read a checkpoint into model, and with an optimizer and a loader continue its run: their state and torch's RNG.

    Without an optimizer only the model is read (evaluation, sampling). config: the wanted dataclasses.asdict(Config);
    if its "model" differs from the checkpoint's, that is an error naming the fields. Every tensor of the model and the
    optimizer must be in the checkpoint with its shape and dtype, and every such tensor of the checkpoint in them;
    nothing is touched before that is certain. Errors: FileNotFoundError, CheckpointError.
    """
    path = Path(path)
    state = read_state(path)
    if config is not None:
        differing = differences(state.config["model"], config["model"], "model")
        if differing:
            raise CheckpointError(f"{path} is a checkpoint of another model:\n  " + "\n  ".join(differing) +
                                  "\nresume with the config.toml of its run folder, or start a new run")
    if optimizer is not None and type(optimizer).__name__ != state.optimizer["class"]:
        raise CheckpointError(f"{path}: optimizer: got the state of {state.optimizer['class']}, wanted that of "
                              f"{type(optimizer).__name__}: resume with the optimizer that wrote it")
    try:
        reader = HuggingFaceStorageReader(str(path))
        stored = reader.read_metadata().state_dict_metadata
        tensors = model_tensors(model)
        check(path, "model.", stored, tensors)
        if optimizer is not None:
            states = empty_states(path, model, optimizer, state.optimizer["states"], stored)
            generators = {name: t for name, t in generator_tensors().items() if name == "rng.cpu" or name in stored}
            check(path, "rng.cpu", stored, {"rng.cpu": generators["rng.cpu"]})
            tensors |= flat(states) | generators
        if loader is not None:
            loader.load_state_dict(state.loader)
        with one_process():
            dcp.load(tensors, storage_reader=reader, no_dist=True)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: {error}; a truncated or damaged .safetensors file: use an earlier "
                              "checkpoint") from None
    if optimizer is not None:
        for name, parameter in moved_parameters(model, optimizer).items():
            optimizer.state[parameter] = states[name]
        torch.set_rng_state(tensors["rng.cpu"])
        if "rng.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng.cuda"])
    return state


def differences(got: dict, wanted: dict, name: str) -> list[str]:
    """One sentence per leaf that differs between two nested dicts."""
    lines = []
    for key in dict.fromkeys([*wanted, *got]):
        a, b = got.get(key, "absent"), wanted.get(key, "absent")
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{name}.{key}")
        elif a != b:
            lines.append(f"{name}.{key}: the checkpoint has {a!r}, this run wants {b!r}")
    return lines


def model_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """model.NAME -> parameter or persistent buffer, one name for tied ones."""
    tensors, seen = {}, set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors["model." + name] = tensor.detach()
    return tensors


def moved_parameters(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.nn.Parameter]:
    """NAME -> parameter, of those that the optimizer moves, in its order."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)]: parameter for group in optimizer.param_groups for parameter in group["params"]}


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


def empty_states(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, listed: dict,
                 stored: dict) -> dict[str, dict[str, torch.Tensor]]:
    """Room for the optimizer's stored state, {NAME: {STATE: tensor}}; `listed` has the shapes, from state.json.

    A state of the parameter's shape lies as the parameter does (device, strides, sharding). A scalar such as AdamW's
    step lies on the CPU unless the optimizer is fused or capturable, as torch wants it.
    """
    moved = moved_parameters(model, optimizer)
    for name in moved.keys() ^ listed.keys():
        had = "the checkpoint's optimizer moved it" if name in listed else "the checkpoint's optimizer did not move it"
        raise CheckpointError(f"{path}: parameter {name}: {had}, this run's {'does' if name in moved else 'does not'}: "
                              "freeze the same parameters, or load the model alone and start the optimizer anew")
    scalar = {id(parameter): "cpu" for group in optimizer.param_groups for parameter in group["params"]
              if not (group.get("fused") or group.get("capturable"))}

    check_names(path, "optim.", stored, {f"optim.{name}.{key}" for name, of in listed.items() for key in of})

    def room(name, key, shape):
        parameter, dtype = moved[name], stored[f"optim.{name}.{key}"].properties.dtype
        if shape == list(parameter.shape):
            return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
        return torch.empty(shape, dtype=dtype, device=scalar.get(id(parameter), parameter.device))

    states = {name: {key: room(name, key, shape) for key, shape in of.items()} for name, of in listed.items()}
    check(path, "optim.", stored, flat(states))
    return states


def check(path: Path, section: str, stored: dict, tensors: dict[str, torch.Tensor]) -> None:
    """CheckpointError unless the stored names of a section, their shapes and dtypes are those of `tensors`."""
    check_names(path, section, stored, tensors.keys())
    for name, tensor in tensors.items():
        got = f"{stored[name].properties.dtype} {list(stored[name].size)}"
        wanted = f"{tensor.dtype} {list(tensor.shape)}"
        if got != wanted:
            raise CheckpointError(f"{path}: {name}: got {got}, wanted {wanted}: build the model with the config of the "
                                  "checkpoint, or use another checkpoint")


def check_names(path: Path, section: str, stored: dict, wanted) -> None:
    got = {name for name in stored if name.startswith(section)}
    for problem, names in (("missing from", sorted(wanted - got)), ("unexpected in", sorted(got - wanted))):
        if names:
            listed = ", ".join([*names[:4], "..."] if len(names) > 4 else names)
            raise CheckpointError(f"{path}: {len(names)} tensors {problem} the checkpoint: {listed}: build the model "
                                  "with the config of the checkpoint, or use another checkpoint")


@contextmanager
def one_process():
    """Around torch.distributed.checkpoint without a process group: no warning about that, ordinary exceptions."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except dcp.api.CheckpointException as error:    # a BaseException that would pass every `except Exception`
            raise CheckpointError(str(error)) from None


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
