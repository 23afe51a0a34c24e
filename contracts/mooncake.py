"""The samples of a rolling store in the memory of Mooncake's clients, for nodes that share no disk.

A capture process lends a segment of its memory and puts samples there; a trainer gets them over TCP or RDMA. Objects
are pinned, so the master never evicts one: a full segment makes its owner wait. They vanish with the process that lent
the memory. An object holds the sha256 of its content (32 bytes), then the content.

Return codes of mooncake-transfer-engine 0.3.13: 0 done, -200 no memory free, -704 no such object, below -800 no answer.
"""

from __future__ import annotations

import hashlib
import json
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from common.errors import IncompleteError, UserError
from common.files import hash_bytes, hash_file, write_atomic
from common.tensor_file import Buffer
from contracts.sample_file import StoredSample, fill_sample, parse_sample
from contracts.shelf import GoneError, place_key

DONE, NO_MEMORY = 0, -200
RETRY_S = 0.1
READS = 5
"""Of an object whose content does not fit its sha256, before that is an error."""
PATIENCE_S = 120.0
"""How long a master may not answer."""
CONNECT_S = 10.0
PART_BYTES = 8 << 20
DIGEST_BYTES = 32
SMALL_SEGMENT = 64 << 20
"""Memory that a client lends which holds only notes."""


@dataclass(frozen=True)
class Mooncake:
    """How to reach Mooncake. `master`: HOST:PORT; `devices`: RDMA devices, by commas.

    `host`: this node's address; "" for the one from which it reaches the master. Objects of one rolling store have
    names that begin with `name`.
    """

    master: str
    name: str = "draftline"
    protocol: str = "tcp"
    devices: str = ""
    host: str = ""

    @property
    def words(self) -> tuple[str, ...]:
        """The options of a command that say the same."""
        options = {"": self.master, "-name": self.name, "-protocol": self.protocol, "-devices": self.devices}
        options["-host"] = self.host
        return tuple(word for name, value in options.items() if value for word in (f"--mooncake{name}", value))


