"""Builds moe_ext/_C.abi3.so: the C core, the CPython module and the torch ops in one binary.

    pip install -e .                          also with --no-build-isolation
    python setup.py -q build_ext --inplace    what `make build` types: recompiles only what changed

gcc compiles csrc/*.c, g++ csrc/*.cpp, nvcc cuda/*.cu where there is such a folder. One binary serves Python >=
3.10 and torch >= 2.11, because it uses only their stable ABIs. torch is found, never imported and never installed from
here: a build that fetches torch by itself fetches the wrong one.

Environment
    CC, CXX, NVCC, MAX_JOBS      compilers and parallel jobs
    MOE_CUDA=auto|0|1            build cuda/ if nvcc is found | never | or stop
    MOE_SANITIZE=address|thread  build into build/<name>/ beside the normal build (see `make sanitize`)
    MOE_LOWERED=1                build into build/lowered/, for tests on a CPU that has only AVX2: every wider set of
                                 kernels is compiled for AVX2, which gives their bits, slowly (see `make test-lowered`)
    MOE_WERROR=0                 a warning, which another compiler than CI's may have, does not stop the build
"""

import contextlib
import fcntl
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

os.chdir(Path(__file__).resolve().parent)
MIN_TORCH = (2, 11)
SANITIZE = os.environ.get("MOE_SANITIZE", "")
JOBS = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
LOWERED = os.environ.get("MOE_LOWERED") == "1"
BESIDE = SANITIZE or "lowered" * LOWERED  # the name of a build beside the normal one
BUILD = Path("build", BESIDE or "release")

WERROR, NVCC_WERROR = ("", "") if os.environ.get("MOE_WERROR") == "0" else ("-Werror", "-Werror all-warnings")

C_FLAGS = (
    f"-std=c11 -O3 -Wall -Wextra {WERROR} -Wpedantic -fPIC -fvisibility=hidden -D_GNU_SOURCE -ffp-contract=off "
    "-fno-math-errno"  # sqrt is one instruction then, and vectorises
)
CXX_FLAGS = (
    f"-std=c++20 -O2 -Wall -Wextra {WERROR} -fPIC -fvisibility=hidden -DTORCH_TARGET_VERSION=0x020b000000000000"
)
AVX2 = "-mavx2 -mfma -mf16c"
AVX512 = f"{AVX2} -mavx512f -mavx512bw -mavx512vl -mavx512dq"
ISA_FLAGS = {  # files compiled once per instruction set; isa.c picks one when the module is loaded
    "isa_avx2": AVX2,
    "isa_avx512": AVX512,
    "isa_avx512bf16": f"{AVX512} -mavx512bf16",
    "isa_amx": f"{AVX512} -mavx512bf16 -mamx-tile -mamx-bf16",
}
LOWERED_FLAGS = {"isa": "-DMOE_LOWERED"}  # what is compiled anew in build/lowered/
LOWERED_FLAGS |= {isa: f"{AVX2} -O1 -ftree-vectorize -Wno-psabi" for isa in ISA_FLAGS if isa != "isa_avx2"}
if LOWERED:
    ISA_FLAGS |= LOWERED_FLAGS
# Hopper files (*_sm90.cu) use instructions that exist only there; the others carry PTX for newer devices.
NVCC_FLAGS = (
    f"-std=c++20 -O3 --fmad=false {NVCC_WERROR} -Xcompiler -fPIC,-fvisibility=hidden -lineinfo "
    "--compress-mode=size -Xptxas -v"
)
HOPPER = "-gencode arch=compute_90a,code=sm_90a"
COMMON = f"-gencode arch=compute_80,code=[compute_80,sm_80] {HOPPER}"
SANITIZE_FLAGS = {
    "": "",
    "address": "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g -O1",
    "thread": "-fsanitize=thread -fno-omit-frame-pointer -g -O1",
}[SANITIZE]


