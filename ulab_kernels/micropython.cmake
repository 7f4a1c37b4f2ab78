# As a user C module of the ports that are built by CMake (rp2, esp32), beside ulab or anything else:
#   USER_C_MODULES="<ulab>/code/micropython.cmake;<ulearn>/ulab_kernels/micropython.cmake"
include_guard(GLOBAL)
add_library(usermod_ulab_kernels INTERFACE)

file(GLOB UL_SOURCES CONFIGURE_DEPENDS ${CMAKE_CURRENT_LIST_DIR}/ul_*.c)
# The .S files are empty on any other architecture than ARMv6-M.
file(GLOB UL_ASSEMBLER CONFIGURE_DEPENDS ${CMAKE_CURRENT_LIST_DIR}/ul_*.S)

target_sources(usermod_ulab_kernels INTERFACE
    ${UL_SOURCES}
    ${UL_ASSEMBLER}
    ${CMAKE_CURRENT_LIST_DIR}/bind_micropython.c
)
target_include_directories(usermod_ulab_kernels INTERFACE ${CMAKE_CURRENT_LIST_DIR})

# MicroPython asks for small code; into these loops the time goes.
foreach(UL_NAME conv depthwise sums four mask runs update_bias)
    set_source_files_properties(${CMAKE_CURRENT_LIST_DIR}/ul_${UL_NAME}.c PROPERTIES COMPILE_OPTIONS -O2)
endforeach()

target_link_libraries(usermod INTERFACE usermod_ulab_kernels)
