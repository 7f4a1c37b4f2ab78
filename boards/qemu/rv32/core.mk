CROSS_COMPILE ?= riscv64-unknown-elf-
# An ESP32-C3's instructions. By the older specification those for the control registers belong to them; naming these
# apart would make the compiler miss its 32-bit library.
CORE_FLAGS = -march=rv32imc -misa-spec=2.2 -mabi=ilp32
# Headers only: what the firmware needs of a C library is MicroPython's.
CORE_CFLAGS = -specs=picolibc.specs
AFLAGS += $(CORE_FLAGS)
GC_HELPER = gchelper_rv32i
