// What MicroPython has on these boards: the features of the stock RP2040 build, without its peripherals.
#include <alloca.h>
#include <stdint.h>
#include "mpconfigboard.h"
#include "mpconfigcore.h"

#define MICROPY_CONFIG_ROM_LEVEL (MICROPY_CONFIG_ROM_LEVEL_EXTRA_FEATURES)

#define MICROPY_PERSISTENT_CODE_LOAD (1)

#define MICROPY_ENABLE_GC (1)
#define MICROPY_MEM_STATS (0)
#define MICROPY_LONGINT_IMPL (MICROPY_LONGINT_IMPL_MPZ)
#define MICROPY_FLOAT_IMPL (MICROPY_FLOAT_IMPL_FLOAT)
#define MICROPY_ENABLE_EMERGENCY_EXCEPTION_BUF (1)
#define MICROPY_SCHEDULER_DEPTH (8)
#define MICROPY_PY_MICROPYTHON_HEAP_LOCKED (1)

#define MICROPY_VFS (1)
#define MICROPY_READER_VFS (1)

#define MICROPY_PY_SYS_PLATFORM "qemu"
#define MICROPY_BANNER_MACHINE MICROPY_HW_BOARD_NAME " (" MICROPY_HW_MCU_NAME ")"
#define MICROPY_PY_OS_SYNC (1)
#define MICROPY_PY_OS_UNAME (1)
#define MICROPY_PY_OS_URANDOM (1)
#define MICROPY_PY_OS_INCLUDEFILE "random.inc"
#define MICROPY_PY_RANDOM_SEED_INIT_FUNC (board_random())
#define MICROPY_PY_TIME_TIME_TIME_NS (1)
#define MICROPY_PY_TIME_INCLUDEFILE "time.inc"
#define MICROPY_PY_MACHINE (1)
#define MICROPY_PY_MACHINE_RESET (1)
#define MICROPY_PY_MACHINE_INCLUDEFILE "machine.inc"

// Sleep between interrupts, so that an idle board costs the host nothing.
void board_wait(int timeout_ms);
uint32_t board_random(void);
#define MICROPY_INTERNAL_WFE(timeout_ms) board_wait(timeout_ms)

#define MP_SSIZE_MAX (0x7fffffff)
#define MP_NEED_LOG2 (1)
#define MP_STATE_PORT MP_STATE_VM
typedef int32_t mp_int_t;
typedef uint32_t mp_uint_t;
typedef long mp_off_t;
