"""`python -m moe_ext.data prepare --out DIR` and `python -m moe_ext.data show DIR`."""
import sys
from pathlib import Path

import tyro

from moe_ext.data.indexed import IndexedDataset
from moe_ext.data.prepare import Prepare, prepare, read_meta


def show(folder: tyro.conf.Positional[Path]) -> None:
    """Check a data folder and print what it holds.

    Args:
        folder: written by `prepare`
    """
    from tokenizers import Tokenizer
    meta = read_meta(folder)
    tokenizer = Tokenizer.from_file(str(folder / meta["tokenizer"]))
    for side in ("train", "valid"):
        dataset = IndexedDataset(folder / side)
        print(f"{side}: {len(dataset):,} documents, {len(dataset.tokens):,} tokens of {meta['vocab_size']:,}, "
              f"{meta[side]['bytes'] / len(dataset.tokens):.2f} bytes a token, unigram entropy "
              f"{meta[side]['unigram_entropy_nats']:.3f} nats")
        print(f"    begins {tokenizer.decode(dataset[0][:24].tolist())!r}")


def main() -> None:
    command = tyro.extras.subcommand_cli_from_dict({"prepare": Prepare, "show": show}, prog="python -m moe_ext.data")
    if isinstance(command, Prepare):
        prepare(command)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
