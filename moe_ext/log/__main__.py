"""`python -m moe_ext.log plot RUN .. [-o out.png] [--by step|tokens|time]`, `python -m moe_ext.log slow RUN`"""
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from moe_ext.log.draw import plot
from moe_ext.log.slow import slow


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

    def name_slow(trace: tyro.conf.Positional[Path], /) -> None:
        """Name the rank or link that holds a pipeline up.

        Args:
            trace: trace.json of a run with pipeline.trace, or the run folder that holds it
        """
        print(slow(trace))

    tyro.extras.subcommand_cli_from_dict({"plot": command, "slow": name_slow}, prog="python -m moe_ext.log")


if __name__ == "__main__":
    try:
        main()
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")
