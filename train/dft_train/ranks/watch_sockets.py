"""How the ranks find rank 0's socket and know each other: `watch` keeps the connections that are made here.

Rank 0 listens; where is told through the process group's store, with two random tokens: a rank shows the first, and
rank 0 answers with the second. Whoever knows neither is sent away.
"""

from __future__ import annotations

import hmac
import os
import secrets
import socket
from typing import BinaryIO

import msgspec

CONNECT_SECONDS = 10.0
_KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}
"""A machine that has not answered for 10 + 5 * 4 seconds is gone (it cannot close its sockets any more)."""


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where rank 0 listens, and the two tokens of this run."""

    hosts: list[str]
    port: int
    token: str
    answer: str


def listen(world_size: int, *, on_this_node: bool) -> tuple[socket.socket, Place]:
    """Rank 0's socket and what the others need to know. `on_this_node`: all ranks are here."""
    if on_this_node or not socket.has_dualstack_ipv6():
        listener = socket.create_server(("127.0.0.1" if on_this_node else "", 0), backlog=world_size)
    else:
        family = socket.AF_INET6
        listener = socket.create_server(("", 0), family=family, dualstack_ipv6=True, backlog=world_size)
    hosts = ["127.0.0.1"] if on_this_node else [os.environ["MASTER_ADDR"], socket.getfqdn(), socket.gethostname()]
    port = listener.getsockname()[1]
    return listener, Place(hosts=hosts, port=port, token=secrets.token_hex(16), answer=secrets.token_hex(16))


def admit(place: Place, connection: socket.socket) -> tuple[int, BinaryIO] | None:
    """The rank that has come, and what it will write; None (and closed) for anyone else."""
    try:
        connection.settimeout(CONNECT_SECONDS)
        lines = connection.makefile("rb")
        token, _, rank = lines.readline(100).partition(b" ")
        if hmac.compare_digest(token, place.token.encode()):
            connection.sendall(f"{place.answer}\n".encode())
            _keep_alive(connection)
            return int(rank), lines
    except (OSError, ValueError):
        pass
    connection.close()
    return None


def connect(place: Place, rank: int) -> tuple[socket.socket, BinaryIO] | None:
    """A connection to rank 0, and what it will write; None where it cannot be reached."""
    for host in dict.fromkeys(place.hosts):
        try:
            connection = socket.create_connection((host, place.port), timeout=CONNECT_SECONDS)
            connection.sendall(f"{place.token} {rank}\n".encode())
            lines = connection.makefile("rb")
            if hmac.compare_digest(lines.readline(100).strip(), place.answer.encode()):
                _keep_alive(connection)
                return connection, lines
            connection.close()
        except OSError:
            continue
    return None


def _keep_alive(connection: socket.socket) -> None:
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
