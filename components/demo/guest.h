// The canonical ABI by hand, as far as these examples need it: strings and lists as (pointer, length), and an arena
// that lives as long as one call. The generated form of the same comes from wit-bindgen.
#pragma once
#include <stddef.h>
#include <stdint.h>

#define EXPORT(name) __attribute__((export_name(name)))

typedef struct {
    const char *data;
    size_t size;
} text;

#define TEXT(literal) ((text){literal, sizeof(literal) - 1})

// result<_, string> in memory: the tag at 0, the string of the error at 4.
typedef struct {
    uint8_t failed;
    text error;
} outcome;

extern uint8_t __heap_base;
static uintptr_t arena_top;

static inline void arena_reset(void) { arena_top = 0; }

// Called by the host's side to place arguments. Growing in place is not offered: nothing asks for it here.
EXPORT("cabi_realloc") void *cabi_realloc(void *old, size_t old_size, size_t align, size_t size) {
    uintptr_t start = arena_top ? arena_top : (uintptr_t)&__heap_base;
    start = (start + align - 1) & ~(uintptr_t)(align - 1);
    if (old != NULL || old_size != 0 || start + size < start) __builtin_trap();
    uintptr_t have = __builtin_wasm_memory_size(0) << 16;
    if (start + size > have) {
        size_t pages = (start + size - have + 0xffff) >> 16;
        if (__builtin_wasm_memory_grow(0, pages) == (size_t)-1) __builtin_trap();
    }
    arena_top = start + size;
    return (void *)start;
}

static inline int same(text a, text b) {
    if (a.size != b.size) return 0;
    for (size_t i = 0; i < a.size; i++)
        if (a.data[i] != b.data[i]) return 0;
    return 1;
}

static inline int starts_with(text a, text head) {
    return a.size >= head.size && same((text){a.data, head.size}, head);
}
