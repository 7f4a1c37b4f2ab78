"""The folders of real boards: complete, of one word with each other, and what MicroPython's own tools make of them."""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from conftest import HERE
from ulearn_host import costs, emulate

BOARDS = HERE.parent / "boards"
KERNELS = HERE.parent / "ulab_kernels"
RP2 = ("RPI_PICO", "RPI_PICO2", "RPI_PICO2_W", "RPI_PICO_W")
ESP32 = ("ESP32_GENERIC", "ESP32_GENERIC_C3", "ESP32_GENERIC_C6", "ESP32_GENERIC_S3")
REAL = RP2 + ESP32
FACTS = {"romfs_bytes", "flash_bytes", "heap_bytes", "cycles_per_mac"}
FLASH = {"RPI_PICO": 2, "RPI_PICO_W": 2, "RPI_PICO2": 4, "RPI_PICO2_W": 4, "ESP32_GENERIC_S3": 8}  # MiB; others 4
# What the port's own folders keep for the firmware, which ours must leave to it.
CODE = {"RPI_PICO": 640, "RPI_PICO_W": 1200, "RPI_PICO2": 1024, "RPI_PICO2_W": 1536}


def micropython_source() -> Path:
    """MicroPython's source tree as the boards are built from it."""
    folder = emulate.cache_dir() / "micropython-src"
    if not folder.is_dir():
        pytest.skip("not a Debian system: MicroPython's source is not here")
    return folder


def settings(name: str) -> dict[str, str]:
    """What a board's mpconfigboard.cmake sets."""
    text = (BOARDS / name / "mpconfigboard.cmake").read_text()
    return dict(re.findall(r"^set\((\w+) ([^) ]+)\)", text, re.M))


def partitions(name: str) -> dict[str, tuple[int, int]]:
    """Offset and size of each partition."""
    lines = (BOARDS / name / "partitions.csv").read_text().splitlines()
    rows = csv.reader((line for line in lines if not line.startswith("#")), skipinitialspace=True)
    return {row[0]: (int(row[3], 16), int(row[4], 16)) for row in rows}


@pytest.mark.parametrize("name", REAL)
def test_what_this_folder_builds_is_described(name: str) -> None:
    """Facts of the firmware with a ROMFS beside those of the stock one, each with its source or said to be unknown."""
    facts: dict[str, Any] = emulate.board_facts(name)["firmware"]
    assert set(facts) == {*FACTS, "known_by"} and set(facts["known_by"]) == FACTS
    for fact in FACTS:
        assert (facts[fact] is None) == facts["known_by"][fact].startswith("not known"), fact


def test_every_real_board_has_its_folder() -> None:
    """Those that are listed here are those that inspect lists."""
    emulated = set(emulate.emulated_boards())
    assert {board["board"] for board in costs.boards()} - emulated == set(REAL)


@pytest.mark.parametrize("name", RP2)
def test_flash_of_a_pico(name: str) -> None:
    """ROMFS and file system share what the port gives to the latter, in whole sectors; board.json says the same."""
    facts, found = emulate.board_facts(name), settings(name)
    rom, storage = int(found["MICROPY_HW_ROMFS_BYTES"]), int(found["MICROPY_HW_FLASH_STORAGE_BYTES"])
    assert rom + storage == facts["flash_bytes"] == FLASH[name] * 2**20 - CODE[name] * 1024
    assert not rom % 4096 and not storage % 4096
    assert (facts["firmware"]["romfs_bytes"], facts["firmware"]["flash_bytes"]) == (rom, storage)


@pytest.mark.parametrize("name", ESP32)
def test_flash_of_an_esp32(name: str) -> None:
    """As the port's own table, whose file system gives its first part to the ROMFS; the chip maps pages of 64 KiB."""
    facts, found = emulate.board_facts(name), partitions(name)
    end = 0
    for offset, size in found.values():
        assert offset >= end
        end = offset + size
    size = FLASH.get(name, 4)
    assert end == size * 2**20
    assert not found["romfs"][0] % 0x10000 and not found["romfs"][1] % 0x10000
    assert (facts["firmware"]["romfs_bytes"], facts["firmware"]["flash_bytes"]) == (found["romfs"][1], found["vfs"][1])
    assert found["romfs"][1] + found["vfs"][1] == facts["flash_bytes"]
    port = (micropython_source() / "ports" / "esp32" / f"partitions-{size}MiB.csv").read_text()
    for row in ("nvs", "phy_init", "factory"):
        stock = next(line.split(",") for line in port.splitlines() if line.startswith(f"{row},"))
        assert found[row] == (int(stock[3], 16), int(stock[4], 16))


