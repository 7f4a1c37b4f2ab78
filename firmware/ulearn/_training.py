# Runs programs with records of training. As native modules the kernels are two, each with its own records, so that a
# board that only infers does not hold the other one; built into a firmware they are one.
from ._executor import run as first_run
from .compat import const

_E_RECORD = const(-3)

_second_run = None


def run(program, table, first, count, index=-1, base=None):
    # As the executor's own, which stops where it does not know a record.
    done, second, refused = 0, False, False
    while done < count:
        part = _second_run if second else first_run
        if base is None:
            code = part(program, table, first + done, count - done, index)
        else:
            code = part(program, table, first + done, count - done, index, base)
        if code >= 0:
            done += code
        elif code != _E_RECORD or refused:
            return code
        refused = code < 0
        second = not second
        if second and done < count and not load():
            return _E_RECORD
    return done


def load():
    # Before the first step, which allocates nothing any more. Whether there is a second module at all.
    global _second_run
    if _second_run is None:
        try:
            from ulab_training import run as _second_run
        except ImportError:
            _second_run = False
    return _second_run
