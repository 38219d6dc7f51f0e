"""Each mistake of bugs.py, planted in a copy of cuda/, makes the check that it names fail; without it they all pass."""

import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from bugs import BUGS
from harness import ROOT, library, make

PASSED, FAILED = 0, 1  # pytest's exit codes; a process that a signal ended has a negative one
WORKERS = ThreadPoolExecutor(2)


def check(path, bug):
    environment = os.environ | {"SIMT_SCHEDULE": bug.schedule, "SIMT_ASYNC": bug.timing, "SIMT_PATIENCE": "2"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-qx",
        "-p",
        "no:cacheprovider",
        f"--simt={path}",
        *shlex.split(bug.check),
    ]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)


def plant(bug, folder):
    """A library with the mistake: of the copied sources only those that contain it are compiled again."""
    shutil.copytree(ROOT / "cuda", folder / "cuda")
    (folder / "csrc").symlink_to(ROOT / "csrc")
    source = folder / bug.file
    text = source.read_text()
    assert text.count(bug.old) == 1, f"{bug.file} has the text {text.count(bug.old)} times: {bug.old!r}"
    source.write_text(text.replace(bug.old, bug.new))
    objects = {path.stem: path for path in library(bug.variant).parent.glob("*.o")}
    compiler = shlex.split(make("print-compiler", bug.variant))
    for name, path in list(objects.items()):
        if source.name not in (path.with_suffix(".d").read_text()).replace("/", " ").split():
            continue
        objects[name] = folder / f"{name}.o"
        subprocess.run([*compiler, "-O1", "-w", "-x", "c++", "-c", folder / "cuda" / f"{name}.cu", "-o", objects[name]],
                       cwd=ROOT, check=True)  # fmt: skip
    harness = (library(bug.variant).parent / "harness").glob("*.o")
    parts = [*objects.values(), *(path for path in harness if path.stem != "toy")]
    subprocess.run([*compiler[:1], "-shared", "-o", folder / "bug.so", *parts, "-lpthread", "-ldl"], check=True)
    return folder / "bug.so"


@pytest.fixture(scope="module")
def results(request, tmp_path_factory):
    """What came of every mistake whose test was asked for; two are at work at a time."""
    for variant in ("plain", "race"):
        library(variant)
    asked = {item.callspec.params["i"] for item in request.session.items if item.fspath == request.fspath and
             "i" in getattr(getattr(item, "callspec", None), "params", {})}  # fmt: skip

    def work(i):
        folder = tmp_path_factory.mktemp(f"bug{i}")
        try:
            return check(plant(BUGS[i], folder), BUGS[i])
        finally:
            shutil.rmtree(folder)

    return {i: WORKERS.submit(work, i) for i in sorted(asked)}


def _name(i):
    return f"{BUGS[i].file.split('/')[1]}-{i}"


@pytest.mark.parametrize("i", range(len(BUGS)), ids=_name)
def test_a_planted_bug_is_found(i, results):
    done = results[i].result()
    assert done.returncode == FAILED or done.returncode < 0, f"{BUGS[i].why}: not found\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize("test", sorted({(bug.variant, bug.schedule, bug.timing, bug.check) for bug in BUGS}), ids=str)
def test_without_the_bug_its_check_passes(test):
    bug = next(bug for bug in BUGS if (bug.variant, bug.schedule, bug.timing, bug.check) == test)
    done = check(library(bug.variant), bug)
    assert done.returncode == PASSED, done.stdout + done.stderr


def test_there_are_enough():
    assert len(BUGS) >= 30 and {bug.file for bug in BUGS} >= {f"cuda/{f}.cu" for f in ("index", "permute", "expert")}
