// The canonical ABI by hand, as far as the adapter needs it: strings and lists as (pointer, length), resources whose
// representation is a pointer into this memory, and an arena.
//
// Everything lives in the arena, and nothing is freed one by one: when the guest holds no resource any more at the end
// of an exchange, the arena is emptied as a whole.
#pragma once
#include "wasm.h"

#define TYPES "wasi:http/types@0.2.12"

// Resources that the guest holds.
extern uint32_t live;

void *take_room(size_t size);
void empty_arena(void);
// Where the arena ends now, and back to there: what was taken since is not needed any more.
void *arena_mark(void);
void arena_back(const void *mark);

int same(text a, text b);
// Whether every byte may stand in an RFC 9110 token, and there is one.
int is_token(text t);
// Whether there is a byte, and none is a space, a control character or one of `but`.
int is_word(text t, const char *but);

static inline char *put(char *at, text t) {
    __builtin_memcpy(at, t.data, t.size);
    return at + t.size;
}

// The number in decimal, in the arena.
text decimal(uint64_t number);
uint32_t number_of(text decimal);

// A resource of an interface that is exported, and its handles.
#define HANDLES(interface, id, name)                                                                                   \
    IMPORT("[export]" interface, "[resource-new]" name) int32_t id##_new(id *it);                                      \
    IMPORT("[export]" interface, "[resource-rep]" name) id *id##_rep(int32_t handle);                                  \
    IMPORT("[export]" interface, "[resource-drop]" name) void id##_drop(int32_t handle);

// A resource of wasi:http/types: `id_give` makes a handle for the guest, `id_take` ends one and leaves what it stood for.
#define RESOURCE(id, name)                                                                                             \
    HANDLES(TYPES, id, name)                                                                                           \
    __attribute__((unused)) static int32_t id##_give(id *it) {                                                         \
        live++;                                                                                                        \
        return id##_new(it);                                                                                           \
    }                                                                                                                  \
    __attribute__((unused)) static id *id##_take(int32_t handle) {                                                     \
        id *it = id##_rep(handle);                                                                                     \
        id##_drop(handle);                                                                                             \
        return it;                                                                                                     \
    }

// The destructor of a resource, once for each.
#define DESTRUCTOR(id, name)                                                                                           \
    EXPORT(TYPES "#[dtor]" name) void id##_dtor(id *it) {                                                              \
        (void)it;                                                                                                      \
        live--;                                                                                                        \
    }

#define METHOD(name) EXPORT(TYPES "#[method]" name)
#define CONSTRUCTOR(name) EXPORT(TYPES "#[constructor]" name)
#define STATIC(name) EXPORT(TYPES "#[static]" name)

// option<string>, option<own>, result<own>: a tag byte, then the value at 4.
typedef struct {
    uint8_t some;
    text value;
} optional_text;

typedef struct {
    uint8_t failed;
    int32_t handle;
} handle_or_nothing;

optional_text *some_text(text t);
handle_or_nothing *ok_handle(int32_t handle);
handle_or_nothing *no_handle(void);

// variant method: the tag, and the name of `other`.
typedef struct {
    uint8_t tag;
    text other;
} method;

#define METHOD_OTHER 9

extern const text method_names[METHOD_OTHER];

// variant scheme: 0 HTTP, 1 HTTPS, 2 other; `scheme_none` stands for no scheme.
typedef struct {
    uint8_t tag;
    text other;
} scheme;

typedef struct {
    uint8_t some;
    scheme value;
} optional_scheme;

// variant error-code as results hold it. Cases that carry something are made with nothing in it (all zero: `none`).
typedef struct {
    uint8_t tag;
    uint64_t payload[3];
} error_code;

_Static_assert(sizeof(error_code) == 32, "error-code has 32 bytes");

typedef struct {
    uint8_t failed;
    error_code error;
} nothing_or_error;

#define ERROR_CONNECTION_TERMINATED 7
#define ERROR_RESPONSE_HEAD_SIZE 26
#define ERROR_INTERNAL 38
