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
@mkdir -p $(BIN) $(BUILD) $(CACHE)/log $(CACHE)/stamps; rm -f $(CACHE)/stamps/$(1)-*
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
KERNEL_FILES := $(call files,$(KERNELS),*.c *.h *.S *.mk Makefile)
UNIX := $(call stamp,UNIX,$(UNIX_FILES))
UNIX_KERNELS := $(if $(wildcard $(KERNELS)/micropython.mk),$(call stamp,ulab_kernels-UNIX,$(UNIX_FILES) $(KERNEL_FILES)))
QEMU := $(call stamp,QEMU_CORTEX_M0,$(call files,$(REPOSITORY)/boards/QEMU_CORTEX_M0,*.c *.h *.inc *.ld *.py Makefile))
NATIVE_ARCHS := armv6m $(if $(filter x86_64,$(shell uname -m)),x64)
NATIVE_NAMES := $(if $(wildcard $(KERNELS)/Makefile),$(NATIVE_ARCHS))
NATIVE := $(foreach arch,$(NATIVE_NAMES),$(call stamp,native-$(arch),$(KERNEL_FILES)))

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

$(QEMU): $(FETCHED)
	$(call build,QEMU_CORTEX_M0,building the Cortex-M0 firmware (about 10 s),\
		$(submake) -C $(REPOSITORY)/boards/QEMU_CORTEX_M0 MPY_DIR=$(SOURCE) BUILD=$(BUILD)/QEMU-$(CHECKOUT) && \
		$(call install,$(BUILD)/QEMU-$(CHECKOUT)/firmware.elf,$(BIN)/QEMU_CORTEX_M0.elf))

# The linker of native modules is a Python program; what it imports is in the virtual environment.
$(NATIVE): $(CACHE)/stamps/native-%: $(FETCHED)
	$(eval ARCH := $(firstword $(subst -, ,$*)))
	$(call build,native-$(ARCH),building the native module for $(ARCH),\
		rm -rf $(CACHE)/native/$(ARCH) && mkdir -p $(CACHE)/native/$(ARCH) && \
		PATH=$(VENV)/bin:$$PATH $(submake) -C $(KERNELS) ARCH=$(ARCH) MPY_DIR=$(SOURCE) PYTHON=$(VENV)/bin/python \
			BUILD=$(CACHE)/native/$(ARCH) OUT=$(CACHE)/native/$(ARCH)/ulab_kernels.mpy)
