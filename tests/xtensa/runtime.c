// As much of MicroPython's runtime as a native module calls, and a loop that runs what tests/xtensa_image.py has laid
// into memory, through the module's own face. The result, memory as it is then, goes to the standard output.
#include "py/nativeglue.h"
#include "py/objfun.h"
#include "py/objlist.h"

enum { BUFFERS = 7, SYS_WRITE = 4 };

typedef struct {
    mp_obj_base_t base;
    void *data;
    uint32_t bytes;
} buffer_t;

typedef struct {
    buffer_t program, table[BUFFERS]; // without data: None
    int32_t first, count, code;
} call_t;

// At a place that is known to the module's relocations, to the host and to this file.
typedef struct {
    mp_fun_table_t table;
    mp_obj_t (*init)(mp_obj_fun_bc_t *self, size_t n_args, size_t n_kw, mp_obj_t *args);
    const mp_obj_fun_builtin_var_t *run;
    mp_obj_base_t none, tuple;
    uint32_t types[3]; // of which only the addresses matter
    uint32_t calls;
    call_t *call;
    uint8_t *end;
} memory_t;
#define MEMORY ((memory_t *)0x100000)
#define TYPE(n) ((const mp_obj_type_t *)&MEMORY->types[n])

static mp_obj_dict_t *swap_globals(mp_obj_dict_t *new_globals) {
    return new_globals;
}

static void store_global(qstr name, mp_obj_t object) {
    (void)name;
    MEMORY->run = MP_OBJ_TO_PTR(object);
}

static const mp_obj_type_t *get_type(mp_const_obj_t object) {
    return ((const mp_obj_base_t *)object)->type;
}

static mp_obj_t new_tuple(size_t n, const mp_obj_t *items) {
    (void)n;
    (void)items;
    return &MEMORY->tuple;
}

static mp_uint_t native_from_obj(mp_obj_t object, mp_uint_t type) {
    (void)type;
    return MP_OBJ_SMALL_INT_VALUE(object);
}

static bool get_buffer(mp_obj_t object, mp_buffer_info_t *info, mp_uint_t flags) {
    (void)flags;
    const buffer_t *const buffer = object;
    info->buf = buffer->data;
    info->len = buffer->bytes;
    return true;
}

static int32_t run(const call_t *call) {
    mp_obj_t items[BUFFERS];
    for (int b = 0; b < BUFFERS; b++) {
        items[b] = call->table[b].data ? (mp_obj_t)&call->table[b] : (mp_obj_t)&MEMORY->none;
    }
    mp_obj_list_t list;
    list.base.type = TYPE(2);
    list.len = BUFFERS;
    list.items = items;
    const mp_obj_t args[] = {(mp_obj_t)&call->program, &list, MP_OBJ_NEW_SMALL_INT(call->first),
        MP_OBJ_NEW_SMALL_INT(call->count)};
    return MP_OBJ_SMALL_INT_VALUE(MEMORY->run->fun.var(4, args));
}

static void write_out(const uint8_t *data, uint32_t bytes) {
    register uint32_t a2 __asm__ ("a2") = SYS_WRITE;
    register uint32_t a3 __asm__ ("a3") = 1;
    register const uint8_t *a4 __asm__ ("a4") = data;
    register uint32_t a5 __asm__ ("a5") = bytes;
    __asm__ volatile (".byte 0x00, 0x51, 0x00" : "+r" (a2), "+r" (a3) : "r" (a4), "r" (a5) : "memory");
}

// The first of the code: the linker jumps here from its beginning.
void mpy_init(void);
void mpy_init(void) {
    memory_t *const m = MEMORY;
    m->none.type = TYPE(0);
    m->tuple.type = TYPE(1);
    m->table.const_none = &m->none;
    m->table.native_from_obj = native_from_obj;
    m->table.swap_globals = swap_globals;
    m->table.store_global = store_global;
    m->table.new_tuple = new_tuple;
    m->table.obj_get_type = get_type;
    m->table.get_buffer = get_buffer;
    m->table.type_list = TYPE(2);
    mp_module_context_t context;
    mp_obj_fun_bc_t self;
    self.context = &context;
    m->init(&self, 0, 0, NULL);
    for (uint32_t i = 0; i < m->calls; i++) {
        m->call[i].code = run(&m->call[i]);
    }
    write_out((const uint8_t *)m->call, m->end - (const uint8_t *)m->call);
}
