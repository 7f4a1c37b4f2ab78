# As a user C module: USER_C_MODULES points at the repository (or a folder that holds this one).
UL_DIR := $(USERMOD_DIR)
SRC_USERMOD_C += $(wildcard $(UL_DIR)/ul_*.c) $(UL_DIR)/bind_micropython.c
CFLAGS_USERMOD += -I$(UL_DIR)
