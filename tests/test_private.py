"""moe_ext/private.py names every private name of torch that the package's source uses, and what lacks one says so."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import moe_ext
from moe_ext import private

PACKAGE = Path(moe_ext.__file__).parent
PARAMETER = nn.Parameter(torch.zeros(1))
OBJECTS = [PARAMETER, nn.Linear(1, 1), torch.optim.AdamW([PARAMETER]), torch.ops.aten.add.Tensor, DTensor, DeviceMesh,
           FSDPModule]  # fmt: skip
LISTED = {name for names in private.NAMES.values() for name in names}


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


THEIRS = {name for thing in OBJECTS for name in dir(thing) if is_private(name)}  # what an attribute of theirs is called


def used(source):
    """The private names of torch in a module's source: whole paths, and "._name" for one of an object's."""
    tree, modules, found = ast.parse(source), {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {a.asname or a.name.partition(".")[0]: a.name if a.asname else a.name.partition(".")[0]
                        for a in node.names}  # fmt: skip
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
            found |= {f"{node.module}.{a.name}" for a in node.names}

    def path(node):
        if isinstance(node, ast.Attribute):
            return (base := path(node.value)) and f"{base}.{node.attr}"
        return modules.get(node.id) if isinstance(node, ast.Name) else None

    inner = {node.value for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            if (whole := path(node)) is None and node.attr in THEIRS:
                found.add(f".{node.attr}")
            elif whole and node not in inner:
                found.add(whole)
    return {name for name in found if name.startswith((".", "torch.")) and any(map(is_private, name.split(".")))}


def test_every_private_name_in_the_source_is_listed_and_no_other():
    names = {name for file in PACKAGE.rglob("*.py") for name in used(file.read_text())}
    listed = LISTED - {"torch._dynamo"}  # which require() itself imports
    assert names == {name if name in names else f".{name.rpartition('.')[2]}" for name in listed}


@pytest.mark.parametrize("source, names", [
    ("import torch.distributed._tools", {"torch.distributed._tools"}),
    ("from torch.distributed.tensor._utils import box", {"torch.distributed.tensor._utils.box"}),
    ("from torch import _foreach_mul_ as f", {"torch._foreach_mul_"}),
    ("import torch.distributed as dist\ndist.c10d._x.y(1)", {"torch.distributed.c10d._x.y"}),
    ("from torch import nn\nnn.functional._pad(x)", {"torch.nn.functional._pad"}),
    ("import torch\ntorch._C.Key.z", {"torch._C.Key.z"}),
    ("for name, p in layer._parameters.items(): p._local_tensor", {"._parameters", "._local_tensor"}),
    ("import torch, os\ntorch.ops.moe_ext.x(self._mine)\nos._exit(torch.__version__)", set()),
])  # fmt: skip
def test_the_search_finds(source, names):
    assert used(source) == names


def test_this_torch_has_all_of_them():
    for user in private.NAMES:
        private.require(user)


def test_a_torch_without_one_is_told_so_at_import():
    program = "import torch; del torch._C._any_requires_grad; import moe_ext"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == (
        f"ImportError: moe_ext.ops needs torch._C._any_requires_grad, which torch {torch.__version__} does not have. "
        f"moe_ext was tried with torch {private.TRIED}: install one of them, or a newer moe_ext")  # fmt: skip
