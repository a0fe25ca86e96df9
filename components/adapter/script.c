// A guest for comparisons of hosts: an ordinary wasi:http component that does what its request's target says.
//
// A target that begins with `/~/` is a list of steps, separated by slashes, its bytes percent-encoded where they must be.
// Any other target is answered as by `/~/r/d/.`. A query is not part of the steps.
//
//   sN           set the status of the answer
//   hNAME:VALUE  append a field to the answer, which has `x-guest: 1` already
//   r            set the answer, as it is by now
//   eN           set an error in its place, by the number of its case, which has no payload
//   o            drop the outparam
//   wTEXT        write and flush; uTEXT: write, do not flush; f: flush
//   bN           write N bytes of a pattern
//   c            close the stream; .  close it and finish the body; tNAME:VALUE  with this trailer; x  drop the body
//   d            write the request: method, target, scheme, authority, a line for each field
//   k            read a piece of the request's body and write it; a  all of it; q  read all of it, write its size
//   z            write the request's trailers, as d writes fields
//   n            write which steps failed
//   !            trap; ;  return, leaving the rest to its drops; X  exit; @  compute without end; pN  sleep N ms
#define ROOM_BYTES (512 * 1024)
#define PAGE_BYTES (192 * 1024)
#include "guest.h"

IMPORT(TYPES, "[resource-drop]incoming-body") void drop_incoming(int32_t);
IMPORT(TYPES, "[resource-drop]outgoing-response") void drop_response(int32_t);
IMPORT(STREAMS, "[method]output-stream.blocking-flush") void blocking_flush(int32_t, uint32_t *);
IMPORT("wasi:clocks/monotonic-clock" V, "subscribe-duration") int32_t after(uint64_t ns);
IMPORT("wasi:cli/exit" V, "exit") void leave(int32_t failed);

static int32_t request, outparam, response, fields, trailers, body, stream, incoming, input;
static int has_request, has_param, has_response, has_fields, has_trailers, has_body, has_stream, has_incoming, has_input;

static char failed[64];
static size_t failures;

static void fail(char step) {
    if (failures < sizeof failed) failed[failures++] = step;
}

// A stream's error: true, and forgotten.
static int broke(const uint32_t *result) {
    if (!(result[0] & 0xff)) return 0;
    if (!(result[1] & 0xff)) drop_io_error((int32_t)result[2]);
    return 1;
}

static void make_response(void) {
    if (!has_response) response = response_new(fields), has_response = 1, has_fields = 0;
}

static void make_body(void) {
    made it;
    if (has_body) return;
    make_response();
    response_body(response, &it);
    body = must(it), has_body = 1;
}

static void open_body(void) {
    made it;
    make_body();
    if (!has_stream) {
        body_write(body, &it);
        stream = must(it), has_stream = 1;
    }
}

static void write_all(char step, text t) {
    uint32_t result[3] = {0};
    open_body();
    while (t.size) {
        size_t size = t.size < 4096 ? t.size : 4096;
        blocking_write(stream, t.data, size, result);
        if (broke(result)) {
            fail(step);
            return;
        }
        t = (text){t.data + size, t.size - size};
    }
}

static void write_page(char step) {
    write_all(step, (text){page, written});
    written = 0;
}

static void open_input(void) {
    made it;
    if (has_input) return;
    consume(request, &it);
    incoming = must(it), has_incoming = 1;
    body_stream(incoming, &it);
    input = must(it), has_input = 1;
}

// Read a piece; false at the end, or at an error, which is a failure.
static int read_piece(char step, text *piece) {
    uint32_t result[3] = {0};
    open_input();
    used = 0;
    blocking_read(input, 64 * 1024, result);
    if (result[0] & 0xff) {
        if (!(result[1] & 0xff)) fail(step);
        broke(result);
        return 0;
    }
    *piece = (text){(const char *)(uintptr_t)result[1], result[2]};
    return 1;
}

static void show_trailers(void) {
    uint8_t result[56] __attribute__((aligned(8)));
    text piece;
    while (read_piece('z', &piece)) {}
    drop_input(input), has_input = 0;
    int32_t future = finish_incoming(incoming), ready = trailers_ready(future);
    has_incoming = 0;
    block(ready);
    drop_pollable(ready);
    get_trailers(future, result);
    if (result[16]) fail('z');
    else if (result[24]) list_fields(*(int32_t *)(result + 28));
    else say(TEXT("none\n"));
    drop_future(future);
}

static void add_field(char step, int32_t to, text t) {
    uint8_t result[8];
    size_t colon = 0;
    while (colon < t.size && t.data[colon] != ':') colon++;
    if (colon == t.size) __builtin_trap();
    append(to, t.data, colon, t.data + colon + 1, t.size - colon - 1, result);
    if (result[0]) fail(step);
}

static void close_stream(void) {
    if (has_stream) drop_output(stream), has_stream = 0;
}