class MooncakeShelf:
    """Samples as objects. Processes that it is sent to lend no memory: what they write lies in the sender's segment."""

    def __init__(self, where: Mooncake, segment_bytes: int = SMALL_SEGMENT, largest_bytes: int = PART_BYTES) -> None:
        """`segment_bytes`: memory to lend; `largest_bytes`: of one object."""
        self._where, self._segment_bytes, self._largest_bytes = where, segment_bytes, largest_bytes
        self._preferred = ""

    def __getstate__(self) -> dict[str, Any]:
        preferred = self._preferred or (self._client.get_hostname() if self._segment_bytes else "")
        return {**self.__dict__, "_segment_bytes": 0, "_preferred": preferred}

    in_memory = True

    def find(self, names: Sequence[str]) -> set[str]:
        """See `Shelf`. An owner that died a moment ago may still be counted."""
        found = self._find([*names, *map(_reason, names)])
        return {name for name in names if name in found or _reason(name) in found}

    def find_places(self, window: range) -> set[int]:
        found = self.find([place_key(place) for place in window])
        return {place for place in window if place_key(place) in found}

    def delete_before(self, place: int) -> None:
        """Do nothing: an object vanishes with its process."""

    def has_failed(self, name: str) -> bool:
        return bool(self._find([_reason(name)]))

    def write(
        self, name: str, sample: StoredSample, dtype: str | None, buffer: Buffer, *, final_states: bool
    ) -> dict[str, Any]:
        data = fill_sample(sample, dtype, buffer, final_states=final_states)
        self.put(name, data)
        return {"size": len(data), "sha256": hash_bytes(data)}

    def write_failure(self, name: str, reason: str) -> None:
        self.put(_reason(name), reason.encode())

    def read(self, name: str, *, final_states: bool, decode: bool) -> StoredSample:
        data = self.get(name)
        if data is None:
            raise GoneError(name)
        return parse_sample(f"Mooncake's object {self._key(name)}", data, final_states=final_states, decode=decode)

    def delete(self, name: str) -> None:
        """See `Shelf`. The sample may be being read."""
        for key in (name, _reason(name)):
            self._client.remove(self._key(key), True)

    def read_note(self, name: str) -> bytes | None:
        return self.get(name)

    def write_note(self, name: str, content: bytes) -> None:
        self.put(name, content)

    def tidy(self) -> None:
        """Do nothing: there are no folders."""

    def put(self, name: str, content: memoryview | bytes) -> None:
        """Put an object in place of the one with this name; wait while there is no memory for it.

        Raises IncompleteError when the master does not answer.
        """
        data = hashlib.sha256(content).digest() + bytes(content)
        self._client.remove(self._key(name), True)
        self._insist(f"put {name}", lambda: self._client.put(self._key(name), data, self._pinned()))

    def get(self, name: str) -> bytes | None:
        """Return an object's content, or None if there is none, or its memory is gone.

        Raises UserError if it is not what was put.
        """
        for _ in range(READS):
            data: bytes = self._client.get(self._key(name))
            if not data:
                return None
            content = data[DIGEST_BYTES:]
            if hashlib.sha256(content).digest() == data[:DIGEST_BYTES]:
                return content
            time.sleep(RETRY_S)  # another client put it anew while it was read
        raise UserError(
            f"Mooncake's object {self._key(name)}",
            found=f"{len(content)} bytes that are not those that were put (sha256)",
            expected="what was put",
            fix="Look for a failing network or memory, and start this command again.",
        )

    def publish(self, folder: Path, names: Sequence[str]) -> None:
        """Put files of `folder`, in parts, for `fetch`."""
        contents = {}
        for name in names:
            data = memoryview((folder / name).read_bytes())
            starts = range(0, len(data), PART_BYTES)
            for start in starts:
                self.put(f"{name}.{start // PART_BYTES}", data[start : start + PART_BYTES])
            contents[name] = {"parts": len(starts), "sha256": hash_file(folder / name)}
        self.put("files.json", json.dumps(contents).encode())

    def fetch(self, folder: Path) -> bool:
        """Write the published files into `folder`; return False if they are not all there yet."""
        listed = self.get("files.json")
        if listed is None:
            return False
        for name, entry in json.loads(listed).items():
            path = folder / name
            if path.exists() and hash_file(path) == entry["sha256"]:
                continue
            parts = [self.get(f"{name}.{number}") for number in range(entry["parts"])]
            if None in parts:
                return False
            write_atomic(path, b"".join(part for part in parts if part is not None))
        return True

    @property
    def _client(self) -> Any:
        """The client of this process. Raises UserError without the package or a master."""
        return _connect(self._where, self._segment_bytes, self._largest_bytes)

    def _find(self, names: Sequence[str]) -> set[str]:
        """Return the names of which there is an object."""
        found = self._client.batch_is_exist([self._key(name) for name in names]) if names else []
        return {name for name, answer in zip(names, found, strict=True) if answer == 1}

    def _key(self, name: str) -> str:
        return f"{self._where.name}/{name}"

    def _pinned(self) -> Any:
        from mooncake.store import ReplicateConfig

        config = ReplicateConfig()
        config.replica_num, config.with_hard_pin = 1, True
        if self._preferred:
            config.preferred_segment = self._preferred
        return config

    def _insist(self, what: str, act: Callable[[], int]) -> None:
        """Repeat `act` while there is no memory, or for `PATIENCE_S` no answer. Raises IncompleteError after that."""
        silent_since: float | None = None
        while (code := act()) != DONE:
            now = time.monotonic()
            silent_since = None if code == NO_MEMORY else (silent_since or now)
            if silent_since is not None and now - silent_since > PATIENCE_S:
                raise IncompleteError(
                    f"Mooncake's master {self._where.master}: found no way to {what} (code {code}), expected an "
                    "answer. Start it, then run the same command again."
                )
            time.sleep(RETRY_S)


@cache
def _connect(where: Mooncake, segment_bytes: int, largest_bytes: int) -> Any:
    """Return this process's client, the same for every copy of a shelf."""
    try:
        from mooncake.store import MooncakeDistributedStore
    except ImportError as error:
        raise UserError(
            "--mooncake",
            found=f"no Mooncake ({error})",
            expected="the package mooncake-transfer-engine, and libibverbs1, librdmacm1 and libnuma1",
            fix="Install draftline[mooncake], on GPU machines mooncake-transfer-engine.",
        ) from None
    address = _own_address(where.master)
    host = where.host or address
    client, buffer_bytes = MooncakeDistributedStore(), 2 * (largest_bytes + DIGEST_BYTES) + (16 << 20)
    code = client.setup(host, "P2PHANDSHAKE", segment_bytes, buffer_bytes, where.protocol, where.devices, where.master)
    if code:
        raise UserError(
            f"--mooncake {where.master}",
            found=f"a client that cannot start (code {code}; its messages are above)",
            expected=f"{where.protocol} at {host}, and {segment_bytes + buffer_bytes} bytes of memory",
            fix="Lower --window, or correct --mooncake-host, --mooncake-protocol and --mooncake-devices.",
        )
    return client


def _reason(name: str) -> str:
    """Return the name of the object that holds the reason of a failed capture."""
    return f"{name}.failed"


def _own_address(master: str) -> str:
    """Return the address from which this node reaches `master`.

    Raises UserError unless something listens there: Mooncake itself would try for minutes.
    """
    host, _, port = master.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), CONNECT_S) as connection:
            return str(connection.getsockname()[0])
    except (OSError, ValueError) as error:
        raise UserError(
            f"--mooncake {master}",
            found=f"no answer ({error})",
            expected="HOST:PORT of Mooncake's master",
            fix="Start it: mooncake_master --rpc_port PORT.",
        ) from None
