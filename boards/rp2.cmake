# What a Pico's firmware from here has beside the port's own: the kernels, the package, a ROMFS. Included by the board's
# mpconfigboard.cmake, which has said how many bytes the file system and the ROMFS take.
set(ULEARN_BOARD_DIR ${MICROPY_BOARD_DIR})
list(APPEND USER_C_MODULES ${CMAKE_CURRENT_LIST_DIR}/../ulab_kernels/micropython.cmake)

# Pins, variants and the rest are the port's; our mpconfigboard.h is found first, and includes the port's.
include_directories(BEFORE ${ULEARN_BOARD_DIR})
set(MICROPY_BOARD_DIR ${MICROPY_PORT_DIR}/boards/${MICROPY_BOARD})
include(${MICROPY_BOARD_DIR}/mpconfigboard.cmake)
set(MICROPY_FROZEN_MANIFEST ${ULEARN_BOARD_DIR}/manifest.py)

# From 1.29 on the port reads the two from here; before, mpconfigboard.h does.
list(APPEND MICROPY_DEF_BOARD
    ULEARN_STORAGE_BYTES=${MICROPY_HW_FLASH_STORAGE_BYTES}
    ULEARN_ROMFS_BYTES=${MICROPY_HW_ROMFS_BYTES}
)
