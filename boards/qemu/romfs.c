// A ROMFS for boards that say MICROPY_VFS_ROM: memory behind their RAM (memory.ld), which stands for flash that can be
// read where it is. What it holds is kept in a file "romfs.bin" beside flash.bin, byte for byte as it is written: an
// image that is cut short is cut short after a power cut, too.
#include <string.h>
#include "extmod/vfs.h"
#include "py/mperrno.h"
#include "py/mphal.h"
#include "py/objarray.h"
#include "py/runtime.h"

#if MICROPY_VFS_ROM

#define ERASE_BYTES 4096
#define WRITE_BYTES 4

extern uint8_t _romfs[], _romfs_end[];
#define ROMFS_BYTES ((size_t)(_romfs_end - _romfs))

static intptr_t file; // 0: not open yet
static mp_obj_array_t segment; // its memory as a memoryview: as good after a soft reset

// Read or write a part of the file, from or to the same place in memory.
static bool transfer(uintptr_t operation, size_t offset, size_t len) {
    const uintptr_t place[] = {file, offset};
    const uintptr_t arguments[] = {file, (uintptr_t)_romfs + offset, len};
    return semihosting(SYS_SEEK, place) == 0 && semihosting(operation, arguments) == 0;
}

static bool fill(void) {
    if (file > 0) {
        return true;
    }
    memset(_romfs, 0xff, ROMFS_BYTES);
    file = host_open("romfs.bin", FILE_UPDATE);
    if (file > 0) {
        const uintptr_t arguments[] = {file};
        const size_t size = semihosting(SYS_FLEN, arguments);
        return size <= ROMFS_BYTES && transfer(SYS_READ, 0, size);
    }
    file = host_open("romfs.bin", FILE_CREATE);
    return file > 0 && transfer(SYS_WRITE, 0, ROMFS_BYTES);
}

static mp_int_t erase(size_t len) {
    len = (len + ERASE_BYTES - 1) / ERASE_BYTES * ERASE_BYTES;
    if (len > ROMFS_BYTES) {
        return -MP_EINVAL;
    }
    memset(_romfs, 0xff, len);
    return transfer(SYS_WRITE, 0, len) ? WRITE_BYTES : -MP_EIO;
}

static mp_int_t write(size_t offset, mp_obj_t data) {
    mp_buffer_info_t buffer;
    mp_get_buffer_raise(data, &buffer, MP_BUFFER_READ);
    if (offset > ROMFS_BYTES || buffer.len > ROMFS_BYTES - offset || (offset | buffer.len) % WRITE_BYTES) {
        return -MP_EINVAL;
    }
    memcpy(_romfs + offset, buffer.buf, buffer.len);
    return transfer(SYS_WRITE, offset, buffer.len) ? 0 : -MP_EIO;
}

static mp_int_t change(mp_int_t command, size_t n_args, const mp_obj_t *args) {
    if (command == MP_VFS_ROM_IOCTL_WRITE_PREPARE && n_args == 3) {
        return erase(mp_obj_get_int(args[2]));
    }
    if (command == MP_VFS_ROM_IOCTL_WRITE && n_args == 4) {
        return write(mp_obj_get_int(args[2]), args[3]);
    }
    return command == MP_VFS_ROM_IOCTL_WRITE_COMPLETE ? 0 : -MP_EINVAL;
}

mp_obj_t mp_vfs_rom_ioctl(size_t n_args, const mp_obj_t *args) {
    const mp_int_t command = mp_obj_get_int(args[0]);
    if (command == MP_VFS_ROM_IOCTL_GET_NUMBER_OF_SEGMENTS) {
        return MP_OBJ_NEW_SMALL_INT(1);
    }
    if (n_args < 2 || mp_obj_get_int(args[1]) != 0) {
        return MP_OBJ_NEW_SMALL_INT(-MP_EINVAL);
    }
    if (!fill()) {
        return MP_OBJ_NEW_SMALL_INT(-MP_EIO);
    }
    if (command == MP_VFS_ROM_IOCTL_GET_SEGMENT) {
        mp_obj_memoryview_init(&segment, 'B', 0, ROMFS_BYTES, _romfs);
        return MP_OBJ_FROM_PTR(&segment);
    }
    return MP_OBJ_NEW_SMALL_INT(change(command, n_args, args));
}

#endif // MICROPY_VFS_ROM
