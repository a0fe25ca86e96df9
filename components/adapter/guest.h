// What the guests of the tests share: the imports that both use, an arena that is emptied for each request, and a page to
// write an answer on. The one that includes this says how large both are: `ROOM_BYTES`, `PAGE_BYTES`.
#pragma once
#include "wasm.h"

#define V "@0.2.3"
#define TYPES "wasi:http/types" V
#define STREAMS "wasi:io/streams" V
#define SPREAD(literal) literal, sizeof(literal) - 1

typedef struct {
    text name;
    text value;
} field;

typedef struct {
    uint8_t tag;
    text value;
} optional;

typedef struct {
    uint8_t tag;
    int32_t handle;
} made;

IMPORT(TYPES, "[constructor]fields") int32_t fields_new(void);
IMPORT(TYPES, "[method]fields.append") void append(int32_t, const char *, size_t, const char *, size_t, uint8_t *);
IMPORT(TYPES, "[method]fields.entries") void entries(int32_t, text *);
IMPORT(TYPES, "[resource-drop]fields") void drop_fields(int32_t);
IMPORT(TYPES, "[method]incoming-request.method") void request_method(int32_t, optional *);
IMPORT(TYPES, "[method]incoming-request.path-with-query") void request_target(int32_t, optional *);
IMPORT(TYPES, "[method]incoming-request.scheme") void request_scheme(int32_t, uint8_t *);
IMPORT(TYPES, "[method]incoming-request.authority") void request_authority(int32_t, optional *);
IMPORT(TYPES, "[method]incoming-request.headers") int32_t request_headers(int32_t);
IMPORT(TYPES, "[method]incoming-request.consume") void consume(int32_t, made *);
IMPORT(TYPES, "[resource-drop]incoming-request") void drop_request(int32_t);
IMPORT(TYPES, "[method]incoming-body.stream") void body_stream(int32_t, made *);
IMPORT(TYPES, "[static]incoming-body.finish") int32_t finish_incoming(int32_t);
IMPORT(TYPES, "[method]future-trailers.get") void get_trailers(int32_t, uint8_t *);
IMPORT(TYPES, "[method]future-trailers.subscribe") int32_t trailers_ready(int32_t);
IMPORT(TYPES, "[resource-drop]future-trailers") void drop_future(int32_t);
IMPORT(TYPES, "[constructor]outgoing-response") int32_t response_new(int32_t);
IMPORT(TYPES, "[method]outgoing-response.set-status-code") int32_t set_status(int32_t, int32_t);
IMPORT(TYPES, "[method]outgoing-response.body") void response_body(int32_t, made *);
IMPORT(TYPES, "[method]outgoing-body.write") void body_write(int32_t, made *);
IMPORT(TYPES, "[static]outgoing-body.finish") void finish_outgoing(int32_t, int32_t, int32_t, void *);
IMPORT(TYPES, "[resource-drop]outgoing-body") void drop_body(int32_t);
IMPORT(TYPES, "[static]response-outparam.set")
void set_response(int32_t, int32_t, int32_t, int32_t, int64_t, int32_t, int32_t, int32_t, int32_t);
IMPORT(TYPES, "[resource-drop]response-outparam") void drop_outparam(int32_t);
IMPORT("wasi:io/error" V, "[resource-drop]error") void drop_io_error(int32_t);
IMPORT("wasi:io/poll" V, "[method]pollable.block") void block(int32_t);
IMPORT("wasi:io/poll" V, "[resource-drop]pollable") void drop_pollable(int32_t);
IMPORT(STREAMS, "[method]input-stream.blocking-read") void blocking_read(int32_t, uint64_t, void *);
IMPORT(STREAMS, "[method]output-stream.blocking-write-and-flush")
void blocking_write(int32_t, const char *, size_t, void *);
IMPORT(STREAMS, "[method]output-stream.check-write") void check_write(int32_t, void *);
IMPORT(STREAMS, "[method]output-stream.write") void write_some(int32_t, const char *, size_t, void *);
IMPORT(STREAMS, "[resource-drop]input-stream") void drop_input(int32_t);
IMPORT(STREAMS, "[resource-drop]output-stream") void drop_output(int32_t);

static char room[ROOM_BYTES] __attribute__((aligned(8)));
static size_t used;

EXPORT("cabi_realloc") void *cabi_realloc(void *old, size_t old_size, size_t align, size_t size) {
    (void)old, (void)old_size;
    used = (used + align - 1) & ~(align - 1);
    if (size > sizeof room - used) __builtin_trap();
    used += size;
    return room + used - size;
}

__attribute__((unused)) static int32_t must(made it) {
    if (it.tag) __builtin_trap();
    return it.handle;
}

static uint32_t number_of(text t) {
    uint32_t number = 0;
    for (size_t i = 0; i < t.size; i++) number = number * 10 + (uint32_t)(t.data[i] - '0');
    return number;
}

static char page[PAGE_BYTES];
static size_t written;

static void say(text t) {
    if (t.size > sizeof page - written) __builtin_trap();
    __builtin_memcpy(page + written, t.data, t.size);
    written += t.size;
}

static void say_number(uint32_t number) {
    char digits[10], *at = digits + sizeof digits;
    do *--at = (char)('0' + number % 10);
    while (number /= 10);
    say((text){at, (size_t)(digits + sizeof digits - at)});
}

// A line for each field, which are dropped.
static void list_fields(int32_t these) {
    text list;
    entries(these, &list);
    for (size_t i = 0; i < list.size; i++) {
        const field *line = (const field *)list.data + i;
        say(line->name), say(TEXT("=")), say(line->value), say(TEXT("\n"));
    }
    drop_fields(these);
}

// The request as it arrived: method, target, scheme and authority, then its fields.
__attribute__((unused)) static void describe(int32_t request) {
    static const text methods[] = {TEXT("get"),     TEXT("head"),    TEXT("post"),  TEXT("put"),  TEXT("delete"),
                                   TEXT("connect"), TEXT("options"), TEXT("trace"), TEXT("patch")};
    optional it;
    uint8_t scheme[16];
    request_method(request, &it);
    if (it.tag > 8) say(TEXT("other "));
    say(it.tag < 9 ? methods[it.tag] : it.value), say(TEXT(" "));
    request_target(request, &it);
    say(it.tag ? it.value : TEXT("-")), say(TEXT(" "));
    request_scheme(request, scheme);
    say(!scheme[0] ? TEXT("-") : scheme[4] ? TEXT("https") : TEXT("http")), say(TEXT(" "));
    request_authority(request, &it);
    say(it.tag ? it.value : TEXT("-")), say(TEXT("\n"));
    list_fields(request_headers(request));
}
