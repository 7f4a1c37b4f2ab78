# make -C <micropython>/ports/rp2 BOARD_DIR=<ulearn>/boards/RPI_PICO_W
set(MICROPY_HW_FLASH_STORAGE_BYTES 540672) # the port's 848 KiB less the ROMFS
set(MICROPY_HW_ROMFS_BYTES 327680)
include(${CMAKE_CURRENT_LIST_DIR}/../rp2.cmake)
