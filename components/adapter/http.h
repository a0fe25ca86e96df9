// What the adapter's sources share of the resources of wasi:http/types.
#pragma once
#include "fields.h"
#include "io.h"

typedef struct {
    method method;
    optional_scheme scheme;
    text target;
    text authority;
    fields headers;
    fields trailers;
    uint8_t consumed;
} incoming_request;

typedef struct {
    fields *trailers;
    uint8_t streamed;
    uint8_t outgoing; // of the answer to the outgoing request of this number
    uint8_t finished;
    uint32_t id;
} incoming_body;

typedef struct {
    fields *trailers;
    uint8_t got;
    uint8_t awaited; // they come over the channel, behind the body
    uint8_t outgoing; // as in incoming_body
    uint32_t id;
    fields received;
} future_trailers;

typedef struct {
    fields *trailers;
    uint8_t taken;
    uint8_t written;
    uint8_t finished;
    uint8_t dropped; // before its end
    struct outgoing_request *request; // whose body it is; of an answer's none
} outgoing_body;

typedef struct {
    uint16_t status;
    fields headers;
    outgoing_body body;
} outgoing_response;

typedef struct {
    uint8_t set;
} response_outparam;

RESOURCE(incoming_request, "incoming-request")
RESOURCE(incoming_body, "incoming-body")
RESOURCE(future_trailers, "future-trailers")
RESOURCE(outgoing_body, "outgoing-body")
RESOURCE(outgoing_response, "outgoing-response")
RESOURCE(response_outparam, "response-outparam")

// The answer of the exchange in hand.
typedef struct {
    enum { UNANSWERED, ANSWERED, FAILED } state;
    uint8_t error;
    uint8_t streaming;
    uint8_t sent; // the answer's head went out before its body
    uint32_t hops; // neighbours on this device that the request came through
    outgoing_response *response;
} exchange;

extern exchange now;

// True once the host was asked for an outgoing request in the call in hand.
extern uint8_t asked_host;

// The stream for a request's body, and what is to be done at its end. Gives the error, 0 for none.
int32_t request_stream(struct outgoing_request *it);
uint32_t request_finished(struct outgoing_request *it);
void request_dropped(struct outgoing_request *it);

// option<result<result<T, error-code>>>, as futures give it: nothing yet, asked again, failed, or the value.
typedef struct {
    uint8_t some;
    uint8_t again __attribute__((aligned(8)));
    uint8_t failed __attribute__((aligned(8)));
    union {
        error_code error;
        int32_t handle;
        struct {
            uint8_t some;
            int32_t handle;
        } trailers;
    } __attribute__((aligned(8)));
} nested_result;

_Static_assert(sizeof(nested_result) == 56 && offsetof(nested_result, error) == 24, "the canonical layout");

IMPORT("wasmfleet:engine/stdin@0.1.0", "get-stdin") int32_t get_stdin(void);
IMPORT("wasmfleet:engine/stdout@0.1.0", "get-stdout") int32_t get_stdout(void);
