# As a user C module: USER_C_MODULES points at the repository (or a folder that holds this one).
UL_DIR := $(USERMOD_DIR)
SRC_USERMOD_C += $(addprefix $(UL_DIR)/,ul_core.c ul_dense.c ul_loss.c bind_micropython.c)
CFLAGS_USERMOD += -I$(UL_DIR)
