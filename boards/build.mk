# Build mpy-cross, the boards' firmware and the native modules into the cache, once for each state of
# their sources. Use it through the Makefile above, which takes a lock: the cache is shared by checkouts.

REPOSITORY := $(patsubst %/,%,$(dir $(patsubst %/,%,$(dir $(abspath $(lastword $(MAKEFILE_LIST)))))))
CACHE ?= $(HOME)/.cache/ulearn
VENV ?= $(REPOSITORY)/.venv

SOURCE := $(CACHE)/micropython-src
BIN := $(CACHE)/bin
BUILD := $(CACHE)/build
KERNELS := $(REPOSITORY)/ulab_kernels
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
UNIX_KERNELS := $(if $(wildcard $(KERNELS)/micropython.mk),$(call stamp,ulab_kernels-UNIX,$(UNIX_FILES) $(KERNEL_FILES)))
QEMU_BOARDS := $(notdir $(patsubst %/board.mk,%,$(wildcard $(REPOSITORY)/boards/*/board.mk)))
QEMU_FILES := $(call files,$(REPOSITORY)/boards/qemu,*.c *.h *.inc *.ld *.py Makefile)
qemu_files = $(QEMU_FILES) $(call files,$(REPOSITORY)/boards/$(1),*.h *.ld *.mk)
QEMU := $(foreach board,$(QEMU_BOARDS),$(call stamp,$(board),$(call qemu_files,$(board))))
# armv6m-c is armv6m without the kernels' assembler: tests compare the two on a board.
NATIVE_ARCHS := armv6m armv6m-c armv7m $(if $(filter x86_64,$(shell uname -m)),x64)
NATIVE_NAMES := $(if $(wildcard $(KERNELS)/Makefile),$(NATIVE_ARCHS))
NATIVE := $(foreach arch,$(NATIVE_NAMES),$(call stamp,native-$(arch),$(KERNEL_FILES)))
stamped = $(patsubst %-$(lastword $(subst -, ,$(1))),%,$(1))

.PHONY: all native
.NOTPARALLEL:

all: $(UNIX) $(UNIX_KERNELS) $(QEMU) native
	@:
native: $(NATIVE)
	@:

$(FETCHED):
	@ULEARN_CACHE=$(CACHE) $(REPOSITORY)/boards/fetch_micropython.sh
	$(call build,mpy-cross,building mpy-cross (about 10 s),\
		MAKEFLAGS= $(MAKE) -j$(JOBS) -C $(SOURCE)/mpy-cross BUILD=$(BUILD)/mpy-cross CWARN=-Wall && \
		$(call install,$(BUILD)/mpy-cross/mpy-cross,$(BIN)/mpy-cross))

$(UNIX): $(FETCHED)
	$(call build,UNIX,building the Unix port (about 15 s),\
		$(unix) BUILD=$(BUILD)/UNIX && $(call install,$(BUILD)/UNIX/micropython,$(BIN)/micropython))

$(UNIX_KERNELS): $(FETCHED)
	$(call build,ulab_kernels-UNIX,building the Unix port with the kernels (about 15 s),\
		$(unix) BUILD=$(BUILD)/UNIX-$(CHECKOUT) USER_C_MODULES=$(REPOSITORY) && \
		$(call install,$(BUILD)/UNIX-$(CHECKOUT)/micropython,$(BIN)/micropython-ulab_kernels))

$(QEMU): $(CACHE)/stamps/%: $(FETCHED)
	$(eval BOARD := $(call stamped,$*))
	$(call build,$(BOARD),building the firmware of $(BOARD) (about 10 s),\
		$(submake) -C $(REPOSITORY)/boards/qemu BOARD=$(BOARD) MPY_DIR=$(SOURCE) BUILD=$(BUILD)/$(BOARD)-$(CHECKOUT) && \
		$(call install,$(BUILD)/$(BOARD)-$(CHECKOUT)/firmware.elf,$(BIN)/$(BOARD).elf))

# The linker of native modules is a Python program; what it imports is in the virtual environment.
$(NATIVE): $(CACHE)/stamps/native-%: $(FETCHED)
	$(eval NAME := $(call stamped,$*))
	$(eval ARCH := $(patsubst %-c,%,$(NAME)))
	$(eval EXTRA := $(if $(filter %-c,$(NAME)),CFLAGS_EXTRA=-DUL_NO_ASM))
	$(eval OUT := $(CACHE)/native/$(NAME))
	$(call build,native-$(NAME),building the native modules for $(NAME),\
		rm -rf $(OUT) && mkdir -p $(OUT) && for m in ulab_kernels ulab_training; do \
			PATH=$(VENV)/bin:$$PATH $(submake) -C $(KERNELS) ARCH=$(ARCH) MPY_DIR=$(SOURCE) PYTHON=$(VENV)/bin/python \
				MOD=$$m BUILD=$(OUT)/build-$$m OUT=$(OUT)/$${m}$(if $(EXTRA),_c).mpy $(EXTRA) || exit 1; done)
