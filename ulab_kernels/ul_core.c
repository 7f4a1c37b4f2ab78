#include "ul_records.h"

typedef char ul_program_layout[sizeof(ul_program) == UL_PROGRAM_BYTES ? 1 : -1];
typedef char ul_record_layout[sizeof(ul_record) == UL_RECORD_BYTES ? 1 : -1];
typedef char ul_state_layout[sizeof(ul_state) == UL_STATE_BYTES ? 1 : -1];
typedef char ul_gradient_layout[sizeof(ul_gradient) == UL_GRADIENT_HEADER ? 1 : -1];

static int is_backward(const ul_record *r) {
    return (r->op >= UL_OP_DENSE_BACK && r->op <= UL_OP_UPDATE_BIAS) || r->op >= UL_OP_CONV_BACK ||
        (r->flags & UL_FLAG_AGAIN);
}

// Whether the gates let a record run: its own, or with GATE_DEEPER any from its own on.
static int gate_open(const ul_buffer *table, const ul_record *r) {
    if (r->gate == 0) {
        return 1;
    }
    const uint8_t *const state = table[UL_BUF_STATE].data;
    if (!(r->flags & UL_FLAG_GATE_DEEPER)) {
        return state[r->gate] != 0;
    }
    const ul_state *const s = ul_state_of(table);
    for (uint32_t i = r->gate; i < (uint32_t)s->gates + s->n_gates && i < table[UL_BUF_STATE].bytes; i++) {
        if (state[i]) {
            return 1;
        }
    }
    return 0;
}

// A native module holds some of these parts, so that a board's heap holds what its plan needs: see Makefile, and
// firmware/ulearn/loader.py, which chooses. What belongs to none is in all of them.
#define UL_PART_IMAGES 1
#define UL_PART_BRANCHES 2
#define UL_PART_LAST 4 // trains a last layer
#define UL_PART_HEAD 8 // trains dense layers behind each other
#define UL_PART_TRAINING 16
#if !defined(UL_PARTS)
#define UL_PARTS 31
#endif
#define HAS(part, code) ((UL_PARTS & (part)) && r->op == (code))

// An if chain: on armv6m a switch may become a jump table, which a native module cannot relocate.
static int32_t run_record(const ul_buffer *table, const ul_record *r) {
    if (r->op == UL_OP_DENSE) {
        ul_dense(table, r);
    } else if (r->op == UL_OP_RELU) {
        ul_relu(table, r);
    } else if (r->op == UL_OP_CONV) {
        ul_conv(table, r);
    } else if (r->op == UL_OP_SOFTMAX) {
        ul_softmax(table, r);
    } else if (r->op == UL_OP_COPY) {
        ul_copy(table, r);
    } else if (r->op == UL_OP_TABLE) {
        ul_table(table, r);
    } else if (HAS(UL_PART_IMAGES, UL_OP_DEPTHWISE)) {
        ul_depthwise(table, r);
    } else if (HAS(UL_PART_IMAGES, UL_OP_AVERAGE_POOL) || HAS(UL_PART_IMAGES, UL_OP_MAX_POOL)) {
        ul_pool(table, r);
    } else if (HAS(UL_PART_IMAGES, UL_OP_MEAN)) {
        ul_mean(table, r);
    } else if (HAS(UL_PART_IMAGES, UL_OP_PAD)) {
        ul_pad(table, r);
    } else if (HAS(UL_PART_BRANCHES, UL_OP_ADD)) {
        ul_add(table, r);
    } else if (HAS(UL_PART_BRANCHES, UL_OP_MUL)) {
        ul_mul(table, r);
    } else if (HAS(UL_PART_LAST, UL_OP_SOFTMAX_CE)) {
        return ul_softmax_ce(table, r);
    } else if (HAS(UL_PART_LAST, UL_OP_UPDATE_WEIGHT)) {
        ul_update_weight(table, r);
    } else if (HAS(UL_PART_LAST, UL_OP_UPDATE_BIAS)) {
        ul_update_bias(table, r);
    } else if (HAS(UL_PART_HEAD, UL_OP_MSE)) {
        ul_mse(table, r);
    } else if (HAS(UL_PART_HEAD, UL_OP_HINGE)) {
        return ul_hinge(table, r);
    } else if (HAS(UL_PART_HEAD, UL_OP_DENSE_BACK)) {
        ul_dense_back(table, r);
    } else if (HAS(UL_PART_HEAD, UL_OP_MASK)) {
        ul_mask(table, r);
    } else if (HAS(UL_PART_HEAD, UL_OP_RELU_BACK)) {
        ul_relu_back(table, r);
    } else if (HAS(UL_PART_TRAINING, UL_OP_CONV_TRAINED)) {
        ul_conv_trained(table, r);
    } else if (HAS(UL_PART_TRAINING, UL_OP_DEPTHWISE_TRAINED)) {
        ul_depthwise_trained(table, r);
    } else if (HAS(UL_PART_TRAINING, UL_OP_CONV_BACK)) {
        ul_conv_back(table, r);
    } else if (HAS(UL_PART_TRAINING, UL_OP_DEPTHWISE_BACK)) {
        ul_depthwise_back(table, r);
    } else if (HAS(UL_PART_TRAINING, UL_OP_UPDATE_CONV)) {
        ul_update_conv(table, r);
    } else if (HAS(UL_PART_TRAINING, UL_OP_UPDATE_DEPTHWISE)) {
        ul_update_depthwise(table, r);
    } else if (HAS(UL_PART_TRAINING, UL_OP_AVERAGE_BACK) || HAS(UL_PART_TRAINING, UL_OP_MAX_BACK)) {
        ul_pool_back(table, r);
    } else if (HAS(UL_PART_TRAINING, UL_OP_SCALE_BACK)) {
        ul_scale_back(table, r);
    } else if (HAS(UL_PART_TRAINING, UL_OP_CROP)) {
        ul_crop(table, r);
    } else if (HAS(UL_PART_TRAINING, UL_OP_SUM)) {
        ul_sum(table, r);
    } else {
        return UL_E_RECORD;
    }
    return 0;
}

int32_t ul_run(const void *program, size_t bytes, const ul_buffer table[UL_BUFFERS], uint32_t first, uint32_t count) {
    const ul_program *const p = (const ul_program *)program;
    if ((uintptr_t)program & 3) {
        return UL_E_ALIGNMENT;
    }
    if (bytes < UL_PROGRAM_BYTES || bytes - UL_PROGRAM_BYTES < (size_t)p->n_records * UL_RECORD_BYTES) {
        return UL_E_BUFFER;
    }
    if (first > p->n_records || count > p->n_records - first) {
        return UL_E_RANGE;
    }
    for (int b = 0; b < UL_BUFFERS; b++) {
        if ((table[b].bytes < p->sizes[b] && !table[b].is_part) || (table[b].data == NULL && p->sizes[b])) {
            return UL_E_BUFFER;
        }
        if (b != UL_BUF_INPUT && b != UL_BUF_TARGET && ((uintptr_t)table[b].data & 3)) {
            return UL_E_ALIGNMENT;
        }
    }
    const ul_record *const records = (const ul_record *)(const void *)((const uint8_t *)program + UL_PROGRAM_BYTES);
    for (uint32_t i = first; i < first + count; i++) {
        const ul_record *const r = &records[i];
        if (is_backward(r) && ((ul_state_of(table)->flags & UL_STATE_NOTHING_TO_LEARN) || !gate_open(table, r))) {
            continue;
        }
        const int32_t code = run_record(table, r);
        if (code < 0) {
            return code;
        }
    }
    return (int32_t)count;
}
