// The resources of wasi:io, which the adapter defines for the guest: most stand for one of the engine's.
//
// They do not live in the arena: a guest may keep its standard output open for as long as its instance lives.
#pragma once
#include "fields.h"

#define POLL "wasi:io/poll@0.2.12"
#define STREAMS "wasi:io/streams@0.2.12"
#define ERROR "wasi:io/error@0.2.12"
#define ENGINE_POLL "wasmfleet:engine/poll@0.1.0"
#define ENGINE_STREAMS "wasmfleet:engine/streams@0.1.0"
#define ENGINE_ERROR "wasmfleet:engine/error@0.1.0"

// What one stands for is a handle of the engine's; ALWAYS, for a pollable of what is there at once; or, for streams, the
// body of an outgoing request, for errors the case of error-code that ended one, and for pollables what is waited for:
// `OURS(n)`.
typedef struct {
    int32_t engine;
} pollable;

#define ALWAYS (-1)
#define OURS(n) (-2 - (int32_t)(n))
#define NUMBER(ours) ((uint32_t)(-2 - (ours)))

// What is waited for of an outgoing request, or, with the number 0, of the call in hand, whose head is its trailers.
enum part { HEAD_OF, BODY_OF, ROOM_OF, TRAILERS_OF };
#define PART(id, part) OURS((id) << 2 | (part))

// result<list<u8>, stream-error>, result<u64, stream-error> and result<_, stream-error>.
typedef struct {
    uint8_t failed;
    union {
        text read;
        struct {
            uint8_t closed;
            int32_t error;
        };
    };
} bytes_result;

typedef struct {
    uint8_t failed;
    union {
        uint64_t count;
        struct {
            uint8_t closed;
            int32_t error;
        };
    };
} count_result;

typedef struct {
    uint8_t failed;
    uint8_t closed __attribute__((aligned(4)));
    int32_t error;
} nothing_result;

_Static_assert(sizeof(bytes_result) == 12 && sizeof(count_result) == 16 && sizeof(nothing_result) == 12, "canonical");

#define HOST "wasmfleet:adapter/host@0.1.0"

IMPORT(HOST, "room") uint32_t host_room(uint32_t id);
IMPORT(HOST, "poll") void host_poll(const char *wanted, size_t size, uint32_t wait, text *there);
IMPORT(HOST, "write") uint32_t host_write(uint32_t id, const char *data, size_t size);
IMPORT(HOST, "read") void host_read(uint32_t id, uint32_t most, text *piece);
IMPORT(HOST, "close") void host_close(uint32_t id);

typedef struct {
    int32_t engine;
} input_stream;

typedef struct {
    int32_t engine;
} output_stream;

typedef struct {
    int32_t engine;
} io_error;

HANDLES(POLL, pollable, "pollable")
HANDLES(STREAMS, input_stream, "input-stream")
HANDLES(STREAMS, output_stream, "output-stream")
HANDLES(ERROR, io_error, "error")

// Wait for a part of a request; ask whether it is there.
void wait_for(int32_t part);
int is_there(int32_t part);

// Handles for the guest.
int32_t give_pollable(int32_t engine);
int32_t give_input(int32_t engine);
int32_t give_output(int32_t engine);
