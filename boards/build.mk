# Build mpy-cross, the boards' firmware and the native modules into the cache, once for each state of
# their sources. Use it through the Makefile above, which takes a lock: the cache is shared by checkouts.

REPOSITORY := $(patsubst %/,%,$(dir $(patsubst %/,%,$(dir $(abspath $(lastword $(MAKEFILE_LIST)))))))
CACHE ?= $(HOME)/.cache/ulearn
VENV ?= $(REPOSITORY)/.venv

SOURCE := $(CACHE)/micropython-src
BIN := $(CACHE)/bin
BUILD := $(CACHE)/build
KERNELS := $(REPOSITORY)/ulab_kernels
MODULES := $(patsubst PARTS_%,%,$(filter PARTS_ulab_%,$(file <$(KERNELS)/Makefile)))
CHECKOUT := $(shell echo $(REPOSITORY) | sha256sum | cut -c1-12)
JOBS := $(shell nproc)

# $(call key,files): their content in a few letters; a stamp of that name says that it is built.
key = $(shell cat /dev/null $(sort $(1)) | sha256sum | cut -c1-16)
stamp = $(CACHE)/stamps/$(1)-$(call key,$(2))
files = $(foreach pattern,$(2),$(wildcard $(1)/$(pattern)))

# $(call build,name,message,command): run quietly, show the log's end when it fails.
define build
@echo "$(2)"
@mkdir -p $(BIN) $(BUILD) $(CACHE)/log $(CACHE)/stamps; rm -f $(CACHE)/stamps/$(1)-????????????????
@{ $(3); } >$(CACHE)/log/$(1).log 2>&1 || \
	{ tail -n 20 $(CACHE)/log/$(1).log; echo "failed: log in $(CACHE)/log/$(1).log"; exit 1; } >&2
@touch $@
endef

# Written beside and renamed, because the file may be running.
install = cp $(1) $(2).new && mv $(2).new $(2)
submake = MAKEFLAGS= $(MAKE) -j$(JOBS) MICROPY_MPYCROSS=$(BIN)/mpy-cross
# -Werror stays off: the compiler is the user's, and a newer one warns more.
unix = $(submake) -C $(SOURCE)/ports/unix VARIANT_DIR=$(REPOSITORY)/boards/UNIX CWARN="-Wall -Wextra -Wno-unused-parameter"

