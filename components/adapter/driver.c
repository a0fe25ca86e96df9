// The half that calls the guest: the request's head to the first half, its handles to the guest, the answer's head back.
#include "wasm.h"

typedef struct {
    int32_t request;
    int32_t outparam;
} begun;

IMPORT("wasmfleet:adapter/exchange@0.1.0", "begin") void begin(const char *data, size_t size, begun *both);
IMPORT("wasmfleet:adapter/exchange@0.1.0", "finish") void finish(text *head);
IMPORT("wasmfleet:adapter/exchange@0.1.0", "flush") void flush(void);
// result<tuple<incoming-request, response-outparam>, u32>
typedef struct {
    uint8_t failed;
    union {
        begun both;
        uint32_t turn;
    };
} next_call;

IMPORT("wasmfleet:adapter/exchange@0.1.0", "align") int32_t align(const char *data, size_t size);
IMPORT("wasmfleet:adapter/exchange@0.1.0", "tell") void tell(int32_t of_writes, int32_t of_returns);
IMPORT("wasmfleet:adapter/exchange@0.1.0", "next") void next(int32_t exact, next_call *it);
IMPORT("wasmfleet:adapter/exchange@0.1.0", "reply") uint32_t reply(int32_t last);
IMPORT("wasmfleet:adapter/exchange@0.1.0", "replied") uint32_t replied(void);
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

// The router writes at most four calls into a channel before it has the first one's end.
#define NEAR_THE_END 4
#define CHANNEL_ENDED 1

static uint64_t served(uint32_t calls, uint32_t turn) { return (uint64_t)replied() << 32 | calls << 2 | turn; }

EXPORT("wasmfleet:adapter/bridge@0.1.0#serve")
uint64_t bridge_serve(uint32_t calls, int32_t last, int32_t metered, int32_t prompt, const char *token, size_t size) {
    top = 0;
    tell(metered, prompt);
    if (size && !align(token, size)) return served(0, CHANNEL_ENDED);
    for (uint32_t done = 0; done < calls; done++) {
        next_call it;
        next(last && calls - done <= NEAR_THE_END, &it);
        if (it.failed) return served(done, it.turn);
        handle(it.both.request, it.both.outparam);
        uint32_t turn = reply(last && done + 1 == calls);
        if (turn) return served(done + 1, turn);
    }
    return served(calls, 0);
}
