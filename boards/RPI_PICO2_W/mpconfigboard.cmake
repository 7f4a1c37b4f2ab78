# make -C <micropython>/ports/rp2 BOARD_DIR=<ulearn>/boards/RPI_PICO2_W
set(MICROPY_HW_FLASH_STORAGE_BYTES 1572864) # the port's 2560 KiB less the ROMFS
set(MICROPY_HW_ROMFS_BYTES 1048576)
include(${CMAKE_CURRENT_LIST_DIR}/../rp2.cmake)
