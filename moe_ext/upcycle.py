"""An MoE that begins as a trained dense model: `python -m moe_ext.upcycle DENSE RECIPE.toml --out FOLDER`.

DENSE is a run folder (its newest checkpoint counts) or a checkpoint, of any mesh. FOLDER becomes a run folder with a
checkpoint of step 0: `moe_ext.evaluate FOLDER` gives its loss, `moe_ext.train RECIPE.toml --weights FOLDER` goes on.

In each block that the recipe makes MoE, the H hidden units of the dense MLP are dealt out:

    H = moe.shared_hidden + G * moe.hidden          first what the shared expert takes, then G >= 1 slices
    expert e has slice e mod G; its down projection times G / (the sum of a token's weights)

G = 1 makes every expert a copy (Komatsuzaki et al., 2023). G > 1 makes fine-grained ones: the experts from j * G on are
a virtual group (He et al., 2024), whose G rows in the router are equal at first, so that a token that chooses one of
them chooses all; for that, G must divide moe.top_k and moe.experts. The dense form of a recipe (--type dense) has G =
top_k. All else is copied, the router is drawn anew; what does not fit is refused by name.

The model computes exactly what the dense one did if a token's weights always sum to the same number: norm_p 1, or score
topk_softmax (weight_sum). Otherwise they sum to about what equal weights do, the closer the smaller router_std is. Two
options change the function, so that experts differ from the start: noise is added to their matrices, drop (Nakamura et
al., 2025) draws a share of their hidden units anew. One process holds both models, in their parameters' dtype.
"""
from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import threading
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch

import moe_ext
from moe_ext import checkpoint
from moe_ext.config import Config, ConfigError, ModelConfig, MoEConfig, build, dumps, parse, plain, require
from moe_ext.layers.fused import MLP, FusedMoE, norm_power, site
from moe_ext.model import GPT, normal_, parameter_dtype
from moe_ext.optim import build_optimizer
from moe_ext.run import absolute, write


@dataclass(frozen=True)
class Command(Config):
    """Make an MoE of a dense model: its run folder or checkpoint, then the MoE's recipe, overridden field by field."""
    out: str = ""               # folder to be made
    noise: float = 0.0          # deviation of what is added to each expert's matrices, as a share of their own
    drop: float = 0.0           # share of each expert's hidden units that is drawn anew, with its mean and deviation
    router_std: float = 0.001   # of the router's initial values

    def __post_init__(self):
        super().__post_init__()
        require(self.noise >= 0, f"--noise is {self.noise}; it cannot be negative")
        require(0 <= self.drop <= 1, f"--drop is {self.drop}; it is a share, from 0 to 1")
        require(self.router_std > 0, f"--router-std is {self.router_std}; it must be positive, or all tokens choose "
                "the same experts")


def slices(dense: ModelConfig, moe: ModelConfig) -> int:
    """G, the slices that experts make of the dense MLP. ConfigError if they do not fit."""
    m, width = moe.moe, dense.hidden - moe.moe.shared_hidden
    require(m.experts > 0, "the recipe is dense (model.moe.experts is 0): give the one of an MoE")
    require(dense.moe.experts == 0, f"the source is an MoE of {dense.moe.experts} experts: give a dense model")
    require(width > 0 and width % m.hidden == 0, f"model.moe.hidden {m.hidden} does not divide the {width} that "
            f"model.moe.shared_hidden {m.shared_hidden} leaves of the dense model's {dense.hidden} hidden units")
    g = width // m.hidden
    for name, value in (("top_k", m.top_k), ("experts", m.experts)):
        require(value % g == 0, f"model.moe.hidden {m.hidden} cuts the dense MLP into {g} slices, all of which a token "
                f"needs: --model.moe.{name.replace('_', '-')} {value} must be a multiple of {g}")
    require(m.groups == 1 or m.experts // m.groups % g == 0, f"model.moe.hidden {m.hidden} cuts the dense MLP into {g} "
            f"slices, which must lie in one group: --model.moe.groups {m.groups} leaves {m.experts // m.groups} "
            "experts in each")
    require(not m.dense_layers or moe.hidden == dense.hidden, f"the first model.moe.dense_layers {m.dense_layers} "
            f"blocks stay dense: give --model.hidden {dense.hidden}, as in the source, not {moe.hidden}")
    return g


def weight_sum(m: MoEConfig) -> tuple[float, bool]:
    """What a token's weights sum to, and whether they always do (False: if they are equal)."""
    p = norm_power(m.norm_p, m.top_k)
    if p:
        return m.scale * m.top_k ** (1 - 1 / p), p == 1
    equal = {"topk_softmax": 1 / m.top_k, "softmax_topk": 1 / m.experts, "sigmoid": 1 / 2}[m.score]
    return m.scale * m.top_k * equal, m.score == "topk_softmax" or (m.score, m.top_k) == ("softmax_topk", m.experts)


