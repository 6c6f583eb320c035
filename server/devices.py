"""What clients' devices can do, as they say when they join: profiles on the wire, verified, and kept by the server.

A client that has a file of `fedofa profile` (or a latency table) states its checksum when it introduces itself; the
server asks for the file once, and keeps its table under the client's id. Where it is asked to, the server also measures
the client's link, by two messages of a known size among empty ones. A run that goes on finds what was kept: rates and
tables, and so the assignments, stay as they were.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flwr.app import Message

from clients.device import MAX_DEVICE_BYTES, device_checksum, encode_probe, noise
from clients.records import packed_buffer, packed_content
from fedofa.device.latency import Latency
from fedofa.device.operators import OperatorIndex
from fedofa.device.profile import MeasuredDevice, read_json
from fedofa.device.sealed import seal, unseal
from fedofa.device.tables import FORMAT as TABLE_FORMAT
from fedofa.device.tables import LatencyTable
from fedofa.types.errors import DeltaError, ProfileError, WireError
from server.checkpoint import replace_file
from server.fleet import ClientInfo

DEVICE, LINK = "query.device", "query.link"
"""Types of the messages that ask for a device's file, and that measure a link."""
FORMAT = "fedofa kept device 1"
_REMEDY = "delete it, and the client is asked again"

_POLLING_SECONDS = 3.0
"""How often a SuperNode of Flower 1.41 looks for messages: times that differ by no more are the same."""

Exchange = Callable[[Iterable[Message]], Iterator[Message]]


@dataclass(frozen=True, slots=True)
class KeptDevice:
    """What the server knows of one client's device beside its introduction.

    Args:
        client_id: whose device it is.
        checksum: of the file that the client sent; "" where it has none.
        table: of the file; None where it has none.
        uplink_bytes_per_second, downlink_bytes_per_second: measured, or the least that they must be where that is more
            than stated; None where they were not measured, or nothing more can be told.
    """

    client_id: str
    checksum: str = ""
    table: LatencyTable | None = field(default=None, repr=False)
    uplink_bytes_per_second: float | None = None
    downlink_bytes_per_second: float | None = None

    def to_json(self) -> dict[str, Any]:
        """A JSON object with a checksum of its own."""
        return seal(
            {
                "format": FORMAT,
                "client_id": self.client_id,
                "device": self.checksum,
                "table": None if self.table is None else self.table.to_json(),
                "uplink_bytes_per_second": self.uplink_bytes_per_second,
                "downlink_bytes_per_second": self.downlink_bytes_per_second,
            }
        )

    @classmethod
    def from_json(cls, value: Any, where: str) -> KeptDevice:
        """The inverse of `to_json`.

        Raises:
            ProfileError: when it is damaged or something else.
        """
        content = unseal(value, FORMAT, where, _REMEDY)
        try:
            table = None if content["table"] is None else LatencyTable.from_json(content["table"], f"{where}, table")
            rates = (content["uplink_bytes_per_second"], content["downlink_bytes_per_second"])
            return cls(content["client_id"], content["device"], table, *rates)
        except (KeyError, TypeError) as error:
            raise ProfileError(f"{where}: not a kept device: {error!r}; {_REMEDY}") from error

    def measured(self, client: ClientInfo) -> ClientInfo:
        """The client with the link rates that were measured."""
        rates = {
            "uplink_bytes_per_second": self.uplink_bytes_per_second,
            "downlink_bytes_per_second": self.downlink_bytes_per_second,
        }
        known = {name: value for name, value in rates.items() if value is not None}
        return replace(client, profile=replace(client.profile, **known))


