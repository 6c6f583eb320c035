"""Clients' devices on the wire and on disk: taken when they are proper, kept, refused with a reason, links measured."""

import json
from dataclasses import replace

import pytest
from cohorts import SPECS
from flwr.app import Error, Message

from clients.device import MAX_PROBE_BYTES, answer_probe, device_checksum, encode_probe, read_device
from clients.records import packed_buffer, packed_content
from fedofa.device.latency import roofline_table
from fedofa.device.operators import OperatorIndex
from fedofa.device.profile import MeasuredDevice
from fedofa.supernet.families import build_elastic
from fedofa.types.device import DeviceProfile
from fedofa.types.errors import ProfileError, WireError
from server import devices
from server.carrier import assume_identity
from server.devices import DEVICE, LINK, DeviceFolder
from server.fleet import ClientInfo

INDEX = OperatorIndex.of(build_elastic(SPECS["mobilenet_v3"]))
TABLE = roofline_table(INDEX, macs_per_second=1e9, bytes_per_second=1e9, launch_ms=0.01, engine="x", source="made up")
PROFILE = DeviceProfile("board", 1e8, 1e8, 1e5, 2e5)
FILE = json.dumps(MeasuredDevice(PROFILE, 1e9, {}, "wall", TABLE).to_json()).encode()


def client(number: int, content: bytes = FILE) -> ClientInfo:
    return ClientInfo(number, f"client-{number:04d}", PROFILE, 10, 5, device_checksum(content) if content else "")


class Nodes:
    """Answers as clients do; `files` holds what each node sends, and the clock moves with the bytes."""

    def __init__(self, files, monkeypatch=None, rates=(1e4, 2e4)):
        assume_identity(1, 0)
        self.files, self.rates, self.asked, self.now = files, rates, [], 0.0
        if monkeypatch is not None:
            monkeypatch.setattr(devices.time, "perf_counter", lambda: self.now)

    def __call__(self, messages):
        for message in messages:
            node, kind = message.metadata.dst_node_id, message.metadata.message_type
            self.asked.append((node, kind))
            sent = self.files[node]
            if isinstance(sent, Error):
                yield Message(sent, reply_to=message)
                continue
            content = sent if kind == DEVICE else answer_probe(packed_buffer(message))
            up, down = self.rates
            self.now += 0.5 + len(content) * (kind == LINK) / up + (len(packed_buffer(message)) - 8) / down
            yield Message(packed_content(content), reply_to=message)


def test_devices_are_taken_kept_and_not_asked_for_again(tmp_path):
    folder, nodes = DeviceFolder(tmp_path / "devices", INDEX), Nodes({1: FILE, 2: b""})
    clients = [client(1), client(2, b"")]
    taken, refused, latencies = folder.collect(clients, nodes, nodes)
    assert (taken, refused) == (clients, {})
    assert nodes.asked == [(1, DEVICE)]
    assert list(latencies) == [clients[0].device]
    assert latencies[clients[0].device].table.sum() == pytest.approx(sum(TABLE.milliseconds.values()), rel=1)
    assert not (tmp_path / "devices").exists()
    folder.save()
    again = DeviceFolder(tmp_path / "devices", INDEX)
    taken, refused, found = again.collect(clients, nodes, nodes)
    assert (taken, refused) == (clients, {})
    assert nodes.asked == [(1, DEVICE)]
    assert (found[clients[0].device].table == latencies[clients[0].device].table).all()


def test_a_device_that_changed_is_asked_for_anew(tmp_path):
    folder, other = DeviceFolder(tmp_path, INDEX), json.dumps(replace(TABLE, overhead_ms=3.0).to_json()).encode()
    nodes = Nodes({1: FILE})
    folder.collect([client(1)], nodes, nodes)
    folder.save()
    nodes.files[1] = other
    _, _, latencies = folder.collect([client(1, other)], nodes, nodes)
    assert latencies[device_checksum(other)].overhead_ms == 3.0
    assert len(nodes.asked) == 2


