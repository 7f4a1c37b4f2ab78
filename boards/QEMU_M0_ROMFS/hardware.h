#include "../QEMU_CORTEX_M0/hardware.h"
