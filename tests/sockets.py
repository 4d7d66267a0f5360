"""The sockets on which a start listens, and those that SECURITY.md says it has."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tpray
from tests.served import children_of

SECURITY = Path(tpray.__file__).parents[1] / "SECURITY.md"
LISTENS, DATAGRAMS = "0A", "07"  # states in /proc/net/tcp and udp: include/net/tcp_states.h
PASSIVE = 0x10000  # the flag of a Unix socket that listens: __SO_ACCEPTCON


@dataclass(frozen=True)
class Listening:
    """kind: tcp, udp or unix. address: an IP address, a path, or @ and an abstract name. process: what it is called."""

    kind: str
    address: str
    port: int
    process: str


@dataclass(frozen=True)
class Declared:
    """A row of the table: what may listen. starts: the columns of the starts that have it."""

    process: str
    kind: str
    address: str
    port: str
    starts: frozenset[str]


def declared() -> list[Declared]:
    """The rows of the table of sockets, read as a person reads them."""
    lines = SECURITY.read_text().splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("| process |"))
    columns = [cell.strip() for cell in lines[head].strip("|").split("|")]
    rows = []
    for line in lines[head + 2 :]:
        if not line.startswith("|"):
            break
        cells = [cell.strip().replace("`", "") for cell in line.strip("|").split("|")]
        found = dict(zip(columns, cells, strict=True))
        starts = frozenset(name.strip() for name in found["starts"].split(","))
        rows.append(Declared(found["process"], found["kind"], found["address"], found["port"], starts))
    return rows


def listening(pid: int) -> set[Listening]:
    """All sockets of a process and of those that it has started that others can send to."""
    owners: dict[str, str] = {}
    for process in {pid} | children_of(pid):
        try:
            name = name_of(process, pid)
            for fd in Path(f"/proc/{process}/fd").iterdir():
                target = os.readlink(fd)
                if target.startswith("socket:["):
                    owners.setdefault(target[8:-1], name)
        except OSError:  # it has ended meanwhile
            continue
    return {*_internet(owners), *_unix(owners)}


def _internet(owners: dict[str, str]) -> Iterator[Listening]:
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            local, state = fields[1], fields[3]
            open_to_all = state == (LISTENS if table.startswith("tcp") else DATAGRAMS)
            if fields[9] in owners and open_to_all:
                address, _, port = local.rpartition(":")
                yield Listening(table[:3], _address(address), int(port, 16), owners[fields[9]])


def _address(written: str) -> str:
    """As the kernel writes it: four bytes at a time, each in the machine's order."""
    words = [bytes.fromhex(written[i : i + 8])[::-1] for i in range(0, len(written), 8)]
    raw = b"".join(words)
    if len(raw) == 16 and raw[:12] == bytes(10) + b"\xff\xff":
        raw = raw[12:]
    if not any(raw):
        return "all"
    if len(raw) == 4:
        return ".".join(map(str, raw))
    return "127.0.0.1" if raw == bytes(15) + b"\x01" else raw.hex()


def _unix(owners: dict[str, str]) -> Iterator[Listening]:
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split()
        named = len(fields) > 7
        receives = int(fields[3], 16) & PASSIVE or fields[4] == "0002"  # a datagram socket that has a name
        if fields[6] in owners and named and receives:
            yield Listening("unix", fields[7], 0, owners[fields[6]])


def name_of(process: int, starter: int) -> str:
    """What the table calls a process."""
    if process == starter:
        return "the command"
    words = Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace").split("\0")
    title = words[0].strip()
    if title.startswith("ray::"):
        return re.split(r"[.:( ]", title.removeprefix("ray::"))[0]
    if title.startswith("ray-dashboard"):
        return "dashboard.py"
    program = Path(title).name
    scripts = [Path(word).name for word in words[1:] if word.endswith(".py")]
    return scripts[0] if program.startswith("python") and scripts else program


def undeclared(pid: int, start: str, host: str = "127.0.0.1", **ports: int) -> list[Listening]:
    """What a start listens on and the table does not name.

    host: what the table's ``--host`` is in this start, as `Listening` says it. ports: what its words for ports are.
    """
    rows = [row for row in declared() if start in row.starts]
    assert rows, f"the table has no start {start!r}"
    return sorted(
        (found for found in listening(pid) if not any(_names(row, found, host, ports) for row in rows)), key=str
    )


def _names(row: Declared, found: Listening, host: str, ports: dict[str, int]) -> bool:
    if row.kind != found.kind or found.process not in re.split(r",\s*", row.process):
        return False
    if row.kind == "unix":
        return re.fullmatch(re.escape(row.address).replace(r"\*", ".*"), found.address) is not None
    addresses = re.split(r",\s*", row.address.replace("--host", host))
    if found.address not in addresses and ("the node's" not in addresses or found.address == "all"):
        return False
    if row.port == "any":
        return True
    if (word := row.port.removeprefix("--").replace("-", "_")) in ports:
        return found.port == ports[word]
    first, _, last = row.port.partition(" to ")
    return first.isdecimal() and int(first) <= found.port <= int(last or first)
