# A plain Unix port: what the standard variant has, with Debian's mbedTLS, and without the other libraries it would need
# from the system.
MICROPY_PY_BTREE = 0
MICROPY_PY_SSL = 1
MICROPY_SSL_MBEDTLS = 1
MICROPY_PY_FFI = 0
FROZEN_MANIFEST = $(VARIANT_DIR)/manifest.py
