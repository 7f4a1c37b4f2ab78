# What plans are run with here, without loading a native module for the answer.
import os
import sys

from .loading import MODULES, built_in


def find():
    # "native" or "ulab".
    if built_in() or ("ulearn.ulab_executor" not in sys.modules and any(_is_there(module) for module in MODULES)):
        return "native"
    from .ulab_executor import name

    return name


def _is_there(module):
    if sys.modules.get(module):
        return True
    for folder in sys.path:
        try:
            os.stat("%s%s.mpy" % (folder and folder + "/", module))
            return True
        except OSError:
            pass
    return False
