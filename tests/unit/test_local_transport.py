"""The local transport with real processes: the same promises as over SSH."""

from __future__ import annotations

import hashlib
import random
import sys
import time
from collections.abc import Iterator

import pytest

from edgevit.errors import DeviceError, LostLink
from edgevit.transport.local import LocalTransport


@pytest.fixture
def transport() -> Iterator[LocalTransport]:
    one = LocalTransport()
    yield one
    one.close()
    one.close()


def python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


def test_bytes_arrive_whole_and_the_exit_status_comes_back(transport: LocalTransport) -> None:
    data = random.Random(3).randbytes(5_000_001)
    channel = transport.open(
        python("import hashlib,sys;print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest());sys.exit(7)")
    )
    channel.write(data)
    channel.close_input()
    channel.close_input()
    assert channel.read_line(20).decode() == hashlib.sha256(data).hexdigest()
    assert channel.read_line(20) == b""
    assert channel.wait(10) == 7


def test_floods_on_both_streams_while_we_write_block_nothing(transport: LocalTransport) -> None:
    channel = transport.open(
        python(
            "import sys\nfor i in range(200): print('y'*99999); sys.stderr.write('e'*99999)\n"
            "sys.stdout.flush();sys.stderr.write('the end');print(len(sys.stdin.buffer.read()))"
        )
    )
    channel.write(b"z" * 3_000_000)
    channel.close_input()
    assert [channel.read_line(20) for _ in range(201)][-1] == b"3000000"
    assert channel.wait(10) == 0
    assert channel.error_text().endswith("the end")


def test_a_last_line_without_newline_is_a_line(transport: LocalTransport) -> None:
    channel = transport.open(python("print('a\\n\\nb', end='')"))
    assert [channel.read_line(10) for _ in range(4)] == [b"a", b"", b"b", b""]


def test_a_killed_program_is_a_lost_link_that_names_the_signal(transport: LocalTransport) -> None:
    channel = transport.open(python("import os;os.kill(os.getpid(),9)"))
    with pytest.raises(LostLink, match="SIGKILL"):
        channel.wait(10)


def test_silence_is_a_lost_link_and_closing_ends_the_program(transport: LocalTransport) -> None:
    channel = transport.open(["sleep", "600"])
    started = time.monotonic()
    with pytest.raises(LostLink, match="said nothing"):
        channel.read_line(0.3)
    with pytest.raises(LostLink, match="did not end"):
        channel.wait(0.2)
    channel.close()
    channel.close()
    assert time.monotonic() - started < 5


def test_writing_to_a_program_that_ended_is_a_lost_link(transport: LocalTransport) -> None:
    channel = transport.open(["true"])
    channel.wait(10)
    with pytest.raises(LostLink):
        channel.write(b"x" * 10_000_000)


def test_a_program_that_does_not_exist_is_named(transport: LocalTransport) -> None:
    with pytest.raises(DeviceError, match="no-such-program"):
        transport.open(["no-such-program"])