def torch_folder() -> Path:
    """Folder of the installed torch, also from inside pip's isolated build, where it cannot be imported."""
    spec = importlib.util.find_spec("torch")
    folders = [Path(f) for f in spec.submodule_search_locations] if spec else []
    folders += [Path(sysconfig.get_path("purelib"), "torch")]
    folder = next((f for f in folders if (f / "version.py").is_file()), None)
    if folder is None:
        sys.exit(
            f"\nmoe_ext needs PyTorch >= {MIN_TORCH[0]}.{MIN_TORCH[1]} in {sys.prefix}, and finds none. Type\n"
            "    pip install torch      (without a GPU: choose the CPU build on pytorch.org)\n"
            "    pip install -e .\n"
        )
    version = re.search(r"__version__ = '((\d+)\.(\d+)[^']*)'", (folder / "version.py").read_text())
    if (int(version[2]), int(version[3])) < MIN_TORCH:
        sys.exit(f"\nmoe_ext needs PyTorch >= {MIN_TORCH[0]}.{MIN_TORCH[1]}, but {folder} is {version[1]}. Type\n"
                 "    pip install --upgrade torch\n")
    return folder


TORCH = torch_folder()


@contextlib.contextmanager
def build_lock():
    """One build at a time in this folder: a second one waits, then finds its work done."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with open("build/lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def stale(command: list[str], target: Path, inputs: list[Path]) -> bool:
    """Whether target must be made again: it is missing, or its command or a file that it read has changed."""
    made_by = target.with_suffix(target.suffix + ".cmd")
    if not target.exists() or not made_by.exists() or made_by.read_text() != shlex.join(command):
        return True
    depfile = target.with_suffix(".d")
    if depfile.exists():
        inputs = inputs + [Path(f) for f in depfile.read_text().replace("\\\n", " ").split(": ", 1)[1].split()]
    return any(not f.exists() or f.stat().st_mtime_ns > target.stat().st_mtime_ns for f in inputs)


def make(command: list[str], target: Path, inputs: list[Path]) -> None:
    """Runs command, which writes target, if target is stale."""
    if not stale(command, target, inputs):
        return
    print(target, flush=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    verbose = "-Xptxas" in command  # what ptxas says of each kernel goes to a file beside the object
    done = subprocess.run(command, stderr=subprocess.PIPE if verbose else None, text=True)
    if verbose:
        target.with_suffix(".ptxas").write_text(done.stderr)
    if done.returncode:
        sys.exit(f"{done.stderr or ''}\nmoe_ext: this command failed:\n    {shlex.join(command)}")
    target.with_suffix(target.suffix + ".cmd").write_text(shlex.join(command))


def write_ptxas(objects: list[Path]) -> None:
    """BUILD/cuda/ptxas.json: file, kernel, arch, registers, bytes of stack and of spills of every kernel."""
    kernels = []
    for file in objects:
        text = file.with_suffix(".ptxas").read_text()
        for part in text.split("Compiling entry function '")[1:]:
            name, arch = re.match(r"(\w+)' for '(\w+)'", part).groups()
            stack, *spills = map(int, re.search(r"(\d+) bytes stack frame, (\d+) .* stores, (\d+) ", part).groups())
            registers = int(re.search(r"Used (\d+) registers", part)[1])
            kernels.append(dict(file=file.stem + ".cu", kernel=name, arch=arch, registers=registers, stack=stack,
                                spilled=sum(spills)))
    if demangle := shutil.which("c++filt"):
        names = "\n".join(k["kernel"] for k in kernels)
        names = subprocess.run([demangle], input=names, capture_output=True, text=True).stdout.splitlines()
        for kernel, name in zip(kernels, names, strict=True):
            kernel["kernel"] = name
    kernels.sort(key=lambda k: (k["file"], k["kernel"], k["arch"]))
    Path(BUILD, "cuda", "ptxas.json").write_text("[\n" + ",\n".join(map(json.dumps, kernels)) + "\n]\n")


def compile_command(source: Path) -> list[str]:
    """The command that compiles one source into BUILD/<source>.o and writes the .d file of what it included. A lowered
    build shares the release's objects where the flags are the same."""
    build = Path("build/release") if LOWERED and source.stem not in LOWERED_FLAGS else BUILD
    target = build / source.with_suffix(".o")
    if source.suffix == ".c":
        compiler, flags = os.environ.get("CC", "gcc"), f"{C_FLAGS} {ISA_FLAGS.get(source.stem, '')} {SANITIZE_FLAGS}"
        if source.stem == "module":
            flags += f" -isystem {shlex.quote(sysconfig.get_path('include'))}"
    elif source.suffix == ".cpp":
        compiler, flags = os.environ.get("CXX", "g++"), f"{CXX_FLAGS} {SANITIZE_FLAGS}"
        flags += f" -isystem {shlex.quote(str(TORCH / 'include'))}"
    else:
        compiler, flags = nvcc(), f"{NVCC_FLAGS} {HOPPER if source.stem.endswith('_sm90') else COMMON}"
    depfile = ["-MD" if source.suffix == ".cu" else "-MMD", "-MF", str(target.with_suffix(".d"))]
    return [*shlex.split(compiler), *shlex.split(flags), *depfile, "-c", str(source), "-o", str(target)]


