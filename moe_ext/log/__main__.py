"""`python -m moe_ext.log plot RUN .. [-o out.png] [--by step|tokens|time]`"""
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from moe_ext.log.draw import plot


def main() -> None:
    def command(runs: tyro.conf.Positional[list[Path]], /,
                out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None,
                by: Literal["step", "tokens", "time"] | None = None) -> None:
        """Draw losses and expert load of a run, or of several beside each other.

        Args:
            runs: run folders, which hold metrics.jsonl
            out: image to write; if not given RUN/plot.png, of several runs comparison.png here
            by: what the losses stand over; if not given the step, of several runs each of the three
        """
        print(plot(runs, out, by))

    tyro.extras.subcommand_cli_from_dict({"plot": command}, prog="python -m moe_ext.log")


if __name__ == "__main__":
    try:
        main()
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")
