// The Cortex-M0 board with a ROMFS of 524,288 bytes, as large as that of the ESP32's partitions.csv.
#include "../QEMU_CORTEX_M0/mpconfigboard.h"
#undef MICROPY_HW_BOARD_NAME
#define MICROPY_HW_BOARD_NAME "QEMU Cortex-M0 with ROMFS"
#define MICROPY_VFS_ROM (1)
