"""`torchrun --standalone --nproc-per-node 2 -m moe_ext.check env`, and the others: see moe_ext.check."""

import sys

import tyro

from moe_ext import check
from moe_ext.check.all_to_all import AllToAll
from moe_ext.check.dmoe import Dmoe
from moe_ext.check.env import Env
from moe_ext.check.mesh import OneSentence
from moe_ext.check.optimizers import OneMuon, OneShampoo
from moe_ext.check.pdb import Pdb
from moe_ext.check.ulysses import Long
from moe_ext.check.world import World, WorldError
from moe_ext.config import ConfigError

COMMANDS = {"env": Env, "all-to-all": AllToAll, "mesh": OneSentence, "dmoe": Dmoe, "ulysses": Long,
            "shampoo": OneShampoo, "muon": OneMuon, "pdb": Pdb}


def main() -> None:
    try:
        command = tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="python -m moe_ext.check",
                                                       description=check.__doc__)
        world = World.from_environment(device=command.device, seconds=command.seconds)
        fine = command.run(world)
        world.leave()
    except (ConfigError, OSError, WorldError) as error:
        sys.exit(f"error: {error}")
    sys.exit(not fine)


if __name__ == "__main__":
    main()
