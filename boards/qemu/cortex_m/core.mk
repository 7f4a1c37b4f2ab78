CROSS_COMPILE ?= arm-none-eabi-
CORE_FLAGS = -mthumb -mcpu=$(CPU)
CORE_CFLAGS = -mfloat-abi=soft
