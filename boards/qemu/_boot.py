# Mount the flash as every board does, and format it when it is empty.
import flash
import vfs

try:
    fs = vfs.VfsLfs2(flash, progsize=256)
except OSError:
    vfs.VfsLfs2.mkfs(flash, progsize=256)
    fs = vfs.VfsLfs2(flash, progsize=256)
vfs.mount(fs, "/")
del vfs, flash, fs
