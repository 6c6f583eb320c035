"""Cache entries are built once, appear whole, and come back after damage."""

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fedofa.data.cache import load_cached


def read_number(path: Path) -> int:
    return int(path.read_text())


def write_seven(path: Path) -> None:
    path.write_text("7")


def refuse_to_build(path: Path) -> None:
    raise RuntimeError("must not be built")


def test_builds_what_is_missing_then_only_loads(tmp_path: Path) -> None:
    entry = tmp_path / "deep" / "entry"
    assert load_cached(entry, read_number, write_seven) == 7
    assert load_cached(entry, read_number, refuse_to_build) == 7


def test_rebuilds_what_does_not_load_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    entry = tmp_path / "entry"
    entry.write_text("not a number")
    with caplog.at_level(logging.WARNING):
        assert load_cached(entry, read_number, write_seven) == 7
    assert str(entry) in caplog.text


@pytest.mark.parametrize("in_the_way", ["file", "directory"])
def test_replaces_a_file_by_a_directory_and_the_reverse(tmp_path: Path, in_the_way: str) -> None:
    entry = tmp_path / "entry"
    if in_the_way == "directory":
        (entry / "inner").mkdir(parents=True)
        assert load_cached(entry, read_number, write_seven) == 7
    else:
        entry.write_text("7")

        def build(path: Path) -> None:
            path.mkdir()
            write_seven(path / "inner")

        assert load_cached(entry, lambda path: read_number(path / "inner"), build) == 7


def test_failed_build_leaves_no_entry_and_raises(tmp_path: Path) -> None:
    def build(path: Path) -> None:
        path.write_text("7")
        raise OSError("disk is full")

    with pytest.raises(OSError, match="disk is full"):
        load_cached(tmp_path / "entry", read_number, build)
    assert [path.name for path in tmp_path.iterdir()] == [".lock-entry"]


def test_build_that_does_not_load_raises_the_reason(tmp_path: Path) -> None:
    def build(path: Path) -> None:
        path.write_text("seven")

    with pytest.raises(ValueError, match="seven"):
        load_cached(tmp_path / "entry", read_number, build)


def test_leftovers_of_a_killed_build_are_removed(tmp_path: Path) -> None:
    leftover = tmp_path / ".building-entry"
    leftover.mkdir()
    (leftover / "half").write_text("7")
    assert load_cached(tmp_path / "entry", read_number, write_seven) == 7
    assert not leftover.exists()


def test_loads_from_a_directory_without_writing_to_it(tmp_path: Path) -> None:
    write_seven(tmp_path / "entry")
    assert load_cached(tmp_path / "entry", read_number, refuse_to_build) == 7
    assert [path.name for path in tmp_path.iterdir()] == ["entry"]


def build_slowly(path: Path) -> None:
    with open(path.parent / "builds.log", "a") as log:
        log.write("built\n")
    time.sleep(0.3)
    write_seven(path)


def test_of_those_who_race_one_builds_and_all_succeed(tmp_path: Path) -> None:
    with ThreadPoolExecutor(3) as pool:
        racers = [pool.submit(load_cached, tmp_path / "entry", read_number, build_slowly) for _ in range(3)]
    assert [racer.result() for racer in racers] == [7, 7, 7]
    assert (tmp_path / "builds.log").read_text() == "built\n"