def spoilt(**changes) -> bytes:
    content = {key: value for key, value in TABLE.to_json().items() if key != "checksum"}
    return json.dumps({**content, **changes}).encode()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"no json", "expected JSON"),
        (b"[" * 100_000, "expected JSON"),
        (b"[]", "expected an object of format"),
        (FILE.replace(b'"clock": "wall"', b'"clock": "wail"'), "damaged"),
        (spoilt(family="resnet"), "of family 'resnet'"),
        (spoilt(milliseconds={"conv": 1.0}), "operators are not in it"),
        (spoilt(milliseconds=dict.fromkeys(TABLE.milliseconds, -1.0)), "not negative"),
        (spoilt(milliseconds=dict.fromkeys(TABLE.milliseconds, float("nan"))), "finite"),
        (spoilt(milliseconds=dict.fromkeys(TABLE.milliseconds, 0.0)), "only zeros"),
        (b" " * (4 * 2**20 + 1), "expected at most"),
    ],
    ids=range(10),
)
def test_an_unfit_device_costs_its_client_the_run_and_nobody_else(tmp_path, content, reason):
    folder, nodes = DeviceFolder(tmp_path, INDEX), Nodes({1: content, 2: FILE})
    taken, refused, _ = folder.collect([client(1, content), client(2)], nodes, nodes)
    assert [item.client_id for item in taken] == ["client-0002"]
    assert reason in refused["client-0001"]


def test_another_file_than_the_stated_one_and_a_failure_are_refused(tmp_path):
    nodes = Nodes({1: FILE + b" ", 2: Error(1, "no such file"), 3: FILE})
    taken, refused, _ = DeviceFolder(tmp_path, INDEX).collect([client(n) for n in (1, 2, 3)], nodes, nodes)
    assert [item.client_id for item in taken] == ["client-0003"]
    assert "not the one that it stated" in refused["client-0001"]
    assert "no such file" in refused["client-0002"]


def test_link_rates_are_measured_and_kept(tmp_path, monkeypatch):
    folder, nodes = DeviceFolder(tmp_path, INDEX, link_probe_bytes=100_000), Nodes({1: FILE}, monkeypatch)
    (taken,), _, _ = folder.collect([client(1)], nodes, nodes)
    assert taken.profile.uplink_bytes_per_second == pytest.approx(1e4)
    assert taken.profile.downlink_bytes_per_second == pytest.approx(2e4)
    assert taken.profile.memory_bytes == PROFILE.memory_bytes
    folder.save()
    nodes.rates = (5.0, 5.0)
    (again,), _, _ = DeviceFolder(tmp_path, INDEX, link_probe_bytes=100_000).collect([client(1)], nodes, nodes)
    assert again == taken


def test_a_link_too_fast_to_measure_is_at_least_as_fast_as_the_whole_message(tmp_path, monkeypatch):
    nodes = Nodes({1: FILE}, monkeypatch, rates=(float("inf"), float("inf")))
    (taken,), _, _ = DeviceFolder(tmp_path, INDEX, link_probe_bytes=1000).collect([client(1)], nodes, nodes)
    assert taken.profile == PROFILE  # which states more than 1000 bytes in the 0.5 s that any message takes
    (taken,), _, _ = DeviceFolder(tmp_path, INDEX, link_probe_bytes=75_000).collect([client(1)], nodes, nodes)
    assert taken.profile == replace(PROFILE, uplink_bytes_per_second=150_000)


def test_polling_is_not_taken_for_the_link(tmp_path, monkeypatch):
    nodes = Nodes({1: FILE}, monkeypatch, rates=(float("inf"), float("inf")))
    waits = iter((0.0, 0.1, 2.5, 5.0, 11.5, 2.0))  # for the device, then nothing, nothing, down, up, nothing

    def delayed(messages):
        for answer in nodes(messages):
            nodes.now += next(waits)
            yield answer

    (taken,), _, _ = DeviceFolder(tmp_path, INDEX, link_probe_bytes=1_000_000).collect([client(1)], delayed, delayed)
    assert taken.profile.downlink_bytes_per_second == PROFILE.downlink_bytes_per_second  # no faster link is proved
    assert taken.profile.uplink_bytes_per_second == pytest.approx(1_000_000 / (12.0 - 2.5))


def test_a_damaged_kept_device_is_one_clear_error(tmp_path):
    folder, nodes = DeviceFolder(tmp_path, INDEX), Nodes({1: FILE})
    folder.collect([client(1)], nodes, nodes)
    folder.save()
    path = tmp_path / "client-0001.json"
    path.write_text(path.read_text().replace('"client_id": "client-0001"', '"client_id": "client-0009"'))
    with pytest.raises(ProfileError, match="damaged.*delete it"):
        DeviceFolder(tmp_path, INDEX).collect([client(1)], nodes, nodes)


def test_a_probe_asks_for_no_more_than_a_client_gives(tmp_path):
    assert answer_probe(encode_probe(b"x" * 50, 0)) == b""
    assert len(answer_probe(encode_probe(b"", 1000))) == 1000
    for wrong in (encode_probe(b"", MAX_PROBE_BYTES + 1), b"", b"1234567"):
        with pytest.raises(WireError, match="link probe"):
            answer_probe(wrong)
    with pytest.raises(ProfileError, match="cannot be read"):
        read_device(tmp_path / "none.json")
