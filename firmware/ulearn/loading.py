# Makes a model of a plan. All of this is forgotten again once that is done, so that a board has its code's memory back.
import os
import sys

from .compat import collect

# A loaded model needs nothing of these.
_PASSING = ("verify", "plan", "loader", "compat", "safefile", "loading")
# The native modules of the C kernels, the smallest first: ulab_kernels/Makefile.
MODULES = ("ulab_infer", "ulab_dense", "ulab_convs", "ulab_last", "ulab_kernels")
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
        # Made while the verifier's code was there, all of it lies high: it would split what is free now.
        checked = bytes(bytearray(checked[0])), [windows[:] for windows in checked[1]], [list(m) for m in checked[2:]]
        collect()
        if not run:
            run = choose(*checked[2])  # code in one piece, which stays
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


# ---- The one place where an executor is chosen: a native module, else ulab (numpy under CPython). Absence only. ----


def choose(*wanted):
    # `run` of the first module that is there, one that is loaded already before all, of the first list that has one.
    for modules in wanted:
        for module in modules:
            if sys.modules.get(module):
                return sys.modules[module].run
        for module in modules:
            try:
                return __import__(module).run
            except ImportError:
                pass
    from .ulab_executor import run

    return run


def find():
    # What plans are run with here: "native" or "ulab". Loads no native module for the answer.
    for module in MODULES:
        if sys.modules.get(module) or any(_is_file("%s/%s.mpy" % (folder, module)) for folder in sys.path):
            return "native"
    try:
        import ulab_kernels  # noqa: F401  # built in

        return "native"
    except ImportError:
        from .ulab_executor import name

        return name


def _is_file(path):
    try:
        os.stat(path)
        return True
    except OSError:
        return False
