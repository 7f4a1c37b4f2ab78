include("$(PORT_DIR)/boards/manifest.py")
include("../ulearn.py")
