"""Text to shuffled .jsonl shards and a held-out file, the usual beginning of a data path for many machines.

The documents in the order of `seed` (shuffle.py) are dealt to the shards in turn; the first `valid_lines` of each go to
valid.jsonl instead. A document that is also among those is left out, so equal ones never stand on both sides.
"""
import json
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from moe_ext.data import shuffle
from moe_ext.data.prepare import Text, about, collect, progress, say_left_out, target
from moe_ext.data.target import replace, write_whole


@dataclass(frozen=True)
class Shards(Text):
    """Shuffle text into shards of .jsonl and hold out lines of each."""
    shards: int = 32            # files
    valid_lines: int = 10_000   # documents held out of each

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.shards <= 512:
            raise ValueError(f"shards: got {self.shards}, wanted 1 to 512 (open files)")
        if self.valid_lines < 0:
            raise ValueError(f"valid_lines: got {self.valid_lines}, wanted 0 or more")


def shards(options: Shards, say=print) -> dict:
    """Write shard-00.jsonl .., valid.jsonl, meta.json into options.out; returns the latter. Errors as in `prepare`."""
    with target(options, say) as (work, files, left_out, meta):
        if meta:
            return meta
        collected = collect(options, work, files, left_out, say)
        held_out = options.shards * options.valid_lines
        total = sum(len(bucket.records) for bucket in shuffle.buckets(work / "buckets"))
        if total <= held_out:
            raise ValueError(f"text: got {total:,} documents, wanted more than {options.shards} shards of "
                             f"{options.valid_lines:,} held-out ones: give more text, or fewer --valid-lines")
        data = work / "data"
        data.mkdir(exist_ok=True)
        counts, dealt, last = {"train": [0, 0], "valid": [0, 0]}, 0, None
        with ExitStack() as stack, progress("write", total) as advance:
            outs = [stack.enter_context(open(data / f"shard-{i:02d}.jsonl", "w", encoding="utf-8"))
                    for i in range(options.shards)]
            valid = stack.enter_context(open(data / "valid.jsonl", "w", encoding="utf-8"))
            for bucket in shuffle.buckets(work / "buckets"):
                places = bucket.records[["place", "side"]].tolist()
                for place, text in zip(places, bucket.texts(np.arange(len(places))), strict=True):
                    side = "valid" if dealt < held_out else "train"
                    if side == "train" and place == last:
                        left_out.add("held out too", "", size=len(text.encode()))
                        continue
                    last = place if side == "valid" else last
                    counts[side][0] += 1
                    counts[side][1] += len(text.encode())
                    out = valid if side == "valid" else outs[dealt % options.shards]
                    out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                    dealt += 1
                    advance(1)
        meta = about(options, files, collected, left_out) | {
            side: {"documents": count, "bytes": size} for side, (count, size) in counts.items()}
        write_whole(data / "meta.json", json.dumps(meta, indent=1) + "\n")
        replace(data, options.out)
    say(f"{options.out}: {counts['train'][0]:,} documents in {options.shards} shards, {counts['valid'][0]:,} in "
        "valid.jsonl")
    say_left_out(meta["left_out"], meta["undecodable_bytes"], say)
    return meta
