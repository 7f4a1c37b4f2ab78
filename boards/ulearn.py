# The package, frozen into a firmware that has the kernels: they are never replaced by ulab there.
import os

_PACKAGE = "../firmware/ulearn"
_FILES = sorted(name for name in os.listdir(_PACKAGE) if name.endswith(".py") and not name.startswith("ulab_"))
package("ulearn", files=_FILES, base_path="../firmware", opt=3)
