// The shims: each built alone, with -DSHIM=<its name>. A function takes what the guest gave it to the engine, and wraps
// what the engine answers.
#include "wasm.h"

#define ENGINE(shim) "wasmfleet:engine/" shim "@0.1.0"
#define CALL(shim) EXPORT(shim)
#define WRAP "wasmfleet:adapter/wrap@0.1.0"

IMPORT(WRAP, "wait") int32_t wrap_wait(int32_t engine);
IMPORT(WRAP, "input") int32_t wrap_input(int32_t engine);
IMPORT(WRAP, "output") int32_t wrap_output(int32_t engine);

// option<own>, result<own, error-code>
typedef struct {
    uint8_t tag;
    union {
        uint8_t code;
        int32_t handle;
    } __attribute__((aligned(4)));
} answer;

// option<error-code>
typedef struct {
    uint8_t some;
    uint8_t code;
} optional_code;

#define CLOCK(shim, name)                                                                                              \
    IMPORT(ENGINE(shim), name) int32_t engine_call(uint64_t when);                                                     \
    CALL(shim) int32_t call(uint64_t when) { return wrap_wait(engine_call(when)); }

// A method that gives a pollable.
#define SUBSCRIBE(shim, resource)                                                                                      \
    IMPORT(ENGINE(shim), "[method]" resource ".subscribe") int32_t engine_call(int32_t it);                            \
    IMPORT(ENGINE(shim), "[resource-drop]" resource) void drop(int32_t it);                                            \
    CALL(shim) int32_t call(int32_t it) {                                                                              \
        int32_t engine = engine_call(it);                                                                              \
        drop(it);                                                                                                      \
        return wrap_wait(engine);                                                                                      \
    }

// A method of `descriptor` that gives a stream; OFFSET is its parameter's declaration and its name, or nothing.
#define OFFSET , uint64_t offset
#define GIVE_OFFSET , offset
#define NO_OFFSET
#define STREAM(shim, name, wrap, declared, given)                                                                      \
    IMPORT(ENGINE(shim), "[method]descriptor." name) void engine_call(int32_t it declared, answer *to);                \
    IMPORT(ENGINE(shim), "[resource-drop]descriptor") void drop(int32_t it);                                           \
    CALL(shim) answer *call(int32_t it declared) {                                                                     \
        static answer to;                                                                                              \
        engine_call(it given, &to);                                                                                    \
        drop(it);                                                                                                      \
        if (!to.tag) to.handle = wrap(to.handle);                                                                      \
        return &to;                                                                                                    \
    }

// What asks the engine which of its errors this is.
#define ERROR_CODE(shim, name)                                                                                         \
    IMPORT(ENGINE(shim), name) void engine_call(int32_t error, optional_code *to);                                     \
    IMPORT(WRAP, "lend") void lend(int32_t error, answer *engine);                                                     \
    IMPORT(WRAP, "give-back") void give_back(int32_t error, int32_t engine);                                           \
    IMPORT("wasi:io/error@0.2.12", "[resource-drop]error") void drop(int32_t error);                                   \
    CALL(shim) optional_code *call(int32_t error) {                                                                    \
        static optional_code to;                                                                                       \
        answer engine;                                                                                                 \
        to = (optional_code){0};                                                                                       \
        lend(error, &engine);                                                                                          \
        if (engine.tag) {                                                                                              \
            engine_call(engine.handle, &to);                                                                           \
            give_back(error, engine.handle);                                                                           \
        }                                                                                                              \
        drop(error);                                                                                                   \
        return &to;                                                                                                    \
    }

// A method of `tcp-socket` whose result is a tuple that ends in a stream each way.
#define TCP(shim, name, ...)                                                                                           \
    typedef struct {                                                                                                   \
        uint8_t failed;                                                                                                \
        int32_t __VA_ARGS__;                                                                                           \
    } streams;                                                                                                         \
    IMPORT(ENGINE(shim), "[method]tcp-socket." name) void engine_call(int32_t it, streams *to);                        \
    IMPORT(ENGINE(shim), "[resource-drop]tcp-socket") void drop(int32_t it);                                           \
    CALL(shim) streams *call(int32_t it) {                                                                             \
        static streams to;                                                                                             \
        engine_call(it, &to);                                                                                          \
        drop(it);                                                                                                      \
        if (!to.failed) to.input = wrap_input(to.input), to.output = wrap_output(to.output);                           \
        return &to;                                                                                                    \
    }

#define clock_instant 1
#define clock_duration 2
#define files_read 3
#define files_write 4
#define files_append 5
#define files_error 6
#define network_error 7
#define tcp_connect 8
#define tcp_accept 9
#define tcp_subscribe 10
#define udp_subscribe 11
#define udp_incoming 12
#define udp_outgoing 13
#define lookup_subscribe 14

#if SHIM == clock_instant
CLOCK("clock-instant", "subscribe-instant")
#elif SHIM == clock_duration
CLOCK("clock-duration", "subscribe-duration")
#elif SHIM == files_read
STREAM("files-read", "read-via-stream", wrap_input, OFFSET, GIVE_OFFSET)
#elif SHIM == files_write
STREAM("files-write", "write-via-stream", wrap_output, OFFSET, GIVE_OFFSET)
#elif SHIM == files_append
STREAM("files-append", "append-via-stream", wrap_output, NO_OFFSET, NO_OFFSET)
#elif SHIM == files_error
ERROR_CODE("files-error", "filesystem-error-code")
#elif SHIM == network_error
ERROR_CODE("network-error", "network-error-code")
#elif SHIM == tcp_connect
TCP("tcp-connect", "finish-connect", input, output)
#elif SHIM == tcp_accept
TCP("tcp-accept", "accept", socket, input, output)
#elif SHIM == tcp_subscribe
SUBSCRIBE("tcp-subscribe", "tcp-socket")
#elif SHIM == udp_subscribe
SUBSCRIBE("udp-subscribe", "udp-socket")
#elif SHIM == udp_incoming
SUBSCRIBE("udp-incoming", "incoming-datagram-stream")
#elif SHIM == udp_outgoing
SUBSCRIBE("udp-outgoing", "outgoing-datagram-stream")
#elif SHIM == lookup_subscribe
SUBSCRIBE("lookup-subscribe", "resolve-address-stream")
#else
#error "which shim?"
#endif
