"""`python -m moe_ext.hf import | export | compare`."""
import sys
from pathlib import Path
from typing import Literal

import tyro

from moe_ext.hf import compare, convert


def import_(folder: tyro.conf.Positional[Path], out: Path, seq_len: int = 0) -> None:
    """A run folder from a folder of Hugging Face transformers.

    Args:
        folder: of save_pretrained, or of a download from the hub: config.json, safetensors, tokenizer
        out: the run folder to be made
        seq_len: tokens of the run's sequences; 0: max_position_embeddings, but at most 4096
    """
    print(convert.import_(folder, out, seq_len=seq_len))


def export(run: tyro.conf.Positional[Path], out: Path,
           dtype: Literal["", "bf16", "fp16", "fp32", "fp64", "as-imported"] = "",
           layout: Literal["", "experts", "fused"] = "", max_shard_size: str = "5GB", family: str = "",
           like: Path | None = None) -> None:
    """A folder for from_pretrained of transformers from a run.

    Args:
        run: a run folder, whose newest checkpoint counts, or a checkpoint; of any mesh
        out: the folder to be made
        dtype: of the weights; "": as each was when imported, or for a run of your own as it has them
        layout: experts as tensors of their own, or all of a layer in one; "": as imported, or the usual one
        max_shard_size: of a file, as in 5GB
        family: the architecture, as qwen3_moe; "": as imported, or the first that can say the model
        like: the folder or run that the model came from, if the run does not know it
    """
    print(convert.export(run, out, dtype=dtype, layout=layout, max_shard_size=max_shard_size, family=family, like=like))


def compare_(run: tyro.conf.Positional[Path], folder: tyro.conf.Positional[Path], tokens: int = 0,
             dtype: Literal["fp64", "fp32"] = "fp64", tolerance: float = 0.0) -> None:
    """Whether a run and a folder of transformers are the same model: tensors, logits and loss of random tokens. Exit
    status 1 if not.

    Args:
        run: a run folder, or a checkpoint
        folder: of transformers
        tokens: of the sequence that both see; 0: 128, or model.seq_len if that is less
        dtype: in which both compute, one after the other; memory for one model in it is needed
        tolerance: of logits and loss, relative, whatever tensors differ; 0: 1e-12 in fp64, 1e-4 in fp32
    """
    said, same = compare.compare(run, folder, tokens=tokens, dtype=dtype, tolerance=tolerance)
    print(said)
    if not same:
        sys.exit(1)


def main() -> None:
    try:
        tyro.extras.subcommand_cli_from_dict({"import": import_, "export": export, "compare": compare_},
                                             prog="python -m moe_ext.hf")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
