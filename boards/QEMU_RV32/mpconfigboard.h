#define MICROPY_HW_BOARD_NAME "QEMU RV32"
#define MICROPY_HW_MCU_NAME "ESP32-C3 stand-in"
#define MICROPY_HEAP_SIZE (199152) // leaves the free heap of an ESP32-C3
#define FLASH_BLOCKS (512) // 2,097,152 bytes, what an ESP32-C3 with 4 MB leaves for files
