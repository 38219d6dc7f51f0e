"""The files of a run's log: lines that wait for room on a full disk, metrics.jsonl, TensorBoard's events, progress.txt.
"""
import json
import os
from datetime import datetime
from pathlib import Path


class Lines:
    """A file of whole lines, appended to; a last line cut by a kill is dropped first.

    What the disk does not take waits in memory and goes before the next line. trouble: is told of an OSError.
    """

    def __init__(self, path: Path, trouble):
        self.path, self.trouble, self.waiting = path, trouble, b""
        if path.is_file():
            data = path.read_bytes()
            if not data.endswith(b"\n"):
                os.truncate(path, data.rfind(b"\n") + 1)
        self.file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def write(self, text: str) -> None:
        self.waiting += text.encode() + b"\n"
        try:
            while self.waiting:
                self.waiting = self.waiting[os.write(self.file, self.waiting):]
        except OSError as error:
            self.trouble(self.path, error)

    def close(self) -> None:
        os.close(self.file)


# ---- metrics.jsonl and TensorBoard -----------------------------------------------------------------------------------
def read_metrics(path: Path) -> tuple[list[dict], list[dict]]:
    """metrics.jsonl -> (step records, evaluation records of data.valid), each by rising step, the later line where one
    stands twice.

    A last line without its newline is one that is being written, and is left out.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: give the folder of a run, which holds metrics.jsonl")
    train, valid = {}, {}
    lines = path.read_text().split("\n")[:-1]
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            kind = valid if "unigram_entropy" in record else train if "loss" in record else {}      # other sets
            kind[record["step"]] = record
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{path}: line {number}: got {line[:60]!r}, wanted a JSON object with a step: delete the "
                             "line or plot another run") from None
    return tuple([records[step] for step in sorted(records)] for records in (train, valid))


def split_metrics(data: bytes, step: int) -> tuple[bytes, bytes]:
    """metrics.jsonl -> the lines up to `step`, and those beyond it. What is no record stays where it is."""
    parts = [], []
    for line in data.splitlines(keepends=True):
        try:
            parts[json.loads(line)["step"] > step].append(line)
        except (ValueError, TypeError, KeyError):
            parts[False].append(line)
    return b"".join(parts[False]), b"".join(parts[True])


def split_events(data: bytes, step: int) -> tuple[bytes, bytes]:
    """The same for a file of TensorBoard's events; each part that is not empty begins with the file's header.

    A record is a length (8 bytes, little endian), its checksum (4), an event, its checksum (4). In an event, the time
    (9 bytes) comes first and then, if it is not 0, the step: the byte 16 and a varint.
    """
    parts, at = ([], []), 0
    while at + 12 <= len(data) and (end := at + 16 + int.from_bytes(data[at:at + 8], "little")) <= len(data):
        event, number = data[at + 12:end - 4], 0
        if event[9:10] == b"\x10":
            for index, byte in enumerate(event[10:20]):
                number |= (byte & 127) << 7 * index
                if byte < 128:
                    break
        parts[number > step].append(data[at:end])
        at = end
    kept, beyond = parts
    return b"".join(kept), b"".join(kept[:1] + beyond if beyond else [])


# ---- progress.txt ----------------------------------------------------------------------------------------------------
class Progress:
    """RUN/progress.txt, in the layout of Megatron's --log-progress: a line for each start and each checkpoint, of all
    restarts, its fields between tabs:

        2026-01-31 12:00:00  Job ID: 17  # GPUs: 8  Saved checkpoint  Iteration: 500  Job throughput: 46.7 TFLOP/s/GPU
            Cumulative throughput: 45.9 TFLOP/s/GPU  Floating-point operations: 7.78e+16  Tokens (in billions): 0.07

    A start ("Starting job") says what it starts from. Job throughput is that since the start; the cumulative one since
    the first start with so many ranks in a row, the time between the restarts included. flops_per_token: Megatron's.
    """
    TIME = "%Y-%m-%d %H:%M:%S"

    def __init__(self, folder: Path, trouble, *, world: int, flops_per_token: float, clock=datetime.now):
        self.file = Lines(folder / "progress.txt", trouble)
        self.world, self.flops_per_token, self.clock = world, flops_per_token, clock

    def started(self, step: int, tokens: int) -> None:
        """Reads of the earlier starts when the first with so many ranks in a row was, and what had been done then."""
        self.at = self.clock(), tokens * self.flops_per_token
        self.first = None
        for line in self.file.path.read_text(errors="replace").splitlines():
            fields = dict(field.partition(": ")[::2] for field in line.split("\t"))
            try:
                if fields["# GPUs"] != str(self.world):
                    self.first = None
                elif "Starting job" in fields and self.first is None:
                    time = datetime.strptime(line.split("\t")[0], self.TIME)
                    self.first = time, float(fields["Floating-point operations"])
            except (KeyError, ValueError):
                continue            # not one of ours
        self.first = self.first or self.at
        self.write("Starting job", f"Iteration: {step}", *self.done(tokens))

    def saved(self, step: int, tokens: int) -> None:
        now, flops = self.clock(), tokens * self.flops_per_token

        def throughput(begin):
            rate = (flops - begin[1]) / max((now - begin[0]).total_seconds(), 1e-6) / 1e12 / self.world
            return f"{rate:{'.1f' if rate >= 1 else '.2g'}} TFLOP/s/GPU"

        self.write("Saved checkpoint", f"Iteration: {step}", f"Job throughput: {throughput(self.at)}",
                   f"Cumulative throughput: {throughput(self.first)}", *self.done(tokens))

    def done(self, tokens: int) -> list[str]:
        return [f"Floating-point operations: {tokens * self.flops_per_token:.2e}",
                f"Tokens (in billions): {tokens / 1e9:.{2 if tokens >= 1e9 else 6}f}"]

    def write(self, *fields: str) -> None:
        time, job = self.clock().strftime(self.TIME), os.environ.get("SLURM_JOB_ID", "")
        self.file.write("\t".join([time, f"Job ID: {job}", f"# GPUs: {self.world}", *fields]))
