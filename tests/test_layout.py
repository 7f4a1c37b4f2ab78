"""One definition of every number: ul_format.h."""

from ulearn_host import layout, numbers


def test_python_copies_are_current() -> None:
    """Every constant that carries a name of the format has the format's number."""
    assert layout.stale() == []
    assert layout.numbers()["RECORD_BYTES"] == numbers.RECORD_BYTES == 64


def test_a_wrong_number_is_found() -> None:
    """The check itself: a changed constant is set right, others are left alone."""
    text = "_RECORD_BYTES = const(63)\n_MINE = const(5)\n"
    assert layout.synchronised(text, layout.numbers()) == "_RECORD_BYTES = const(64)\n_MINE = const(5)\n"
