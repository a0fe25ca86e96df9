// The demo's HTTP component in three versions: -DVERSION='"1"' names it in the answers.
//
//   any request      200, "hello from vN\n", with the header x-version: N
//   /echo            200, the request's body back
//
// With -DCALLS_BEFORE_TRAP=20 it is the bad release: healthy when asked, well for 20 requests, then it traps.
#include "guest.h"

#ifndef VERSION
#define VERSION 1
#endif

// The layouts of the canonical ABI for `request` (flattened, in order) and `response` (in memory).
typedef struct {
    uint16_t status;
    text headers;
    text body;
} response;

static response answer;

#ifdef CALLS_BEFORE_TRAP
static unsigned calls;
#endif

EXPORT("wasmfleet:http/handler@0.1.0#handle")
response *handle(const char *method, size_t method_size, const char *target, size_t target_size, const char *headers,
                 size_t headers_size, const char *body, size_t body_size) {
    (void)method, (void)method_size, (void)headers, (void)headers_size;
#ifdef CALLS_BEFORE_TRAP
    if (++calls > CALLS_BEFORE_TRAP) __builtin_trap();
#endif
    text path = {target, target_size};
    answer.status = 200;
    if (same(path, TEXT("/echo")) || starts_with(path, TEXT("/echo?"))) {
        answer.headers = TEXT("content-type: application/octet-stream\r\nx-version: " VERSION "\r\n");
        answer.body = (text){body, body_size};
    } else {
        answer.headers = TEXT("content-type: text/plain\r\nx-version: " VERSION "\r\n");
        answer.body = TEXT("hello from v" VERSION "\n");
    }
    return &answer;
}

// The answer may point into the arena (the echoed body), so it is emptied only when the host has read the answer.
EXPORT("cabi_post_wasmfleet:http/handler@0.1.0#handle")
void handle_post(response *read) {
    (void)read;
    arena_reset();
}

static outcome well;

EXPORT("wasmfleet:http/health@0.1.0#check")
outcome *check(void) {
    well.failed = 0;
    return &well;
}
