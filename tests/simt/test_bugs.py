"""Each mistake of bugs.py, planted in a copy of cuda/, makes the check that it names fail; without it they all pass.

All the work is done by one process, this file as a program: it imports torch once, and forks for every check.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from bugs import BUGS
from harness import ROOT, library, make

PASSED, FAILED = 0, 1  # pytest's exit codes; that of a process that a signal ended is negative
AT_A_TIME = 2


def conditions(bug):
    return bug.variant, bug.schedule, bug.timing, bug.sm, bug.check


CONTROLS = sorted({conditions(bug): i for i, bug in enumerate(BUGS)}.values())  # one bug of each check


# ---- the program: test_bugs.py FOLDER JOB.., a job being planted-I or control-I of BUGS[I] ---------------------------
def plant(bug, folder):
    """A library with the mistake, of whose sources only the one that has it, or is first to include it, is compiled."""
    shutil.copytree(ROOT / "cuda", folder / "cuda")
    (folder / "csrc").symlink_to(ROOT / "csrc")
    source = folder / bug.file
    text = source.read_text()
    assert text.count(bug.old) == 1, f"{bug.file} has the text {text.count(bug.old)} times: {bug.old!r}"
    source.write_text(text.replace(bug.old, bug.new))
    of_header = source.stem.split("_")[0]  # gemm.cu of gemm_tile.cuh
    unit = bug.unit or (source.stem if source.suffix == ".cu" else of_header)
    compiler = shlex.split(make("print-compiler", bug.variant))
    command = [*compiler, "-O0", "-g0", "-w", "-x", "c++", "-c", folder / f"cuda/{unit}.cu", "-o", folder / "bug.o"]
    subprocess.run(command, cwd=ROOT, check=True)
    objects = library(bug.variant).parent
    parts = [path for path in objects.glob("*.o") if path.stem != unit]
    parts += [path for path in (objects / "harness").glob("*.o") if not path.stem.startswith("toy")]
    # What other sources instantiate too is taken from the first object.
    command = [compiler[0], "-shared", "-o", folder / "bug.so", folder / "bug.o", *parts, "-lpthread", "-ldl"]
    subprocess.run(command, check=True)
    return folder / "bug.so"


def work(job):
    kind, i = job.split("-")
    bug = BUGS[int(i)]
    os.environ.update(SIMT_SCHEDULE=bug.schedule, SIMT_ASYNC=bug.timing, SIMT_SM=str(bug.sm), SIMT_PATIENCE="2")
    with tempfile.TemporaryDirectory() as folder:
        path = plant(bug, Path(folder)) if kind == "planted" else library(bug.variant)
        return pytest.main(["-qx", "-p", "no:cacheprovider", f"--simt={path}", *shlex.split(bug.check)])


def fork(job, log):
    child = os.fork()
    if child == 0:
        code = 100
        try:
            signal.alarm(100)
            for stream in (1, 2):
                os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
            code = work(job)
        except BaseException as error:
            print(error, flush=True)
        finally:
            sys.stdout.flush()
            os._exit(code)
    return child


def main(folder, *jobs):
    """Leaves what job J printed in FOLDER/J, and all exit codes in FOLDER/codes."""
    import hypothesis  # noqa: F401
    import torch

    import moe_ext  # noqa: F401

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # as conftest.py does; the first call imports a lot
    os.chdir(ROOT)
    running, codes = {}, {}
    for job in [*jobs, *[None] * AT_A_TIME]:
        if len(running) == AT_A_TIME or (running and not job):
            child, status = os.wait()
            codes[running.pop(child)] = os.waitstatus_to_exitcode(status)
        if job:
            running[fork(job, f"{folder}/{job}")] = job
    Path(folder, "codes").write_text(json.dumps(codes))


# ---- the tests -------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def results(request, tmp_path_factory):
    """job -> its exit code and what it printed, for those that a test asks for."""
    for variant in sorted({bug.variant for bug in BUGS}):
        library(variant)
    folder = tmp_path_factory.mktemp("bugs")
    params = [getattr(getattr(item, "callspec", None), "params", {}) for item in request.session.items]
    jobs = [param["job"] for param in params if "job" in param]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
    subprocess.run([sys.executable, __file__, folder, *jobs], env=environment, check=True)
    codes = json.loads((folder / "codes").read_text())
    return {job: (codes[job], (folder / job).read_text()) for job in jobs}


def _name(job):
    return f"{BUGS[int(job.split('-')[1])].file.split('/')[1]}-{job.split('-')[1]}"


@pytest.mark.parametrize("job", [f"planted-{i}" for i in range(len(BUGS))], ids=_name)
def test_a_planted_bug_is_found(job, results):
    code, log = results[job]
    found = (code == FAILED and "\nFAILED " in log) or (code < 0 and code != -signal.SIGALRM)
    assert found, f"{BUGS[int(job.split('-')[1])].why}: not found ({code})\n{log}"


@pytest.mark.parametrize("job", [f"control-{i}" for i in CONTROLS], ids=_name)
def test_without_the_bug_its_check_passes(job, results):
    code, log = results[job]
    assert code == PASSED, f"{BUGS[int(job.split('-')[1])].check}\n{log}"


def test_there_are_enough():
    files = {path.name for path in (ROOT / "cuda").glob("*.cu")} - {"cublas.cu"}  # which has no kernel
    assert len(BUGS) >= 30 and {bug.file for bug in BUGS} >= {f"cuda/{name}" for name in files}


if __name__ == "__main__":
    main(*sys.argv[1:])
