"""Ranks that stop in the debugger take turns at one terminal: a pseudo-terminal, whose keyboard is the test's."""

import os
import pty
import re
import select
import signal
import sys
import termios
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import fork

from moe_ext.parallel.pdb import set_trace


class Keyboard:
    """Two forked ranks on a pseudo-terminal; body(rank) runs in each. ask() returns what they wrote up to the next
    prompt, and its rank."""

    def __init__(self, body, as_standard_input=True):
        self.master, self.slave = pty.openpty()
        settings = termios.tcgetattr(self.slave)
        settings[3] &= ~termios.ECHO
        termios.tcsetattr(self.slave, termios.TCSANOW, settings)
        self.pids = [self.fork(rank, body, as_standard_input) for rank in range(2)]

    def fork(self, rank, body, as_standard_input):
        pid = fork()
        if pid == 0:
            status = 1
            try:
                signal.alarm(60)
                os.environ["RANK"] = str(rank)
                os.setsid()     # as torchrun does: no controlling terminal
                os.dup2(self.slave if as_standard_input else os.open(os.devnull, os.O_RDWR), 0)
                os.close(self.slave)
                torch.set_num_threads(1)
                body(rank)
                status = 0
            except BaseException:
                traceback.print_exc(file=sys.__stderr__)
            finally:
                os._exit(status)
        return pid

    def ask(self):
        text = ""
        while not (prompt := re.search(r"\(rank (\d)\) $", text)):
            assert select.select([self.master], [], [], 60)[0], f"no prompt after {text!r}"
            text += os.read(self.master, 4096).decode()
        return text[:prompt.start()], int(prompt[1])

    def type(self, line):
        os.write(self.master, f"{line}\n".encode())

    def statuses(self):
        return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in self.pids]


def sleeps(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"


def test_each_rank_is_asked_in_its_turn():
    read, write = os.pipe()

    def body(rank):
        secret = 40 + rank
        os.write(write, b"!")
        set_trace()
        assert secret == 50 + rank

    keyboard = Keyboard(body)
    here = b""
    while len(here) < 2 or not all(map(sleeps, keyboard.pids)):     # one in its prompt, one until it is asked
        here += os.read(read, 2) if len(here) < 2 else b""
    asked = []
    for _ in range(2):
        text, rank = keyboard.ask()
        assert text.count("-> assert secret == 50 + rank") == 1
        for line, answer in (("p secret", f"{40 + rank}\r\n"), ("secret += 10", ""), ("p secret", f"{50 + rank}\r\n")):
            keyboard.type(line)
            assert keyboard.ask() == (answer, rank)     # the other one is silent until this one goes on
        keyboard.type("c")
        asked.append(rank)
    assert sorted(asked) == [0, 1]
    assert keyboard.statuses() == [0, 0]


def test_ranks_meet_in_a_collective_under_next(tmp_path):
    def body(rank):
        dist.init_process_group("gloo", store=dist.FileStore(f"{tmp_path}/store", 2), rank=rank, world_size=2)
        total = torch.ones(1)
        set_trace()
        dist.all_reduce(total)
        assert total == 2

    keyboard = Keyboard(body)
    for turn in ("first", "second"):
        ranks = set()
        for _ in range(2):
            text, rank = keyboard.ask()
            assert ("-> dist.all_reduce(total)" if turn == "first" else "-> assert total == 2") in text
            ranks.add(rank)
            keyboard.type("n" if turn == "first" else "c")
        assert ranks == {0, 1}
    assert keyboard.statuses() == [0, 0]


def test_only_the_rank_asked_for_stops():
    def body(rank):
        set_trace(rank=1)
        set_trace(rank=7)

    keyboard = Keyboard(body)
    assert keyboard.ask()[1] == 1
    keyboard.type("c")
    assert keyboard.statuses() == [0, 0]


def test_a_rank_that_dies_at_its_prompt_lets_go_and_quit_ends_a_rank():
    def body(rank):
        set_trace()
        raise AssertionError("went on")

    keyboard = Keyboard(body)
    _, first = keyboard.ask()
    os.kill(keyboard.pids[first], signal.SIGKILL)
    _, second = keyboard.ask()
    assert {first, second} == {0, 1}
    keyboard.type("q")
    statuses = keyboard.statuses()
    assert statuses[first] == -signal.SIGKILL and statuses[second] == 1


def test_without_a_terminal_it_says_so():
    def body(rank):
        with pytest.raises(OSError, match=r"found no terminal .* start the ranks from a terminal"):
            set_trace()

    assert Keyboard(body, as_standard_input=False).statuses() == [0, 0]
