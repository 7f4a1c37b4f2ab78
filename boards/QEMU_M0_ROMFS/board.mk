include ../QEMU_CORTEX_M0/board.mk
