# make -C <micropython>/ports/rp2 BOARD_DIR=<ulearn>/boards/RPI_PICO
set(MICROPY_HW_FLASH_STORAGE_BYTES 917504) # the port's 1408 KiB less the ROMFS
set(MICROPY_HW_ROMFS_BYTES 524288)
include(${CMAKE_CURRENT_LIST_DIR}/../rp2.cmake)