def nvcc() -> str | None:
    """nvcc from $NVCC, $CUDA_HOME, PATH or its usual folder; None if it is not wanted or not there."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = os.environ.get("NVCC") or shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    wanted = os.environ.get("MOE_CUDA", "auto")
    if wanted == "1" and not found:
        sys.exit("moe_ext: MOE_CUDA=1, but there is no nvcc. Set CUDA_HOME to the CUDA toolkit, or MOE_CUDA=0.")
    return None if wanted == "0" or BESIDE else found


def binaries() -> dict[str, tuple[list[Path], list[str]]]:
    """For each shared library: its sources and the command that links it, less the objects."""
    sources = [*sorted(Path("csrc").glob("*.c")), *sorted(Path("csrc").glob("*.cpp"))]
    if platform.machine() not in ("x86_64", "AMD64"):
        sources = [s for s in sources if s.stem not in ISA_FLAGS]
    # No run path: `import moe_ext` imports torch first, so its libraries are already in the process.
    link = [*shlex.split(os.environ.get("CXX", "g++")), "-shared", *shlex.split(SANITIZE_FLAGS)]
    link += ["-Wl,--exclude-libs,ALL", f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10", "-lm", "-ldl"]
    result = {"moe_ext._C": (sources, link)}
    if cuda := sorted(Path("cuda").glob("*.cu")) if nvcc() else []:
        link = [nvcc(), "-shared", "-cudart", "static", "-Xlinker", "-z,defs", "-Xlinker", "--exclude-libs,ALL", "-ldl",
                "-Xlinker", "--version-script=cuda/exports.map"]
        result["moe_ext.libmoe_cuda"] = (cuda, link)
    return result


class Build(build_ext):
    """setuptools' build_ext with the steps above in place of its compiler, and objects kept in build/."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + (".abi3.so" if fullname.endswith("._C") else ".so")

    def run(self) -> None:
        inplace = self.inplace or getattr(self, "editable_mode", False)
        package_root = BUILD if BESIDE else Path("." if inplace else self.build_lib)
        with build_lock(), ThreadPoolExecutor(JOBS) as pool:
            for name, (sources, link) in binaries().items():
                commands = [compile_command(source) for source in sources]
                list(pool.map(lambda c: make(c, Path(c[-1]), []), commands))
                objects = [Path(c[-1]) for c in commands]
                library = BUILD / Path(self.get_ext_filename(name)).name
                make([*link[:2], *map(str, objects), *link[2:], "-o", str(library)], library, objects)
                if LOWERED:  # beside its own, for the C tests
                    for shared in objects:
                        place(shared, BUILD / "csrc" / shared.name)
                place(library, package_root / self.get_ext_filename(name))
                if name.endswith("cuda"):
                    write_ptxas(objects)
            if "moe_ext.libmoe_cuda" not in binaries():  # never an older one beside a new extension
                Path(package_root, "moe_ext", "libmoe_cuda.so").unlink(missing_ok=True)
            if not BESIDE:
                write_compile_commands()


def place(library: Path, target: Path) -> None:
    """Copies by renaming, so that a process that has the old library loaded keeps it whole."""
    if target.exists() and target.stat().st_mtime_ns >= library.stat().st_mtime_ns:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(".tmp")
    shutil.copy(library, temporary)
    os.replace(temporary, target)


def write_compile_commands() -> None:
    """compile_commands.json for editors."""
    commands = [compile_command(source) for sources, _ in binaries().values() for source in sources]
    entries = [{"directory": os.getcwd(), "file": c[-3], "arguments": c} for c in commands]
    Path("compile_commands.json").write_text(json.dumps(entries, indent=1))


setup(
    ext_modules=[Extension(name, [str(s) for s in sources], py_limited_api=True)
                 for name, (sources, _) in binaries().items()],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
