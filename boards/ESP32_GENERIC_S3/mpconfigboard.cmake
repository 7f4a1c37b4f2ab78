# make -C <micropython>/ports/esp32 BOARD_DIR=<ulearn>/boards/ESP32_GENERIC_S3 \
#     USER_C_MODULES=<ulearn>/ulab_kernels/micropython.cmake
include(${CMAKE_CURRENT_LIST_DIR}/../esp32.cmake)
