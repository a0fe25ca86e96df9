#include "abi.h"

uint32_t live;

extern uint8_t __heap_base;
static uintptr_t top;

void *take_room(size_t size) {
    uintptr_t start = top ? top : ((uintptr_t)&__heap_base + 7) & ~(uintptr_t)7;
    uintptr_t end = (start + size + 7) & ~(uintptr_t)7;
    if (end < start) __builtin_trap();
    uintptr_t have = __builtin_wasm_memory_size(0) << 16;
    if (end > have && __builtin_wasm_memory_grow(0, (end - have + 0xffff) >> 16) == (size_t)-1) __builtin_trap();
    top = end;
    return (void *)start;
}

void empty_arena(void) { top = 0; }

void *arena_mark(void) { return (void *)top; }

void arena_back(const void *mark) { top = (uintptr_t)mark; }

// The host's side asks for room for arguments; it never grows one.
EXPORT("cabi_realloc") void *cabi_realloc(void *old, size_t old_size, size_t align, size_t size) {
    if (old != NULL || old_size != 0 || align > 8) __builtin_trap();
    return take_room(size);
}

int same(text a, text b) {
    if (a.size != b.size) return 0;
    for (size_t i = 0; i < a.size; i++)
        if (a.data[i] != b.data[i]) return 0;
    return 1;
}

int is_token(text t) {
    // RFC 9110, 5.6.2: a bit for each of the 128 characters
    static const uint32_t allowed[4] = {0, 0x03ff6cfa, 0xc7fffffe, 0x57ffffff};
    for (size_t i = 0; i < t.size; i++) {
        uint8_t c = (uint8_t)t.data[i];
        if (c > 127 || !(allowed[c >> 5] >> (c & 31) & 1)) return 0;
    }
    return t.size > 0;
}

int is_word(text t, const char *but) {
    for (size_t i = 0; i < t.size; i++) {
        uint8_t c = (uint8_t)t.data[i];
        if (c <= ' ' || c == 127) return 0;
        for (const char *b = but; *b; b++)
            if (c == (uint8_t)*b) return 0;
    }
    return t.size > 0;
}

text decimal(uint64_t number) {
    char *end = (char *)take_room(20) + 20, *at = end;
    do *--at = (char)('0' + number % 10);
    while (number /= 10);
    return (text){at, (size_t)(end - at)};
}

uint32_t number_of(text decimal) {
    uint32_t number = 0;
    for (size_t i = 0; i < decimal.size && decimal.data[i] >= '0' && decimal.data[i] <= '9'; i++)
        number = number * 10 + (uint32_t)(decimal.data[i] - '0');
    return number;
}

optional_text *some_text(text t) {
    optional_text *it = take_room(sizeof *it);
    *it = (optional_text){t.size > 0, t};
    return it;
}

handle_or_nothing *ok_handle(int32_t handle) {
    handle_or_nothing *it = take_room(sizeof *it);
    *it = (handle_or_nothing){0, handle};
    return it;
}

handle_or_nothing *no_handle(void) {
    handle_or_nothing *it = take_room(sizeof *it);
    *it = (handle_or_nothing){1, 0};
    return it;
}

const text method_names[METHOD_OTHER] = {
    TEXT("GET"),     TEXT("HEAD"),    TEXT("POST"),  TEXT("PUT"),   TEXT("DELETE"),
    TEXT("CONNECT"), TEXT("OPTIONS"), TEXT("TRACE"), TEXT("PATCH"),
};
