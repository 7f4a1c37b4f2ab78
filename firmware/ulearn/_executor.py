# The one place where a board's executor is chosen: the C kernels, else ulab (numpy under CPython). Absence only.
try:
    from ulab_kernels import run

    name = "native"
except ImportError:
    from .ulab_executor import name, run  # noqa: F401