@torch.no_grad()
def upcycle(dense: GPT, moe: GPT, *, seed: int = 0, noise: float = 0.0, drop: float = 0.0,
            router_std: float = 0.001) -> None:
    """Fill every tensor of `moe`, which may hold anything, from `dense`; options as in Command. ConfigError if their
    configs do not fit: beside model.hidden and model.moe they must be equal."""
    g, theirs = slices(dense.config, moe.config), checkpoint.named_tensors(dense)
    for name, tensor in checkpoint.named_tensors(moe).items():
        if name in theirs:
            tensor.copy_(theirs[name])
    for old, new in zip(dense.layers, moe.layers, strict=True):
        if isinstance(new.mlp, FusedMoE):
            deal(old.mlp, new.mlp, g, weight_sum(moe.config.moe)[0])
            vary(new.mlp, seed, noise, drop)
            rows_ED = new.mlp.gate.weight
            normal_(rows_ED, router_std, seed, site(new.name + ".mlp.gate.weight"))
            rows_ED.copy_(rows_ED[::g].repeat_interleave(g, dim=0))
            for zero in (new.mlp.gate.bias, new.mlp.noise_E, new.mlp.select_bias_E):
                if zero is not None:
                    zero.zero_()


def deal(old: MLP, new: FusedMoE, g: int, total: float) -> None:
    """The hidden units of the dense MLP to the shared expert, the first of them, and in g slices to the experts, whose
    weights sum to `total`."""
    shared, (experts, _, width) = 0, new.experts.w2_EDF.shape
    if new.shared is not None:
        shared = new.shared.up_proj.out_features
        factor = 1
        if new.shared_gate is not None:
            new.shared_gate.weight.zero_()
            factor = 2      # sigmoid(0) is a half
        for name, want in new.shared.named_parameters():
            have = old.get_parameter(name)
            if name == "down_proj.bias":
                want.zero_()        # the experts have it
            else:
                want.copy_(factor * have[:, :shared] if name == "down_proj.weight" else have[:shared])
    ups = [proj for proj in (old.gate_proj, old.up_proj) if proj is not None]
    for e in range(experts):
        units = slice(shared + e % g * width, shared + (e % g + 1) * width)
        new.experts.w2_EDF[e] = old.down_proj.weight[:, units] * (g / total)
        for half, proj in enumerate(ups):
            new.experts.w13_E2FD[e, half] = proj.weight[units]
        if old.down_proj.bias is not None:
            new.experts.w2_bias[e] = old.down_proj.bias / total
            for half, proj in enumerate(ups):
                new.experts.w13_bias[e, half] = proj.bias[units]


def vary(layer: FusedMoE, seed: int, noise: float, drop: float) -> None:
    """Make the experts of a layer differ: both are 0, or random numbers that only seed and the layer's name decide."""
    experts = layer.experts
    for name, weight in (("w13_E2FD", experts.w13_E2FD), ("w2_EDF", experts.w2_EDF)):
        if noise:
            drawn = torch.empty_like(weight)
            normal_(drawn, noise * weight.std().item(), seed, site(f"{layer.name}.{name}"))
            weight.add_(drawn)
    generator, width = torch.Generator().manual_seed(seed + site(layer.name)), experts.w2_EDF.shape[2]
    for e in range(layer.num_experts if drop else 0):
        units = torch.randperm(width, generator=generator)[:round(drop * width)]
        for rows_FD in (*experts.w13_E2FD[e], experts.w2_EDF[e].T):
            old_FD = rows_FD[units]
            rows_FD[units] = old_FD.mean() + old_FD.std() * torch.randn(old_FD.shape, generator=generator,
                                                                       dtype=old_FD.dtype)


def source_of(path: Path) -> Path:
    """The checkpoint that `path` is or, as a run folder, has as its newest."""
    found = path if (path / "state.json").is_file() else checkpoint.latest(path / "ckpt")
    require(found is not None, f"{path}: neither a checkpoint (it holds no state.json) nor a run folder with one (it "
            "holds no ckpt/step-NNNNNN)")
    return found


