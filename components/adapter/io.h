// The resources of wasi:io, which the adapter defines for the guest: most stand for one of the engine's.
//
// They do not live in the arena: a guest may keep its standard output open for as long as its instance lives.
#pragma once
#include "abi.h"

#define POLL "wasi:io/poll@0.2.12"
#define STREAMS "wasi:io/streams@0.2.12"
#define ERROR "wasi:io/error@0.2.12"
#define ENGINE_POLL "wasmfleet:engine/poll@0.1.0"
#define ENGINE_STREAMS "wasmfleet:engine/streams@0.1.0"
#define ENGINE_ERROR "wasmfleet:engine/error@0.1.0"

// A handle of the engine's, or ALWAYS for a pollable of what is there at once.
typedef struct {
    int32_t engine;
} pollable;

#define ALWAYS (-1)

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

// Handles for the guest.
int32_t give_pollable(int32_t engine);
int32_t give_input(int32_t engine);
int32_t give_output(int32_t engine);
