#define MICROPY_HW_BOARD_NAME "QEMU Cortex-M3"
#define MICROPY_HW_MCU_NAME "an ESP32's memory"
#define MICROPY_HEAP_SIZE (115128) // leaves the free heap of an ESP32
#define FLASH_BLOCKS (512) // 2,097,152 bytes, what an ESP32 with 4 MB leaves for files