static void finish(void) {
    uint64_t result[8];
    make_body();
    close_stream();
    finish_outgoing(body, has_trailers, trailers, result);
    has_body = has_trailers = 0;
    if (*(uint8_t *)result) fail('.');
}

static void write_pattern(uint32_t size) {
    static char block_of[4096];
    for (uint32_t n = 0; size; n++) {
        size_t part = size < sizeof block_of ? size : sizeof block_of;
        for (size_t i = 0; i < sizeof block_of; i += 4) *(uint32_t *)(block_of + i) = n * 1024 + (uint32_t)i;
        write_all('b', (text){block_of, part});
        if (failures) return;
        size -= (uint32_t)part;
    }
}

static void pause(uint32_t ms) {
    int32_t over = after((uint64_t)ms * 1000000);
    block(over);
    drop_pollable(over);
}

static void step(char what, text t) {
    uint32_t result[3] = {0}, size = 0;
    text piece;
    switch (what) {
    case 's':
        make_response();
        if (set_status(response, (int32_t)number_of(t))) fail('s');
        break;
    case 'h': add_field('h', fields, t); break;
    case 't':
        if (!has_trailers) trailers = fields_new(), has_trailers = 1;
        add_field('t', trailers, t);
        break;
    case 'r':
        make_body();
        set_response(outparam, 0, response, 0, 0, 0, 0, 0, 0);
        has_response = has_param = 0;
        break;
    case 'e':
        set_response(outparam, 1, (int32_t)number_of(t), 0, 0, 0, 0, 0, 0);
        has_param = 0;
        break;
    case 'o': drop_outparam(outparam), has_param = 0; break;
    case 'w': write_all('w', t); break;
    case 'u':
        open_body();
        check_write(stream, (uint64_t[2]){0});
        write_some(stream, t.data, t.size, result);
        if (broke(result)) fail('u');
        break;
    case 'f':
        open_body();
        blocking_flush(stream, result);
        if (broke(result)) fail('f');
        break;
    case 'b': write_pattern(number_of(t)); break;
    case 'c': close_stream(); break;
    case '.': finish(); break;
    case 'x':
        close_stream();
        if (has_body) drop_body(body), has_body = 0;
        break;
    case 'd': describe(request), write_page('d'); break;
    case 'p': pause(number_of(t)); break;
    case 'X': leave(0); break;
    case '@':
        for (volatile uint32_t n = 0;; n++) {}
    case 'k':
        if (read_piece('k', &piece)) write_all('k', piece);
        break;
    case 'a':
        while (read_piece('a', &piece)) write_all('a', piece);
        break;
    case 'q':
        while (read_piece('q', &piece)) size += piece.size;
        say_number(size), say(TEXT(" bytes\n")), write_page('q');
        break;
    case 'z': show_trailers(), write_page('z'); break;
    case 'n': say(TEXT("failed: ")), say((text){failed, failures}), say(TEXT("\n")), write_page('n'); break;
    default: __builtin_trap();
    }
}

static void drop_all(void) {
    close_stream();
    if (has_body) drop_body(body);
    if (has_input) drop_input(input);
    if (has_incoming) drop_incoming(incoming);
    if (has_response) drop_response(response);
    if (has_fields) drop_fields(fields);
    if (has_trailers) drop_fields(trailers);
    if (has_param) drop_outparam(outparam);
    if (has_request) drop_request(request);
    has_body = has_input = has_incoming = has_response = has_fields = has_trailers = has_param = has_request = 0;
}

static int hex(char c) { return c <= '9' ? c - '0' : (c | 32) - 'a' + 10; }

EXPORT("wasi:http/incoming-handler" V "#handle") void handle(int32_t of, int32_t param) {
    static char script[64 * 1024];
    optional it;
    used = written = failures = 0;
    request = of, outparam = param, has_request = has_param = 1;
    fields = fields_new(), has_fields = 1;
    add_field('h', fields, TEXT("x-guest:1"));
    request_target(request, &it);
    text target = it.tag ? it.value : TEXT("");
    if (target.size < 3 || target.data[0] != '/' || target.data[1] != '~' || target.data[2] != '/')
        target = TEXT("/~/r/d/.");
    if (target.size > sizeof script) __builtin_trap();
    size_t size = target.size;
    for (size_t i = 0; i < size; i++) script[i] = target.data[i];
    for (size_t at = 3; at < size && script[at] != '?';) {
        char what = script[at++], *to = script + at;
        text rest = {to, 0};
        for (; at < size && script[at] != '/' && script[at] != '?'; at++) {
            char c = script[at];
            if (c == '%' && at + 2 < size) c = (char)(hex(script[at + 1]) * 16 + hex(script[at + 2])), at += 2;
            *to++ = c;
        }
        rest.size = (size_t)(to - rest.data);
        if (at < size && script[at] == '/') at++;
        if (what == '!') __builtin_trap();
        if (what == ';') break;
        step(what, rest);
    }
    drop_all();
}
