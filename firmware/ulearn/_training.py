# Runs programs with records of training. As native modules the kernels are in parts, each with its own records, so that
# a board holds those that its plan needs; built into a firmware they are one.
from ._executor import run as first_run
from .compat import const

_E_RECORD = const(-3)

_second_run = None
_whole = False


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
        if second and done < count and not _second_run:
            return _E_RECORD
    return done


def load(whole):
    # Before the first step, which allocates nothing any more; code in one piece, before the heap is in pieces.
    # `whole`: all records of training, not only those of dense layers.
    global _second_run, _whole
    if _second_run and (_whole or not whole):
        return
    for name in ("ulab_training",) if whole else ("ulab_head", "ulab_training"):
        try:
            _second_run = __import__(name).run
        except ImportError:
            continue
        _whole = name == "ulab_training"
        return
