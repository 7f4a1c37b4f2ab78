"""MicroPython's linker of native modules, for objects that clang made for Xtensa: it expects those of GCC.

python mpy_ld.py <MicroPython's tools folder> <mpy_ld's arguments>
"""

import struct
import sys

sys.path.insert(0, sys.argv.pop(1))
import mpy_ld  # noqa: E402

_load = mpy_ld.load_object_file


def load_object_file(env, f, name):
    old = {id(section) for section in env.sections + env.literal_sections}
    _load(env, f, name)
    for section in env.sections + env.literal_sections:
        if id(section) in old:
            continue
        if section.name.startswith(".literal"):
            _addends_in_place(section)
        if section.name.startswith(".text"):
            _no_offsets(section)
        # Constants that hold addresses: with GCC their section has this name, and there the linker relocates data.
        if section.reloc and section.name.startswith(".rodata"):
            section.name = ".data.rel.ro"
        # It takes addresses in sections of one name for the same, even in two files.
        section.name += f".{name}"


def _addends_in_place(section):
    # What a literal adds to a section's address stands in the literal itself with GCC, in the relocation with clang.
    data = bytearray(section.data)
    for relocation in section.reloc:
        if relocation.sym.entry["st_info"]["type"] == "STT_SECTION":
            struct.pack_into("<I", data, relocation["r_offset"], relocation["r_addend"])
            relocation.entry["r_addend"] = 0
    section.data = bytes(data)


def _no_offsets(section):
    # The linker adds to what a load of a literal says already, which is nothing with GCC.
    data = bytearray(section.data)
    for relocation in section.reloc:
        if relocation["r_info_type"] == mpy_ld.R_XTENSA_SLOT0_OP:
            at = relocation["r_offset"]
            assert data[at] & 15 == 1, f"{section.filename}: an l32r was expected"
            data[at + 1 : at + 3] = bytes(2)
    section.data = bytes(data)


mpy_ld.load_object_file = load_object_file
mpy_ld.main()
