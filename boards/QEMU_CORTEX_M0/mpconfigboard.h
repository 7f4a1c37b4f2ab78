#define MICROPY_HW_BOARD_NAME "QEMU Cortex-M0"
#define MICROPY_HW_MCU_NAME "RP2040 stand-in"
#define MICROPY_HEAP_SIZE (196128) // leaves the free heap of an RP2040
#define FLASH_BLOCKS (352) // 1,441,792 bytes, what a Pico leaves for files
