// The half that calls the guest: the request's head to the first half, its handles to the guest, the answer's head back.
#include <stddef.h>
#include <stdint.h>

#define EXPORT(name) __attribute__((export_name(name)))
#define IMPORT(module, name) __attribute__((import_module(module), import_name(name)))

typedef struct {
    const char *data;
    size_t size;
} text;

typedef struct {
    int32_t request;
    int32_t outparam;
} begun;

IMPORT("wasmfleet:adapter/exchange@0.1.0", "begin") void begin(const char *data, size_t size, begun *both);
IMPORT("wasmfleet:adapter/exchange@0.1.0", "finish") void finish(text *head);
IMPORT("wasmfleet:adapter/exchange@0.1.0", "flush") void flush(void);
IMPORT("wasi:http/incoming-handler@0.2.12", "handle") void handle(int32_t request, int32_t outparam);

extern uint8_t __heap_base;
static uintptr_t top;

// Room for one exchange's two heads.
EXPORT("cabi_realloc") void *cabi_realloc(void *old, size_t old_size, size_t align, size_t size) {
    (void)align;
    if (old != NULL || old_size != 0) __builtin_trap();
    uintptr_t start = top ? top : (uintptr_t)&__heap_base;
    if (start + size < start) __builtin_trap();
    uintptr_t have = __builtin_wasm_memory_size(0) << 16;
    if (start + size > have && __builtin_wasm_memory_grow(0, (start + size - have + 0xffff) >> 16) == (size_t)-1)
        __builtin_trap();
    top = start + size;
    return (void *)start;
}

static text answer;

EXPORT("wasmfleet:adapter/bridge@0.1.0#handle") text *bridge_handle(const char *data, size_t size) {
    begun both;
    begin(data, size, &both);
    handle(both.request, both.outparam);
    finish(&answer);
    return &answer;
}

EXPORT("cabi_post_wasmfleet:adapter/bridge@0.1.0#handle") void bridge_handle_post(text *read) {
    (void)read;
    top = 0;
}

EXPORT("wasmfleet:adapter/bridge@0.1.0#flush") void bridge_flush(void) { flush(); }
