"""`python -m moe_ext.data prepare | show | merge | shards`."""
import json
import sys
from pathlib import Path

import tyro

from moe_ext.data import identity, indexed
from moe_ext.data.indexed import IndexedDataset, unigram_entropy
from moe_ext.data.prepare import Prepare, prepare, read_meta, say_left_out
from moe_ext.data.shards import Shards, shards
from moe_ext.data.target import write_whole
from moe_ext.data.tokenise import load


def show(path: tyro.conf.Positional[Path], tokenizer: str = "") -> None:
    """Check token files and print what they hold.

    Args:
        path: folder written by `prepare` or `shards`, or PREFIX of any PREFIX.bin and PREFIX.idx
        tokenizer: tokenizer.json to read their beginning with; the folder's own by default
    """
    prefixes = [path]
    if path.is_dir() or not indexed.token_paths(path)[0].is_file():
        meta = read_meta(path)
        prefixes = [path / side for side in ("train", "valid") if "tokens" in meta[side]]
        if not prefixes:
            print(f"{path}: {meta['train']['documents']:,} documents in {meta['options']['shards']} shards, "
                  f"{meta['valid']['documents']:,} in valid.jsonl")
        say_left_out(meta["left_out"], meta["undecodable_bytes"], print)
    for prefix in prefixes:
        show_tokens(prefix, tokenizer)


def show_tokens(prefix: Path, tokenizer: str) -> None:
    dataset, meta = IndexedDataset(prefix), identity.data_meta(prefix) or {}
    sequences = 0 if dataset.flat else len(indexed.sequence_sizes(dataset))
    print(f"{prefix.name}: {len(dataset):,} documents of {sequences:,} sequences, {len(dataset.tokens):,} tokens of "
          f"{dataset.tokens.dtype}, the longest document {dataset.sizes.max():,}")
    if side := meta.get(indexed.token_paths(prefix)[0].stem):
        print(f"    vocabulary {meta['vocab_size']:,}, {side['bytes'] / side['tokens']:.2f} bytes a token, "
              f"unigram entropy {unigram_entropy(dataset):.3f} nats")
    own = prefix.parent / meta.get("tokenizer", "tokenizer.json")
    if tokenizer and (wanted := meta.get("tokenizer_sha256")) and identity.tokenizer_hash(tokenizer) != wanted:
        raise ValueError(f"tokenizer: {tokenizer} is not that of {prefix} ({wanted[:12]}): leave it off, or give that")
    first = dataset.tokens[:24].tolist()
    if tokenizer or (meta and own.is_file()):
        print(f"    begins {load(Path(tokenizer or own)).decode(first, skip_special_tokens=False)!r}")
    else:
        print(f"    begins {' '.join(map(str, first))}")


def merge(prefixes: tyro.conf.Positional[tuple[Path, ...]], out: Path) -> None:
    """Put token files end to end.

    Args:
        prefixes: PREFIX of each PREFIX.bin and PREFIX.idx
        out: PREFIX to write; a meta.json of theirs becomes OUT.meta.json
    """
    if not prefixes:
        raise ValueError("merge: got no PREFIX, wanted the token files to merge")
    if out.is_dir():
        raise ValueError(f"out: {out} is a folder, wanted the PREFIX of files to write, as in {out / 'train'}")
    out = indexed.token_paths(out)[0].with_suffix("")
    for path in indexed.token_paths(out):
        if path.exists():
            raise ValueError(f"out: {path} exists: delete it or choose another PREFIX")
    metas = [identity.data_meta(prefix) for prefix in prefixes]
    hashes = {(meta or {}).get("tokenizer_sha256") for meta in metas}
    if len(known := hashes - {None}) > 1:
        raise ValueError(f"merge: got tokens of {len(known)} tokenizers, wanted one: prepare them with the same "
                         "--tokenizer")
    indexed.merge(prefixes, out)
    if all(metas):
        sides = [meta[indexed.token_paths(prefix)[0].stem] for meta, prefix in zip(metas, prefixes, strict=True)]
        total = {name: sum(side[name] for side in sides) for name in ("documents", "bytes", "tokens")}
        meta = {name: metas[0].get(name) for name in ("format", "vocab_size", "end_of_text")}
        meta["tokenizer_sha256"] = hashes.pop() if len(hashes) == 1 else None       # some may be of an older version
        write_whole(Path(f"{out}.meta.json"), json.dumps({**meta, out.name: total}, indent=1) + "\n")
    merged = IndexedDataset(out)
    print(f"{out}: {len(merged):,} documents, {len(merged.tokens):,} tokens of {merged.tokens.dtype}")


def main() -> None:
    options = [word.partition("=")[0] for word in sys.argv[1:] if word.startswith("--")]
    if twice := {option for option in options if options.count(option) > 1}:
        raise ValueError(f"got {' and '.join(sorted(twice))} twice, of which the first would be lost: put all values "
                         "behind one")
    command = tyro.extras.subcommand_cli_from_dict(
        {"prepare": Prepare, "show": show, "merge": merge, "shards": Shards}, prog="python -m moe_ext.data")
    if isinstance(command, Prepare):
        prepare(command)
    elif isinstance(command, Shards):
        shards(command)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {error.filename or 'reading or writing'}: {error.strerror or error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command continues")
