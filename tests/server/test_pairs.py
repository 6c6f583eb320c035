"""Subnets scored by clients: means by examples that no client can move far, answers that cannot be right, the file."""

import json

import pytest
from cohorts import build_supernet
from flwr.app import Error, Message, MessageType

from clients.records import metrics_content
from fedofa.device.cost import forward_bytes
from fedofa.types.device import DeviceProfile
from fedofa.types.encoding import Encoding
from fedofa.types.errors import DatasetError
from server.carrier import assume_identity
from server.fleet import ClientInfo
from server.pairs import FILE, Pair, PairGathering, PairLog, robust_mean
from server.predictor import read_pairs
from server.rounds import RoundRecord

SUPERNET = build_supernet()
SMALL, LARGE = SUPERNET.space.smallest(), SUPERNET.space.largest()


class Scorer:
    supernet = SUPERNET


class Planner:
    @staticmethod
    def work(num_examples):
        from fedofa.device.cost import LocalWork

        return LocalWork(num_examples, num_examples, 4)


def client(node: int, num_test: int, memory: float = 1e9) -> ClientInfo:
    return ClientInfo(node, f"client-{node}", DeviceProfile("any", memory, 1e9, 1e9, 1e9), 10, num_test)


def exchange(answers, asked=None):
    """Answers of the nodes: metrics or errors."""
    assume_identity(1, 0)

    def send(messages):
        for message in messages:
            assert message.metadata.message_type == MessageType.EVALUATE
            node = message.metadata.dst_node_id
            if asked is not None:
                asked.append(node)
            answer = answers[node]
            content = answer if isinstance(answer, Error) else metrics_content(answer)
            yield Message(content, reply_to=message)

    return send


GATHERING = PairGathering(Scorer(), Planner(), lambda subnet: b"12345")


def test_a_pair_is_the_mean_over_examples():
    answers = {1: {"accuracy": 0.5, "num_examples": 4}, 2: {"accuracy": 1.0, "num_examples": 6}}
    record = RoundRecord(3)
    (pair,) = GATHERING.gather(exchange(answers), [SMALL, SMALL], [client(1, 4), client(2, 6), client(3, 0)], record)
    assert pair == Pair(3, SMALL, pytest.approx(0.8), 10, 2)
    assert (record.bytes_down, record.pair_failures) == (10, {})


@pytest.mark.parametrize(
    "answer",
    [
        {"accuracy": 1.5, "num_examples": 5},
        {"accuracy": -0.1, "num_examples": 5},
        {"accuracy": float("nan"), "num_examples": 5},
        {"num_examples": 5},
        {"accuracy": 0.5, "num_examples": 500},
        {"accuracy": 0.5},
        Error(1, "out of memory"),
    ],
    ids=range(7),
)
def test_an_answer_that_cannot_be_right_does_not_count(answer):
    answers = {1: answer, 2: {"accuracy": 0.25, "num_examples": 8}}
    record = RoundRecord(1)
    (pair,) = GATHERING.gather(exchange(answers), [SMALL], [client(1, 5), client(2, 8)], record)
    assert (pair.accuracy, pair.num_examples, pair.num_clients) == (0.25, 8, 1)
    assert list(record.pair_failures) == ["client-1"]
    assert GATHERING.gather(exchange({1: answer}), [SMALL], [client(1, 5)], RoundRecord(1)) == []


def test_no_client_weighs_more_than_twice_the_median():
    values = {"a": 0.5, "b": 0.5, "c": 0.5, "liar": 1.0}
    counts = {"a": 10, "b": 10, "c": 10, "liar": 10**6}
    assert robust_mean(values, counts) == pytest.approx((3 * 10 * 0.5 + 20 * 1.0) / 50)
    assert robust_mean(dict(reversed(values.items())), counts) == robust_mean(values, counts)


def test_a_subnet_goes_only_to_clients_whose_memory_holds_it():
    need = forward_bytes(SUPERNET.block_costs(LARGE), Planner.work(5))
    asked = []
    answers = {node: {"accuracy": 0.5, "num_examples": 5} for node in (1, 2)}
    clients = [client(1, 5, need), client(2, 5, need - 1)]
    (pair,) = GATHERING.gather(exchange(answers, asked), [LARGE], clients, RoundRecord(1))
    assert asked == [1] and pair.num_clients == 1
    assert GATHERING.gather(exchange(answers), [LARGE], clients[1:], RoundRecord(1)) == []


def test_the_file_is_cut_to_where_a_run_goes_on_and_read_as_pairs_of_one_level(tmp_path):
    log = PairLog(tmp_path / FILE)
    log.cut(0)
    assert not log.path.exists()
    log.append([Pair(1, SMALL, 0.1, 9, 2), Pair(1, LARGE, 0.3, 9, 2)])
    log.append([Pair(2, SMALL, 0.5, 9, 2), Pair(2, LARGE, 0.9, 9, 2)])
    log.append([Pair(3, SMALL, 0.0, 9, 2)])
    log.cut(2)
    assert [json.loads(line)["round"] for line in log.path.read_text().splitlines()] == [1, 1, 2, 2]
    found = list(read_pairs(tmp_path, Encoding(SUPERNET.space)))
    assert [subnet for subnet, _ in found] == [SMALL, LARGE, SMALL, LARGE]
    assert [accuracy for _, accuracy in found] == pytest.approx([0.6, 0.8, 0.5, 0.9])


def test_a_damaged_pair_is_named(tmp_path):
    (tmp_path / FILE).write_text('{"round": 1}\n')
    with pytest.raises(DatasetError, match=r"pairs.jsonl, entry 1"):
        list(read_pairs(tmp_path, Encoding(SUPERNET.space)))
