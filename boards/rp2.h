// After the port's own mpconfigboard.h: the file system makes room for a ROMFS (see rp2.cmake).
#undef MICROPY_HW_FLASH_STORAGE_BYTES
#define MICROPY_HW_FLASH_STORAGE_BYTES (ULEARN_STORAGE_BYTES)
#undef MICROPY_HW_ROMFS_BYTES
#define MICROPY_HW_ROMFS_BYTES (ULEARN_ROMFS_BYTES) // not 0: the port turns MICROPY_VFS_ROM on
