# Makes a model of a plan. All of this is forgotten again once that is done, so that a board has its code's memory back.
import sys

from .compat import collect

# A loaded model needs nothing of these.
_PASSING = ("verify", "plan", "loader", "_executor", "compat", "safefile", "loading")
_ON_BOARD = sys.implementation.name == "micropython"


def load_into(model, source, run, frozen):
    # As ulearn.load, into a Model that is empty yet.
    if frozen not in ("auto", "ram", "stream"):
        raise ValueError("frozen '%s', expected auto, ram or stream" % frozen)
    # What a module's import leaves behind are its names. Interned once for all, with nothing else in the heap, they lie
    # side by side; interned between the loader's buffers they would leave it in pieces.
    for name in _PASSING if _ON_BOARD else ():
        __import__("ulearn." + name)
        _forget(name)
    collect()
    try:
        from .loader import check

        checked = check(source)
        del check
        _forget_all()
        collect()
        # Made while the verifier's code was there, the windows lie high: they would split what is free now.
        checked = (checked[0], [windows[:] for windows in checked[1]]) + checked[2:]
        collect()
        if not run:
            from ._executor import choose

            run = choose(*checked[2:])  # code in one piece, which stays
            del choose
        from .loader import fill

        fill(model, source, run, frozen, checked)
        del fill
        if isinstance(source, str):
            model.path = source
            _put_on(model, source)
    finally:
        _forget_all()


def _put_on(model, path):
    # What a board has learnt and shared before, if it has.
    from .safefile import candidates, exists

    if any(exists(place) for place in candidates(path + ".base")):
        from .checkpoint import adopt_base

        adopt_base(model)
    if any(exists(place) for place in candidates(path + ".own0")):
        from .personal import put_on

        put_on(model)


def _forget_all():
    for name in _PASSING if _ON_BOARD else ():
        _forget(name)


def _forget(name):
    module = sys.modules.pop("ulearn." + name, None)
    package = sys.modules["ulearn"]
    if module is not None and getattr(package, name, None) is module:
        delattr(package, name)
