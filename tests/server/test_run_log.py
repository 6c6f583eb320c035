"""A ServerApp's lines apart from Flower's, through broken connections and errors."""

from server.run_log import RunLog


def flower(level: str, text: str) -> str:
    return f"\x1b[91m{level}\x1b[0m:     {text}"


def test_progress_after_an_error_is_passed_on_and_the_last_error_kept():
    said = []
    log = RunLog(said.append)
    trace = ["Traceback (most recent call last):", '  File "x.py", line 1, in f', "OSError: no route"]
    last = ["Traceback (most recent call last):", "  f()", "fedofa.types.errors.ConfigError: rouns: unknown"]
    joint = ["", "During handling of the above exception, another exception occurred:", ""]
    ending = [flower("ERROR", "Exit Code: 201"), "The ServerApp raised.", "", "For more information, visit: <x>"]
    lines = ["round 1", flower("ERROR", "push failed"), *trace, "round 2", flower("INFO", "retry"), "round 3"]
    lines += [flower("ERROR", "ServerApp raised an exception"), *trace, "of 2 lines", *joint, *last, *ending]
    for line in lines[:5]:
        log.add(line)
    assert said == ["round 1"]
    log.rewind()  # the connection broke
    for line in lines:
        log.add(line)
    assert said == ["round 1", "round 2", "round 3"]
    assert log.failure[0] == "ERROR:     ServerApp raised an exception"
    assert set(last) < set(log.failure)
    assert log.failure[-1] == ending[-1]
    assert "push failed" not in " ".join(log.failure)
