// ulab_kernels for MicroPython: run(program, table, first, count[, index[, base]]), from one file as a user C module (built
// into a firmware, beside ulab) and as a native module (MICROPY_ENABLE_DYNRUNTIME). See bind_cpython.c for the face.
#include "ul_core.h"
#include "ul_index.h"

#if defined(MICROPY_ENABLE_DYNRUNTIME)
#include "py/dynruntime.h"
#else
#include "py/obj.h"
#include "py/runtime.h"
#endif

static int writable(int buffer) {
    return buffer == UL_BUF_ARENA || buffer == UL_BUF_TRAIN || buffer == UL_BUF_STATE || buffer == UL_BUF_SCRATCH;
}

static mp_obj_t run(size_t n_args, const mp_obj_t *args) {
    mp_buffer_info_t program;
    mp_get_buffer_raise(args[0], &program, MP_BUFFER_READ);
    size_t count;
    mp_obj_t *items;
    mp_obj_get_array(args[1], &count, &items);
    if (count != UL_BUFFERS) {
        return MP_OBJ_NEW_SMALL_INT(UL_E_BUFFER);
    }
    ul_buffer table[UL_BUFFERS];
    for (int b = 0; b < UL_BUFFERS; b++) {
        table[b].data = NULL;
        table[b].bytes = 0;
        table[b].base = 0;
        table[b].is_part = 0;
        if (items[b] != mp_const_none) {
            mp_buffer_info_t info;
            mp_get_buffer_raise(items[b], &info, writable(b) ? MP_BUFFER_RW : MP_BUFFER_READ);
            table[b].data = info.buf;
            table[b].bytes = info.len;
        }
    }
    const int32_t index = n_args > 4 ? (int32_t)mp_obj_get_int(args[4]) : -1;
    if (n_args > 5) {
        table[UL_BUF_FROZEN].base = (size_t)mp_obj_get_int(args[5]);
        table[UL_BUF_FROZEN].is_part = 1;
    }
    int32_t code = ul_index(program.buf, program.len, table, index);
    if (code == 0) {
        code = ul_run(program.buf, program.len, table, (uint32_t)mp_obj_get_int(args[2]),
            (uint32_t)mp_obj_get_int(args[3]));
    }
    return MP_OBJ_NEW_SMALL_INT(code);
}

#if defined(MICROPY_ENABLE_DYNRUNTIME)

static MP_DEFINE_CONST_FUN_OBJ_VAR_BETWEEN(run_obj, 4, 6, run);

mp_obj_t mpy_init(mp_obj_fun_bc_t *self, size_t n_args, size_t n_kw, mp_obj_t *args) {
    MP_DYNRUNTIME_INIT_ENTRY
    mp_store_global(MP_QSTR_run, MP_OBJ_FROM_PTR(&run_obj));
    MP_DYNRUNTIME_INIT_EXIT
}

#else

static MP_DEFINE_CONST_FUN_OBJ_VAR_BETWEEN(run_obj, 4, 6, run);

static const mp_rom_map_elem_t globals_table[] = {
    {MP_ROM_QSTR(MP_QSTR___name__), MP_ROM_QSTR(MP_QSTR_ulab_kernels)},
    {MP_ROM_QSTR(MP_QSTR_run), MP_ROM_PTR(&run_obj)},
};
static MP_DEFINE_CONST_DICT(globals, globals_table);

const mp_obj_module_t ulab_kernels_module = {
    .base = {&mp_type_module},
    .globals = (mp_obj_dict_t *)&globals,
};
MP_REGISTER_MODULE(MP_QSTR_ulab_kernels, ulab_kernels_module);

#endif