@dataclass
class DeviceFolder:
    """The devices of a run, a file a client.

    Args:
        folder: where they are kept.
        index: of the supernet, whose operators a table must have.
        link_probe_bytes: of the messages that measure a link; 0: links are as stated.
    """

    folder: Path
    index: OperatorIndex
    link_probe_bytes: int = 0
    _new: dict[str, KeptDevice] = field(init=False, default_factory=dict)
    _latencies: dict[str, Latency] = field(init=False, default_factory=dict)

    def collect(
        self, clients: Sequence[ClientInfo], exchange: Exchange, one_by_one: Exchange
    ) -> tuple[list[ClientInfo], dict[str, str], dict[str, Latency]]:
        """Ask the clients that are not known yet, and check what they send.

        A client whose file is not fit to be used takes no part: a table that is wrong would be found out only by its
        users. One without a file stays with the rates that it states, and so does one whose link cannot be measured.

        Args:
            exchange: sends messages and yields the replies.
            one_by_one: the same, one client at a time.

        Returns:
            The clients that take part, with measured link rates; why others do not; latencies by checksum.

        Raises:
            ProfileError: when a kept device is damaged.
        """
        kept = {client.client_id: self._kept(client) for client in clients}
        asked = [client for client in clients if kept[client.client_id] is None]
        found, refused = self._ask([client for client in asked if client.device], exchange)
        for client in asked:
            if client.client_id not in refused:
                device = found.get(client.client_id, KeptDevice(client.client_id))
                if self.link_probe_bytes:
                    device = self._with_link(client, device, one_by_one)
                if self.link_probe_bytes or device.table is not None:
                    self._new[client.client_id] = device
                kept[client.client_id] = device
        taken = [device.measured(client) for client in clients if (device := kept[client.client_id]) is not None]
        return taken, refused, self._latencies

    def save(self) -> None:
        """Write what was learnt since the last call."""
        if self._new:
            self.folder.mkdir(parents=True, exist_ok=True)
        for name, device in self._new.items():
            replace_file(self._path(name), json.dumps(device.to_json()).encode())
        self._new.clear()

    def _path(self, client_id: str) -> Path:
        return self.folder / f"{client_id}.json"

    def _kept(self, client: ClientInfo) -> KeptDevice | None:
        """What is known of a client whose file is still the same, None otherwise."""
        path = self._path(client.client_id)
        device = self._new.get(client.client_id)
        if device is None and path.exists():
            device = KeptDevice.from_json(read_json(path), str(path))
        if device is None or device.checksum != client.device:
            return None
        if device.table is not None:
            self._latency(device.checksum, device.table)
        return device

    def _latency(self, checksum: str, table: LatencyTable) -> Latency:
        """The cost model of a table, which is checked once."""
        if checksum not in self._latencies:
            latency = Latency(self.index, table)
            if not latency.table.sum() > 0:
                raise ProfileError(f"latency table of {table.engine!r}: expected positive times, found only zeros")
            self._latencies[checksum] = latency
        return self._latencies[checksum]

    def _ask(self, clients: Sequence[ClientInfo], exchange: Exchange) -> tuple[dict[str, KeptDevice], dict[str, str]]:
        """The devices of clients that have a file, and why some take no part."""
        asked = {client.node_id: client for client in clients}
        found, refused = {}, {}
        for answer in exchange(Message(packed_content(b""), node, DEVICE) for node in asked):
            client = asked[answer.metadata.src_node_id]
            try:
                found[client.client_id] = self._device(client, answer)
            except (DeltaError, WireError, ProfileError) as error:
                refused[client.client_id] = f"its device profile is not taken: {error}"
        return found, refused

    def _device(self, client: ClientInfo, answer: Message) -> KeptDevice:
        if answer.has_error():
            raise DeltaError(f"it did not send it: {answer.error.reason}")
        buffer = packed_buffer(answer)
        if len(buffer) > MAX_DEVICE_BYTES:
            raise DeltaError(f"expected at most {MAX_DEVICE_BYTES:,} bytes, found {len(buffer):,}")
        if device_checksum(buffer) != client.device:
            raise DeltaError(f"it is not the one that it stated: expected {client.device}")
        try:
            content = json.loads(buffer)
        except (ValueError, RecursionError) as error:
            raise DeltaError(f"expected JSON, found something else: {error}") from error
        table = table_of(content, "its file")
        self._latency(client.device, table)
        return KeptDevice(client.client_id, client.device, table)

    # -- links -------------------------------------------------------------------------------------------------------

    def _with_link(self, client: ClientInfo, device: KeptDevice, exchange: Exchange) -> KeptDevice:
        """A device with the rates of its link, as far as they can be told from the time that an empty message takes.

        The first message's time does not count: it brings a node that looks for messages every few seconds into step.
        """
        size = self.link_probe_bytes
        empty = encode_probe(b"", 0), 0
        probes = (empty, empty, (encode_probe(noise(size), 0), 0), (encode_probe(b"", size), size), empty)
        _, before, down, up, after = (_seconds(client, *probe, exchange) for probe in probes)
        stated = client.profile
        return replace(
            device,
            uplink_bytes_per_second=_rate(size, up, (before, after), stated.uplink_bytes_per_second),
            downlink_bytes_per_second=_rate(size, down, (before, after), stated.downlink_bytes_per_second),
        )


def _seconds(client: ClientInfo, probe: bytes, wanted: int, exchange: Exchange) -> float | None:
    """How long a probe and its answer of so many bytes took; None where there was no proper answer."""
    start = time.perf_counter()
    question = Message(packed_content(probe), client.node_id, LINK)
    (answer,) = exchange([question])
    took = time.perf_counter() - start
    try:
        return took if not answer.has_error() and len(packed_buffer(answer)) == wanted else None
    except WireError:
        return None


def _rate(size: int, seconds: float | None, empty: Sequence[float | None], stated: float) -> float | None:
    """Bytes a second; None where there is nothing better than the stated rate.

    Where a message takes so much longer than empty ones that polling and their own spread do not explain it, the rate
    is measured. Otherwise the link is at least as fast as the whole message was, polling included.
    """
    known = [item for item in empty if item is not None]
    if seconds is None or len(known) < len(empty):
        return None
    least, most = min(known), max(known)
    if seconds - most > max(_POLLING_SECONDS, most - least):
        return size / (seconds - least)
    at_least = size / seconds
    return at_least if at_least > stated else None


def table_of(content: Any, where: str) -> LatencyTable:
    """The latency table of a profile's content, or of a table's own.

    Raises:
        ProfileError: when it is neither, or damaged.
    """
    if isinstance(content, Mapping) and content.get("format") == TABLE_FORMAT:
        return LatencyTable.from_json(content, where)
    return MeasuredDevice.from_json(content, where).latency
