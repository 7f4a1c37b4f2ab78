// The board's flash: a file "flash.bin" in the folder QEMU was started in, reached by semihosting.
//
// It lies outside the emulated RAM, so heap figures stay honest, and it survives the emulator being
// killed, as flash survives a power cut. The module itself is the block device: it allocates nothing.
#include <string.h>
#include "extmod/vfs.h"
#include "py/mperrno.h"
#include "py/mphal.h"
#include "py/runtime.h"

#define BLOCK_BYTES 4096

static intptr_t file; // 0: not open yet

static void check(bool good) {
    if (!good) {
        mp_raise_OSError(MP_EIO);
    }
}

static void transfer(uintptr_t operation, uint32_t offset, const void *data, size_t len) {
    const uintptr_t place[] = {file, offset};
    check(semihosting(SYS_SEEK, place) == 0);
    const uintptr_t arguments[] = {file, (uintptr_t)data, len};
    check(semihosting(operation, arguments) == 0); // the number of bytes left over
}

static void erase(uint32_t block) {
    uint8_t blank[256];
    memset(blank, 0xff, sizeof(blank));
    for (size_t i = 0; i < BLOCK_BYTES; i += sizeof(blank)) {
        transfer(SYS_WRITE, block * BLOCK_BYTES + i, blank, sizeof(blank));
    }
}

static void open_flash(void) {
    if (file != 0) {
        return;
    }
    file = host_open("flash.bin", FILE_UPDATE);
    if (file < 0) {
        file = host_open("flash.bin", FILE_CREATE);
    }
    check(file > 0);
    const uintptr_t arguments[] = {file};
    // A file that is new, or whose making was cut short, is grown to its full size first.
    if ((size_t)semihosting(SYS_FLEN, arguments) < FLASH_BLOCKS * BLOCK_BYTES) {
        for (uint32_t block = 0; block < FLASH_BLOCKS; block++) {
            erase(block);
        }
    }
}

static mp_obj_t access(uintptr_t operation, size_t n_args, const mp_obj_t *args) {
    open_flash();
    mp_buffer_info_t buffer;
    mp_get_buffer_raise(args[1], &buffer, operation == SYS_READ ? MP_BUFFER_WRITE : MP_BUFFER_READ);
    uint32_t offset = mp_obj_get_int(args[0]) * BLOCK_BYTES;
    if (n_args == 3) {
        offset += mp_obj_get_int(args[2]);
    } else if (operation == SYS_WRITE) {
        for (size_t i = 0; i < buffer.len; i += BLOCK_BYTES) {
            erase((offset + i) / BLOCK_BYTES);
        }
    }
    check(offset <= FLASH_BLOCKS * BLOCK_BYTES && buffer.len <= FLASH_BLOCKS * BLOCK_BYTES - offset);
    transfer(operation, offset, buffer.buf, buffer.len);
    return mp_const_none;
}

static mp_obj_t flash_readblocks(size_t n_args, const mp_obj_t *args) {
    return access(SYS_READ, n_args, args);
}
static MP_DEFINE_CONST_FUN_OBJ_VAR_BETWEEN(flash_readblocks_obj, 2, 3, flash_readblocks);

static mp_obj_t flash_writeblocks(size_t n_args, const mp_obj_t *args) {
    return access(SYS_WRITE, n_args, args);
}
static MP_DEFINE_CONST_FUN_OBJ_VAR_BETWEEN(flash_writeblocks_obj, 2, 3, flash_writeblocks);

static mp_obj_t flash_ioctl(mp_obj_t operation, mp_obj_t argument) {
    open_flash();
    switch (mp_obj_get_int(operation)) {
        case MP_BLOCKDEV_IOCTL_BLOCK_COUNT:
            return MP_OBJ_NEW_SMALL_INT(FLASH_BLOCKS);
        case MP_BLOCKDEV_IOCTL_BLOCK_SIZE:
            return MP_OBJ_NEW_SMALL_INT(BLOCK_BYTES);
        case MP_BLOCKDEV_IOCTL_BLOCK_ERASE:
            erase(mp_obj_get_int(argument));
            return MP_OBJ_NEW_SMALL_INT(0);
        case MP_BLOCKDEV_IOCTL_INIT:
        case MP_BLOCKDEV_IOCTL_DEINIT:
        case MP_BLOCKDEV_IOCTL_SYNC:
            return MP_OBJ_NEW_SMALL_INT(0);
        default:
            return mp_const_none;
    }
}
static MP_DEFINE_CONST_FUN_OBJ_2(flash_ioctl_obj, flash_ioctl);

static const mp_rom_map_elem_t flash_globals_table[] = {
    { MP_ROM_QSTR(MP_QSTR___name__), MP_ROM_QSTR(MP_QSTR_flash) },
    { MP_ROM_QSTR(MP_QSTR_readblocks), MP_ROM_PTR(&flash_readblocks_obj) },
    { MP_ROM_QSTR(MP_QSTR_writeblocks), MP_ROM_PTR(&flash_writeblocks_obj) },
    { MP_ROM_QSTR(MP_QSTR_ioctl), MP_ROM_PTR(&flash_ioctl_obj) },
};
static MP_DEFINE_CONST_DICT(flash_globals, flash_globals_table);

const mp_obj_module_t flash_module = {
    .base = { &mp_type_module },
    .globals = (mp_obj_dict_t *)&flash_globals,
};
MP_REGISTER_MODULE(MP_QSTR_flash, flash_module);
