# A plain Unix port: what the standard variant has, without the libraries it would need from the system.
MICROPY_PY_BTREE = 0
MICROPY_PY_SSL = 0
MICROPY_PY_FFI = 0
FROZEN_MANIFEST = $(VARIANT_DIR)/manifest.py