def convert(source: Path, config: Config, out: Path, **options) -> str:
    """Write the run folder `out`, whole or not at all -> what was done. Errors: ConfigError, CheckpointError, OSError.
    options: of upcycle."""
    from moe_ext import tune  # which imports this file

    source = source_of(source)
    state = checkpoint.read_state(source)
    was = build(Config, state.config)
    require(was.model.tune.lora_rank == 0, f"{source} has adapters (model.tune.lora_rank), which belong into the "
            f"matrices first: python -m moe_ext.tune merge {source} --out FOLDER, then upcycle that")
    require(config.model.tune.lora_rank == 0, f"model.tune.lora_rank is {config.model.tune.lora_rank}: adapters come "
            "to a model that is there: leave it at 0 here, and give it with --weights")
    g = slices(was.model, config.model)

    def matters(name, there, here):
        if name == "model.seq_len":
            return was.model.position == "learned"
        return checkpoint.changes_model(name, there, here) and not name.startswith(("model.moe.", "model.hidden"))

    differing = [f"{name}: the checkpoint has {there!r}, the recipe {here!r}" for name, there, here
                 in checkpoint.differences(state.config, asdict(config)) if matters(name, there, here)]
    require(not differing, f"{source} is no dense form of this model:\n  " + "\n  ".join(differing) +
            "\ngive the checkpoint's values as options, or another recipe")
    with whole(out) as work:
        dense, moe = empty(was), empty(config)
        tune.check(moe)
        checkpoint.load(source, model=dense)
        upcycle(dense, moe, seed=config.train.seed, **options)
        fill(work, out, moe, config, like=source)
    exact = weight_sum(config.model.moe)[1] and not options.get("noise") and not options.get("drop")
    kind = "a copy of the dense MLP" if g == 1 else f"one of {g} slices of the dense MLP"
    return (f"{out}: {len(moe.moe_layers())} layers of {config.model.moe.experts} experts, each {kind} of {source}; it "
            f"computes {'exactly' if exact else 'about'} what that does. Go on with --weights {out}")


def empty(config: Config) -> GPT:
    """The GPT of a run in memory that nobody has written to."""
    model = GPT(config.model, dtype=parameter_dtype(config), device="meta").to_empty(device="cpu")
    if config.model.tied:       # to_empty has given each its own
        model.lm_head.weight = model.embed_tokens.weight
    return model


def fill(work: Path, out: Path, model: GPT, config: Config, *, like: Path | None = None, source=None) -> None:
    """Make `work` the run folder that `out` shall be: a checkpoint of step 0, the config, and which tokenizer the run
    of the checkpoint `like` has. source: as checkpoint.save takes it."""
    folder, name = os.path.split(os.path.abspath(out))
    config = absolute(replace(config, log=replace(config.log, folder=folder, name=name)))
    checkpoint.save(work / "ckpt", model=model, optimizer=build_optimizer(model, config.optim), step=0,
                    loader=SimpleNamespace(state_dict=dict), config=asdict(config), source=source)
    write(work, "config.toml", dumps(config).encode())
    for name in ("tokenizer.json", "tokenizer.sha256") if like else ():
        file = like.absolute().parents[1] / name
        if file.is_file():
            write(work, name, file.read_bytes())


@contextmanager
def whole(out: Path):
    """A folder to fill, which then becomes `out`, or vanishes if anything fails or a signal ends the process.
    ConfigError if there is no place."""
    require(not os.path.lexists(out), f"--out {out} exists: choose another folder, or delete it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=out.name + ".tmp-", dir=out.parent))
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error.strerror}: choose another folder") from None
    work.chmod(0o755)
    with ending(lambda: shutil.rmtree(work, ignore_errors=True)):
        try:
            yield work
            work.rename(out)
        except BaseException as error:
            shutil.rmtree(work, ignore_errors=True)     # what has failed is the error to tell
            if isinstance(error, OSError) and error.strerror and error.filename is None:    # such as a full disk's
                error.filename = str(out)
            raise


@contextmanager
def ending(clean):
    """Inside, SIGTERM, SIGHUP and the Ctrl-C of moe_ext's commands call `clean` before they end the process as they do
    otherwise: at once, for an exception could be swallowed by what is interrupted. Other handlers stay, such as
    Python's, which raises KeyboardInterrupt."""
    known = signal.SIG_DFL, vars(moe_ext).get("interrupted", signal.SIG_DFL)
    ends = {number: handler for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
            if (handler := signal.getsignal(number)) in known}

    def end(number, frame):
        clean()
        signal.signal(number, ends[number])
        signal.raise_signal(number)

    mine = ends if threading.current_thread() is threading.main_thread() else ()    # others may set none
    for number in mine:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in mine:
            signal.signal(number, ends[number])


def main() -> None:
    args = sys.argv[1:]
    try:
        if args[:1] not in (["-h"], ["--help"]):
            require(len(args) > 1 and not args[0].startswith("-") and not args[1].startswith("-"),
                    "usage: python -m moe_ext.upcycle DENSE_RUN_OR_CHECKPOINT RECIPE.toml --out FOLDER   (--help lists "
                    "every field)")
            source, *args = args
        command = parse(args, Command, "moe_ext.upcycle DENSE")
        require(command.out != "", "give the folder to be made: --out FOLDER")
        config = plain(command)
        print(convert(Path(source), config, Path(command.out), noise=command.noise, drop=command.drop,
                      router_std=command.router_std))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
