# Makes a model of a plan. All of this is forgotten again once that is done, so that a board has its code's memory back.
import sys

from .compat import collect

# A loaded model needs nothing of these.
_PASSING = ("verify", "plan", "loader", "safefile")
# The native modules of the C kernels, the one to be taken first: ulab_kernels/Makefile.
MODULES = ("ulab_infer", "ulab_dense", "ulab_convs", "ulab_last", "ulab_kernels")
_ON_BOARD = sys.implementation.name == "micropython"


def load_into(model, source, run, frozen):
    # As ulearn.load, into a Model that is empty yet.
    try:
        if frozen not in ("auto", "ram", "stream"):
            raise ValueError("frozen '%s', expected auto, ram or stream" % frozen)
        # What a module's import leaves behind are its names. Interned once for all, with nothing else in the heap, they
        # lie side by side; interned between the loader's buffers they would leave it in pieces.
        for name in _PASSING if _ON_BOARD else ():
            __import__("ulearn." + name)
            _forget(name)
            collect()
        from .loader import check

        checked = check(source)
        del check
        _forget(*_PASSING)
        collect()
        # Made while the verifier's code was there, all of it lies high: it would split what is free now.
        checked = bytes(bytearray(checked[0])), [windows[:] for windows in checked[1]], [list(m) for m in checked[2:]]
        collect()
        if not run:
            # Code in one piece, which stays.
            run = choose(source if isinstance(source, str) else "plan", *checked[2])
        from .loader import fill

        fill(model, source, run, frozen, checked)
        del fill
        _forget(*_PASSING)
        collect()
        if isinstance(source, str):
            model.path = source
            _put_on(model, source)
    finally:
        _forget("loading", "compat", *_PASSING)


def _put_on(model, path):
    # What a board has learnt and shared before, if it has.
    from .safefile import candidates, exists

    if any(exists(place) for place in candidates(path + ".base")):
        from .checkpoint import adopt_base

        adopt_base(model)
    if any(exists(place) for place in candidates(path + ".own0")):
        from .personal import put_on

        put_on(model)


def _forget(*names):
    if not _ON_BOARD:
        return
    package = sys.modules["ulearn"]
    for name in names:
        module = sys.modules.pop("ulearn." + name, None)
        if module is not None and getattr(package, name, None) is module:
            delattr(package, name)


# ---- The one place where an executor is chosen: native, else ulab (numpy under CPython). Absence only. ----


def choose(plan, *wanted):
    # `run` of the firmware's kernels; else of the first native module that is there, of the first list that has one.
    run = built_in()
    if run:
        return run
    loaded = [module for module in MODULES if sys.modules.get(module)]
    for modules in wanted:
        for module in modules:
            if module in loaded:
                return sys.modules[module].run
        # MicroPython never gives native code back: the second one is to know everything, so that there is no third.
        for module in reversed(modules) if loaded else modules:
            try:
                return __import__(module).run
            except ImportError:
                pass
    try:
        from .ulab_executor import run
    except ImportError:
        from .faults import EXECUTOR, refuse

        refuse("executor", plan, EXECUTOR[-3])
    return run


def built_in():
    # Of the firmware: what lies in files does not count, as it may be of any version. Under CPython the extension.
    path = sys.path[:]
    if _ON_BOARD:
        sys.path[:] = []
    try:
        from ulab_kernels import run

        return run
    except ImportError:
        return None
    finally:
        if _ON_BOARD:
            sys.path[:] = path