@pytest.mark.parametrize("name", REAL)
def test_manifest_freezes_the_package(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """MicroPython's own reader finds every file, beside what the port freezes itself; what micropython-lib holds, which
    Debian's source package lacks, is only noted."""
    source = micropython_source()
    monkeypatch.syspath_prepend(str(source / "tools"))
    import manifestfile

    required: list[str] = []
    monkeypatch.setattr(manifestfile.ManifestFile, "require", lambda self, name, **_: required.append(name))
    port = source / "ports" / ("rp2" if name in RP2 else "esp32")
    places = {"MPY_LIB_DIR": "", "MPY_DIR": str(source), "PORT_DIR": str(port), "BOARD_DIR": str(BOARDS / name)}
    manifest = manifestfile.ManifestFile(manifestfile.MODE_FREEZE, places)
    manifest.execute(str(BOARDS / name / "manifest.py"))
    frozen = {file.target_path: Path(file.full_path) for file in manifest.files()}
    package = {path.name for path in (HERE.parent / "firmware" / "ulearn").glob("*.py")}
    ours = {target.split("/")[1] for target in frozen if target.startswith("ulearn/")}
    assert ours == {name for name in package if not name.startswith("ulab_")}
    assert all(path.is_file() for path in frozen.values())
    assert "asyncio/core.py" in frozen and "neopixel" in required


def cmake(folder: Path, text: str, *arguments: str) -> str:
    """Configure a project with the real cmake; what it prints."""
    program = shutil.which("cmake")
    if program is None:
        pytest.skip("not a Debian system, or one without the package cmake")
    folder.mkdir(exist_ok=True)
    (folder / "CMakeLists.txt").write_text(text)
    done = subprocess.run(
        [program, "-S", folder, "-B", folder / "build", *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


PROJECT = """
cmake_minimum_required(VERSION 3.13)
project(stub C ASM)
set(MICROPY_DIR {source})
include({source}/py/usermod.cmake)
foreach(file ${{MICROPY_SOURCE_USERMOD}})
    message(STATUS "source ${{file}}")
endforeach()
message(STATUS "include ${{MICROPY_INC_USERMOD}}")
file(WRITE ${{CMAKE_BINARY_DIR}}/port.c "int main(void) {{ return 0; }}")
add_library(kernels STATIC ${{CMAKE_BINARY_DIR}}/port.c)
target_sources(kernels PRIVATE {core})
target_include_directories(kernels PRIVATE ${{MICROPY_INC_USERMOD}})
"""


def test_the_kernels_are_a_user_module_of_cmake(tmp_path: Path) -> None:
    """Through MicroPython's own usermod.cmake, named twice and beside another module; the core compiles in it."""
    other = tmp_path / "other.cmake"
    other.write_text("add_library(usermod_other INTERFACE)\ntarget_link_libraries(usermod INTERFACE usermod_other)\n")
    core = " ".join(str(path) for path in sorted(KERNELS.glob("ul_*.c")))
    text = PROJECT.format(source=micropython_source(), core=core)
    hook = KERNELS / "micropython.cmake"
    said = cmake(tmp_path / "stub", text, f"-DUSER_C_MODULES={hook};{other};{hook}")
    found = {Path(line.split()[-1]) for line in said.splitlines() if " source " in line}
    assert found == {*KERNELS.glob("ul_*.c"), *KERNELS.glob("*.S"), KERNELS / "bind_micropython.c"}
    assert f"include {KERNELS}" in said and "usermod_ulab_kernels" in said and "usermod_other" in said
    subprocess.run(["cmake", "--build", tmp_path / "stub" / "build"], check=True, capture_output=True, timeout=300)


CONFIG = """
cmake_minimum_required(VERSION 3.13)
set(MICROPY_PORT_DIR {port})
include({board}/mpconfigboard.cmake)
foreach(name MICROPY_BOARD_DIR MICROPY_FROZEN_MANIFEST MICROPY_DEF_BOARD USER_C_MODULES PICO_BOARD IDF_TARGET
        SDKCONFIG_DEFAULTS)
    message(STATUS "${{name}}=${{${{name}}}}")
endforeach()
get_directory_property(folders INCLUDE_DIRECTORIES)
message(STATUS "INCLUDE=${{folders}}")
project(stub NONE)
"""


def configured(name: str, tmp_path: Path) -> dict[str, str]:
    """What a board's mpconfigboard.cmake leaves, read as the port's CMakeLists.txt reads it."""
    port = micropython_source() / "ports" / ("rp2" if name in RP2 else "esp32")
    (tmp_path / "boards").symlink_to(port / "boards")  # the port's files name each other from the port's folder
    said = cmake(
        tmp_path,
        CONFIG.format(port=port, board=BOARDS / name),
        f"-DMICROPY_BOARD={name}",
        f"-DMICROPY_BOARD_DIR={BOARDS / name}",
    )
    return dict(re.findall(r"^-- (\w+)=(.*)$", said, re.M))


@pytest.mark.parametrize("name", RP2)
def test_configuration_of_a_pico(name: str, tmp_path: Path) -> None:
    """The port's own board with our sizes, package and kernels; the header turns MICROPY_VFS_ROM on."""
    found = configured(name, tmp_path)
    port = micropython_source() / "ports" / "rp2"
    assert found["MICROPY_BOARD_DIR"] == str(port / "boards" / name)
    assert found["MICROPY_FROZEN_MANIFEST"] == str(BOARDS / name / "manifest.py")
    assert os.path.realpath(found["USER_C_MODULES"]) == str(KERNELS / "micropython.cmake")
    assert found["INCLUDE"] == str(BOARDS / name) and found["PICO_BOARD"]
    # The preprocessor has the last word, with the folders in the port's order.
    text = "#define PICO_FLASH_SIZE_BYTES 0\n#include <mpconfigboard.h>\n"
    text += "#if !(MICROPY_HW_ROMFS_BYTES > 0)\n#error no ROMFS\n#endif\nstorage MICROPY_HW_FLASH_STORAGE_BYTES\n"
    text += "rom MICROPY_HW_ROMFS_BYTES\n"
    line = ["cc", "-E", "-P", "-", f"-I{found['INCLUDE']}", f"-I{port}"]
    line += [f"-D{define}" for define in found["MICROPY_DEF_BOARD"].split(";")]
    done = subprocess.run(line, input=text, capture_output=True, text=True, check=True)
    values = dict(re.findall(r"^(storage|rom) \((\d+)\)$", done.stdout, re.M))
    wanted = settings(name)
    assert values["storage"] == wanted["MICROPY_HW_FLASH_STORAGE_BYTES"]
    assert values["rom"] == wanted["MICROPY_HW_ROMFS_BYTES"]


@pytest.mark.parametrize("name", ESP32)
def test_configuration_of_an_esp32(name: str, tmp_path: Path) -> None:
    """The port's own board; the last of the sdkconfig files names our partition table."""
    found = configured(name, tmp_path)
    assert Path(found["MICROPY_BOARD_DIR"]).resolve() == micropython_source() / "ports" / "esp32" / "boards" / name
    assert found["MICROPY_FROZEN_MANIFEST"] == str(BOARDS / name / "manifest.py")
    assert "MICROPY_VFS_ROM=1" in found["MICROPY_DEF_BOARD"].split(";")
    *stock, last = found["SDKCONFIG_DEFAULTS"].split(";")
    assert (
        stock
        and f'CONFIG_PARTITION_TABLE_CUSTOM_FILENAME="{BOARDS / name / "partitions.csv"}"' in Path(last).read_text()
    )
