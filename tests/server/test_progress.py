"""What is printed of clients that sit out: a few by name, the others by number."""

from server.progress import sitting_out_lines


def test_few_are_named_and_many_are_counted():
    assert sitting_out_lines({}) == []
    assert sitting_out_lines({"a": "too small", "b": "gone"}) == ["a sits out: too small", "b sits out: gone"]
    lines = sitting_out_lines({f"client-{number}": "too small" for number in range(300)})
    assert lines[:3] == [f"client-{number} sits out: too small" for number in range(3)]
    assert lines[3:] == ["297 more sit out; summary.json says why"]
