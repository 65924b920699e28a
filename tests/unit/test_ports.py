"""A reserved port: nobody else is given it, and the one it is meant for can listen there."""

from __future__ import annotations

import asyncio
import socket

import pytest

from sglang_harness.runtime.ports import ReservedPort, is_taken


def test_a_reserved_port_is_given_to_nobody_else():
    """One that was only looked up could be given to another before its server listened there."""
    reserved = ReservedPort()
    others: list[socket.socket] = []
    try:
        for _ in range(500):
            others.append(socket.socket())
            others[-1].bind(("127.0.0.1", 0))
        assert reserved.number not in {other.getsockname()[1] for other in others}
        with socket.socket() as thief, pytest.raises(OSError, match="in use"):
            thief.bind(("127.0.0.1", reserved.number))
    finally:
        for other in others:
            other.close()
        reserved.release()


def test_two_reservations_are_two_ports():
    reserved = [ReservedPort() for _ in range(20)]
    assert len({each.number for each in reserved}) == 20
    for each in reserved:
        each.release()


def test_the_server_that_it_is_meant_for_listens_there_and_goes_on_after_the_release():
    reserved = ReservedPort()

    async def serve() -> None:
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", reserved.number)
        server = await asyncio.start_server(
            lambda _, writer: writer.close(), "127.0.0.1", reserved.number
        )
        for release in (False, True):
            if release:
                reserved.release()
            reader, writer = await asyncio.open_connection("127.0.0.1", reserved.number)
            assert await reader.read() == b""
            writer.close()
        server.close()
        await server.wait_closed()

    asyncio.run(serve())
    assert not is_taken(reserved.number)


def test_releasing_twice_is_releasing_once():
    reserved = ReservedPort()
    reserved.release()
    reserved.release()
