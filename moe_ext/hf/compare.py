"""Whether a run and a folder of transformers are the same model: each tensor, and what both make of the same tokens."""
from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F

from moe_ext import checkpoint
from moe_ext.config import Config, build, require
from moe_ext.data.prepare import progress
from moe_ext.hf import files
from moe_ext.hf.convert import SHORT, Theirs, read
from moe_ext.hf.double import double
from moe_ext.hf.families import differences
from moe_ext.upcycle import empty, source_of

COMPUTED = {"fp64": (torch.float64, 1e-12), "fp32": (torch.float32, 1e-4)}


def compare(source: Path, folder: Path, *, tokens: int = 0, dtype: str = "fp64",
            tolerance: float = 0.0) -> tuple[str, bool]:
    """-> what was found, and whether it is the same: logits and loss of random tokens to the tolerance, relative to the
    largest. tokens 0: at most 128; tolerance 0: the dtype's, and then all tensors are equal, in the folder's dtype.
    Errors: ConfigError, CheckpointError, OSError."""
    path, (kind, usual) = source_of(source), COMPUTED[dtype]
    config, theirs = build(Config, checkpoint.read_state(path).config), read(folder)
    differing = [f"{name} {mine} here, {its} there" for name, mine, its in differences(config.model, theirs.model)]
    require(not differing, f"{folder} is another model than {path}: " + "; ".join(differing))
    room = config.model.seq_len
    require(tokens == 0 or 1 < tokens <= room, f"--tokens is {tokens}, wanted 2 to model.seq_len {room}, or 0")
    tokens = tokens or min(room, 128)
    tensors, equal = compare_tensors(path, theirs)

    ids = torch.randint(config.model.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = empty(config)
        checkpoint.load(path, model=ours)
        mine = ours.to(kind).eval().logits(ids)[0]
        del ours
        with double() if dtype == "fp64" else nullcontext():
            its = pretrained(theirs, kind)(ids).logits[0]
    apart = ((mine - its).abs().max() / its.abs().max()).item()
    losses = [F.cross_entropy(logits[:-1], ids[0, 1:]).item() for logits in (mine, its)]
    limit = tolerance or usual
    same = apart <= limit and abs(losses[0] - losses[1]) <= limit * losses[1]       # NaN is not
    same = same and (equal or tolerance > 0)
    return "\n".join([
        tensors, f"logits of {tokens} tokens in {dtype}: largest difference {apart:.1e} of the largest logit",
        f"loss: {losses[0]:.9f} here, {losses[1]:.9f} there, difference {abs(losses[0] - losses[1]):.1e}",
        f"{'the same' if same else 'NOT the same'} {theirs.family.model_type} to {limit:g}"]), same


def compare_tensors(path: Path, theirs: Theirs) -> tuple[str, bool]:
    """-> how many tensors have the same values, and whether all have, once ours are rounded to their dtype."""
    ours, equal, rounded, others = files.tensors(sorted(path.glob("*.safetensors")), "model."), 0, 0, []
    with progress("compare", sum(map(len, theirs.table.values())), "tensors") as advance:
        for name, parts in theirs.table.items():
            x = ours[f"model.{name}"].read()
            for part in parts:
                mine, its = part.of(x).reshape(part.shape), theirs.tensors[part.name].read()
                if torch.equal(mine, its.to(mine.dtype)):
                    equal += 1
                elif torch.equal(mine.to(its.dtype), its):
                    rounded += 1
                else:
                    others.append(f"{part.name} by up to {(mine - its).abs().max():.1e}")
                advance(1)
    said = f"tensors: {equal} equal"
    if rounded:
        dtypes = sorted({SHORT[dtype] for dtype in theirs.dtypes.values()})
        said += f", {rounded} equal once rounded to {'/'.join(dtypes)}"
    return said + (f", {len(others)} differ: {files.listed(others)}" if others else ""), not others


def pretrained(theirs: Theirs, dtype: torch.dtype):
    """transformers' own in evaluation, all of it in `dtype`, attention and experts by its plainest code."""
    from transformers import AutoModelForCausalLM, Mxfp4Config
    from transformers.utils import logging
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    packed = any(isinstance(stored, files.MXFP4) for stored in theirs.tensors.values())
    options = {"quantization_config": Mxfp4Config(dequantize=True)} if packed else {}
    return AutoModelForCausalLM.from_pretrained(theirs.origin.folder, dtype=dtype, attn_implementation="eager",
                                                experts_implementation="eager", **options).to(dtype).eval()
