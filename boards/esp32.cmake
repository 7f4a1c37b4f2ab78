# What an ESP32's firmware from here has beside the port's own: the package and a ROMFS. Included by the board's
# mpconfigboard.cmake. The kernels are named on the command line: the IDF reads components before they could be here.
set(ULEARN_BOARD_DIR ${MICROPY_BOARD_DIR})

# Pins, variants and the rest are the port's.
set(MICROPY_BOARD_DIR ${CMAKE_CURRENT_SOURCE_DIR}/boards/${MICROPY_BOARD})
include(${MICROPY_BOARD_DIR}/mpconfigboard.cmake)
set(MICROPY_FROZEN_MANIFEST ${ULEARN_BOARD_DIR}/manifest.py)
list(APPEND MICROPY_DEF_BOARD MICROPY_VFS_ROM=1)

# The last word on the partition table: a later sdkconfig file overrides those before it.
file(WRITE ${CMAKE_BINARY_DIR}/sdkconfig.ulearn
    "CONFIG_PARTITION_TABLE_CUSTOM=y\nCONFIG_PARTITION_TABLE_CUSTOM_FILENAME=\"${ULEARN_BOARD_DIR}/partitions.csv\"\n")
list(APPEND SDKCONFIG_DEFAULTS ${CMAKE_BINARY_DIR}/sdkconfig.ulearn)