FETCHED := $(BIN)/mpy-cross
UNIX_FILES := $(call files,$(REPOSITORY)/boards/UNIX,mpconfigvariant.* manifest.py)
KERNEL_FILES := $(call files,$(KERNELS),*.c *.h *.S *.inc *.mk Makefile)
UNIX := $(call stamp,UNIX,$(UNIX_FILES))
# make does not see flags change: other flags, another folder.
UNIX_KERNELS_BUILD := $(BUILD)/UNIX-$(CHECKOUT)-$(call key,$(UNIX_FILES))
UNIX_KERNELS := $(if $(wildcard $(KERNELS)/micropython.mk),$(call stamp,ulab_kernels-UNIX,$(UNIX_FILES) $(KERNEL_FILES)))
QEMU_BOARDS := $(notdir $(patsubst %/board.mk,%,$(wildcard $(REPOSITORY)/boards/*/board.mk)))
QEMU_FILES := $(call files,$(REPOSITORY)/boards/qemu,*.c *.h *.inc *.ld *.py Makefile */*.c */*.h */*.mk)
qemu_files = $(QEMU_FILES) $(call files,$(REPOSITORY)/boards,QEMU_*/*.h QEMU_*/*.ld QEMU_*/*.mk)
QEMU := $(foreach board,$(QEMU_BOARDS),$(call stamp,$(board),$(call qemu_files,$(board))))
# armv6m-c is armv6m without the kernels' assembler: tests compare the two on a board.
NATIVE_ARCHS := armv6m armv6m-c armv7m armv7emsp rv32imc $(if $(filter x86_64,$(shell uname -m)),x64)
NATIVE_FILES := $(filter-out %/bind_cpython.c %.mk,$(KERNEL_FILES)) \
	$(call files,$(REPOSITORY)/boards/xtensa,mpy_ld.py xtensa-esp32-elf-gcc)
native_stamps = $(foreach arch,$(1),$(call stamp,native-$(arch),$(NATIVE_FILES)))
NATIVE := $(if $(wildcard $(KERNELS)/Makefile),$(call native_stamps,$(NATIVE_ARCHS)))
XTENSA := $(call native_stamps,xtensawin)
# The modules in the repository, for those who have no compiler, and what they were made of: tests/test_native.py.
COMMITTED := $(REPOSITORY)/firmware/native
COMMITTED_ARCHS := $(filter-out %-c,$(NATIVE_ARCHS)) xtensawin
compiler = $(if $(filter arm%,$(1)),arm-none-eabi-,$(if $(filter rv32%,$(1)),riscv64-unknown-elf-,$(if $(filter \
	xtensa%,$(1)),xtensa-esp32-elf-)))gcc
stamped = $(patsubst %-$(lastword $(subst -, ,$(1))),%,$(1))

.PHONY: all native native-all native-commit
.NOTPARALLEL:

all: $(UNIX) $(UNIX_KERNELS) $(QEMU) native
	@:
native: $(NATIVE)
	@:
# What needs a compiler that no Debian release has, too.
native-all: native $(XTENSA)
	@:
native-commit: native-all
	@$(foreach arch,$(COMMITTED_ARCHS),mkdir -p $(COMMITTED)/$(arch) && rm -f $(COMMITTED)/$(arch)/* && \
		cp $(CACHE)/native/$(arch)/*.mpy $(CACHE)/native/$(arch)/built.txt $(COMMITTED)/$(arch)/ &&) :
	@cd $(COMMITTED) && wc -c */*.mpy

$(FETCHED):
	@ULEARN_CACHE=$(CACHE) $(REPOSITORY)/boards/fetch_micropython.sh
	$(call build,mpy-cross,building mpy-cross (about 10 s),\
		MAKEFLAGS= $(MAKE) -j$(JOBS) -C $(SOURCE)/mpy-cross BUILD=$(BUILD)/mpy-cross CWARN=-Wall && \
		$(call install,$(BUILD)/mpy-cross/mpy-cross,$(BIN)/mpy-cross))

$(UNIX): $(FETCHED)
	$(call build,UNIX,building the Unix port (about 15 s),\
		rm -rf $(BUILD)/UNIX && $(unix) BUILD=$(BUILD)/UNIX && $(call install,$(BUILD)/UNIX/micropython,$(BIN)/micropython))

$(UNIX_KERNELS): $(FETCHED)
	$(call build,ulab_kernels-UNIX,building the Unix port with the kernels (about 15 s),\
		rm -rf $(filter-out $(UNIX_KERNELS_BUILD),$(wildcard $(BUILD)/UNIX-$(CHECKOUT)*)) && \
		$(unix) BUILD=$(UNIX_KERNELS_BUILD) USER_C_MODULES=$(REPOSITORY) && \
		$(call install,$(UNIX_KERNELS_BUILD)/micropython,$(BIN)/micropython-ulab_kernels))

$(QEMU): $(CACHE)/stamps/%: $(FETCHED)
	$(eval BOARD := $(call stamped,$*))
	$(call build,$(BOARD),building the firmware of $(BOARD) (about 10 s),\
		$(submake) -C $(REPOSITORY)/boards/qemu BOARD=$(BOARD) MPY_DIR=$(SOURCE) BUILD=$(BUILD)/$(BOARD)-$(CHECKOUT) && \
		$(call install,$(BUILD)/$(BOARD)-$(CHECKOUT)/firmware.elf,$(BIN)/$(BOARD).elf))

# The linker of native modules is a Python program; what it imports is in the virtual environment.
# built.txt: the compiler, and the SHA-256 of the sources, one after the other by their names.
$(NATIVE) $(XTENSA): $(CACHE)/stamps/native-%: $(FETCHED)
	$(eval NAME := $(call stamped,$*))
	$(eval ARCH := $(patsubst %-c,%,$(NAME)))
	$(eval EXTRA := $(if $(filter %-c,$(NAME)),CFLAGS_EXTRA=-DUL_NO_ASM))
	$(eval OUT := $(CACHE)/native/$(NAME))
	$(if $(filter xtensawin,$(ARCH)),@ULEARN_CACHE=$(CACHE) $(REPOSITORY)/boards/fetch_clang.sh)
	$(call build,native-$(NAME),building the native modules for $(NAME),\
		rm -rf $(OUT) && mkdir -p $(OUT) && export ULEARN_CACHE=$(CACHE) PATH=$(VENV)/bin:$(REPOSITORY)/boards/xtensa:$$PATH && \
		for m in $(MODULES); do \
			$(submake) -C $(KERNELS) ARCH=$(ARCH) MPY_DIR=$(SOURCE) PYTHON=$(VENV)/bin/python \
				MOD=$$m BUILD=$(OUT)/build-$$m OUT=$(OUT)/$${m}$(if $(EXTRA),_c).mpy $(EXTRA) || exit 1; done && \
		{ $(call compiler,$(ARCH)) --version | head -n 1; cat $(sort $(NATIVE_FILES)) | sha256sum | cut -c1-64; } \
			>$(OUT)/built.txt)
