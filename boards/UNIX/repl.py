# A raw REPL on stdin and stdout, as a board has it: the Unix port before 1.27 has none, and mpremote
# needs one. The folder it is started in becomes the board's file system. Ends with 0 for a soft reset.
import io
import os
import sys

import micropython
import vfs

_WINDOW = micropython.const(32768)  # bytes the host may send in raw-paste mode before it must wait

read = sys.stdin.buffer.read
write = sys.stdout.buffer.write


def next_byte():
    c = read(1)
    if not c:
        sys.exit(1)  # the wire is gone
    return c


def paste():
    # Raw paste: the whole program with flow control, until Ctrl-D (or Ctrl-C, which drops it).
    next_byte(), next_byte()  # "A", Ctrl-A
    write(b"R\x01" + _WINDOW.to_bytes(2, "little") + b"\x01")
    code = bytearray()
    while True:
        c = next_byte()
        if c == b"\x03" or c == b"\x04":
            write(b"\x04")
            return code if c == b"\x04" else b"raise KeyboardInterrupt"
        code += c
        if len(code) % _WINDOW == 0:
            write(b"\x01")


def run(code, names):
    # True when the code asked for a soft reset.
    reset, error = False, None
    try:
        micropython.kbd_intr(3)
        exec(code, names)
    except SystemExit:
        reset = True
    except BaseException as e:
        error = e
    write(b"\x04")
    if error:
        text = io.StringIO()
        sys.print_exception(error, text)
        for line in text.getvalue().split("\n")[:-1]:
            if __file__ not in line:  # our own frame is no part of the program
                write(line + "\r\n")
    write(b"\x04")
    return reset


def serve(raw):
    names = {"__name__": "__main__"}
    write(b"raw REPL; CTRL-B to exit\r\n>" if raw else b"MicroPython\r\n>>> ")
    code = bytearray()
    while True:
        c = next_byte()
        if c == b"\x01":
            raw = True
            write(b"raw REPL; CTRL-B to exit\r\n>")
        elif c == b"\x02":
            raw = False
            write(b"\r\nMicroPython\r\n>>> ")
        elif c == b"\x03":
            write(b"" if raw else b"\r\n>>> ")
        elif c == b"\x04" and not code:
            write(b"OK\r\nMPY: soft reboot\r\n" if raw else b"\r\nMPY: soft reboot\r\n")
            return
        elif raw and c == b"\x05" and not code:
            if run(paste(), names):
                return
            write(b">")
        elif raw and c == b"\x04":
            write(b"OK")
            if run(bytes(code), names):
                return
            write(b">")
        elif raw:
            code += c
            continue
        code = bytearray()


# Absolute paths, too, lead into the board's own folder.
folder = os.getcwd()
vfs.umount("/")
vfs.mount(vfs.VfsPosix(folder), "/")
os.chdir("/")
sys.path[:] = ["", ".frozen", "/lib"]
while True:
    try:
        serve("raw" in sys.argv)
        sys.exit(0)
    except KeyboardInterrupt:
        pass  # interrupted between two programs
