# The one place where an executor is chosen: a native module of the C kernels, else ulab (numpy under CPython).
# Absence only.
import os
import sys

_MODULES = ("ulab_infer", "ulab_dense", "ulab_convs", "ulab_last", "ulab_kernels")


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
    for module in _MODULES:
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
