"""What is being written: one writer at a time, and under its final name only when it is whole."""
import errno
import fcntl
import os
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path


def lock(path: Path, mode: str, lockless=lambda error: None):
    """`path`, made if absent and open in `mode`, for this process alone; closing it, or the end of the process, lets it
    go. lockless: told the error of a file system that has no locks, on which nothing keeps others out. Errors:
    BlockingIOError if another process has it, and what opening it raises."""
    while True:
        file = open(path, mode)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                file.close()
                raise
            lockless(error)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        file.close()    # who had it has moved or removed it between the opening and the locking


def claim(path: Path):
    """An empty file open for writing, locked. Errors: ValueError if another process has it."""
    try:
        file = lock(path, "ab")
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"cannot write {path}: no folder {path.parent}; make it first") from None
    except BlockingIOError:
        raise ValueError(f"{path}: another process is writing it; wait until it ends, or choose another "
                         "target") from None
    file.truncate(0)
    return file


@contextmanager
def work_folder(out: Path, inputs: str):
    """OUT.partial for this process alone, to be filled with the parts of OUT; removed when the `with` ends well.

    Whatever ends it otherwise, the folder stays for the next run with the same `inputs`, which continues; a run with
    others starts clean. Errors: ValueError if another process is there, or the place cannot be written.
    """
    work = out.with_name(out.name + ".partial")
    if work.is_dir() and any(work.iterdir()) and not (work / "lock").is_file():
        raise ValueError(f"out: {work}, where {out} would be made, exists and was not made by this program: move it or "
                         "choose another place")
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out: cannot make {work}: {error.strerror}; choose another place") from None
    lock = claim(work / "lock")
    try:
        if (work / "replaced").exists() and not out.exists():   # a kill between the two renames of `replace`
            (work / "replaced").rename(out)
        kept = work / "inputs"
        if not kept.is_file() or kept.read_text() != inputs:
            clear(work)
            write_whole(kept, inputs)
        yield work
        clear(work)
        (work / "lock").unlink()
        work.rmdir()
    finally:
        lock.close()


def clear(work: Path) -> None:
    """Remove all but the lock; first of all that by which a half-removed folder would look like one to continue."""
    (work / "inputs").unlink(missing_ok=True)
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()


def write_whole(path: Path, text: str) -> None:
    """A file that is there with all its text or not at all."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        sync(file)
    partial.replace(path)


def sync(file) -> None:
    """What was written is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def replace(new: Path, out: Path) -> None:
    """Put a finished folder of the work folder in its place; a previous one goes only after that."""
    old = new.with_name("replaced")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    new.rename(out)
