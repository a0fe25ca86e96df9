// Requests that the guest sends: `outgoing-request`, its options, and the handler that asks the host.
#include "http.h"

typedef struct outgoing_request {
    uint32_t id;     // the host's number, 0 for none yet
    uint8_t begun;   // whether the host was asked for one
    uint8_t handed;  // whether the guest has handed it over
    uint8_t dropped; // whether its body was dropped before its end
    method method;
    optional_scheme scheme;
    optional_text target;
    optional_text authority;
    fields headers;
    outgoing_body body;
} outgoing_request;

// option<duration>
typedef struct {
    uint8_t some;
    uint64_t ns;
} optional_duration;

enum { CONNECT, FIRST_BYTE, BETWEEN_BYTES, TIMEOUTS };

typedef struct {
    optional_duration timeouts[TIMEOUTS];
} request_options;

typedef struct {
    uint16_t status;
    fields headers;
    incoming_body body;
    uint8_t consumed;
} incoming_response;

typedef struct future_incoming_response {
    incoming_response response;
    uint8_t got;
    uint32_t id;
} future_incoming_response;

RESOURCE(outgoing_request, "outgoing-request")
RESOURCE(request_options, "request-options")
RESOURCE(future_incoming_response, "future-incoming-response")
RESOURCE(incoming_response, "incoming-response")
DESTRUCTOR(request_options, "request-options")

// What the guest drops, and nothing else stands for, the host may forget.
EXPORT(TYPES "#[dtor]outgoing-request") void outgoing_request_dtor(outgoing_request *it) {
    if (it->id && !it->handed) host_close(it->id);
    live--;
}

EXPORT(TYPES "#[dtor]future-incoming-response") void future_incoming_response_dtor(future_incoming_response *it) {
    if (!it->got) host_close(it->id);
    live--;
}

EXPORT(TYPES "#[dtor]incoming-response") void incoming_response_dtor(incoming_response *it) {
    if (!it->consumed) host_close(it->body.id);
    live--;
}

IMPORT(HOST, "begin") uint32_t host_begin(uint32_t hops);
IMPORT(HOST, "send") uint32_t host_send(uint32_t id, const char *head, size_t size);
IMPORT(HOST, "start") uint32_t host_start(uint32_t id, const char *head, size_t size);
IMPORT(HOST, "finish") uint32_t host_finish(uint32_t id, const char *trailers, size_t size);
IMPORT(HOST, "abort") void host_abort(uint32_t id);
IMPORT(HOST, "head") void host_head(uint32_t id, text *head);

CONSTRUCTOR("outgoing-request") int32_t outgoing_request_constructor(int32_t headers) {
    outgoing_request *it = take_room(sizeof *it);
    *it = (outgoing_request){.headers = *fields_take(headers)};
    return outgoing_request_give(it);
}

METHOD("outgoing-request.body") handle_or_nothing *outgoing_request_body(outgoing_request *it) {
    if (it->body.taken) return no_handle();
    it->body.taken = 1;
    it->body.request = it;
    return ok_handle(outgoing_body_give(&it->body));
}

// Where there are too many, the host has none, and answers what is asked of this one with that error.
#define NO_NUMBER 0x10000000u

static uint32_t number_for(outgoing_request *it) {
    if (!it->begun) {
        asked_host = it->begun = 1;
        it->id = host_begin(now.hops);
        if (!it->id) it->id = NO_NUMBER;
    }
    return it->id;
}

int32_t request_stream(outgoing_request *it) { return give_output(OURS(number_for(it))); }

METHOD("outgoing-request.method") const method *outgoing_request_method(const outgoing_request *it) {
    return &it->method;
}

METHOD("outgoing-request.set-method")
int32_t outgoing_request_set_method(outgoing_request *it, int32_t tag, const char *data, size_t size) {
    method wanted = {(uint8_t)tag, {data, size}};
    if (tag == METHOD_OTHER && !is_token(wanted.other)) return 1;
    it->method = wanted;
    return 0;
}

METHOD("outgoing-request.path-with-query") const optional_text *outgoing_request_path(const outgoing_request *it) {
    return &it->target;
}

METHOD("outgoing-request.set-path-with-query")
int32_t outgoing_request_set_path(outgoing_request *it, int32_t some, const char *data, size_t size) {
    optional_text wanted = {(uint8_t)some, {data, size}};
    if (some && size && !is_word(wanted.value, "#")) return 1;
    it->target = wanted;
    return 0;
}

METHOD("outgoing-request.scheme") const optional_scheme *outgoing_request_scheme(const outgoing_request *it) {
    return &it->scheme;
}

METHOD("outgoing-request.set-scheme")
int32_t outgoing_request_set_scheme(outgoing_request *it, int32_t some, int32_t tag, const char *data, size_t size) {
    optional_scheme wanted = {(uint8_t)some, {(uint8_t)tag, {data, size}}};
    if (some && tag == 2 && !is_token(wanted.value.other)) return 1;
    it->scheme = wanted;
    return 0;
}

METHOD("outgoing-request.authority") const optional_text *outgoing_request_authority(const outgoing_request *it) {
    return &it->authority;
}

METHOD("outgoing-request.set-authority")
int32_t outgoing_request_set_authority(outgoing_request *it, int32_t some, const char *data, size_t size) {
    optional_text wanted = {(uint8_t)some, {data, size}};
    if (some && !is_word(wanted.value, "/?#\\@")) return 1;
    it->authority = wanted;
    return 0;
}

METHOD("outgoing-request.headers") int32_t outgoing_request_headers(const outgoing_request *it) {
    return give_view(&it->headers);
}

CONSTRUCTOR("request-options") int32_t request_options_constructor(void) {
    request_options *it = take_room(sizeof *it);
    *it = (request_options){0};
    return request_options_give(it);
}

#define TIMEOUT(which, id, name)                                                                                       \
    METHOD("request-options." name) const optional_duration *get_##id(const request_options *it) {                     \
        return &it->timeouts[which];                                                                                   \
    }                                                                                                                  \
    METHOD("request-options.set-" name) int32_t set_##id(request_options *it, int32_t some, uint64_t ns) {             \
        it->timeouts[which] = (optional_duration){(uint8_t)some, ns};                                                  \
        return 0;                                                                                                      \
    }

TIMEOUT(CONNECT, connect_timeout, "connect-timeout")
TIMEOUT(FIRST_BYTE, first_byte_timeout, "first-byte-timeout")
TIMEOUT(BETWEEN_BYTES, between_bytes_timeout, "between-bytes-timeout")

static text scheme_name(const optional_scheme *it) {
    if (!it->some || it->value.tag == 1) return TEXT("https");
    return it->value.tag ? it->value.other : TEXT("http");
}

// The head as `host.send` describes it.
static text request_head(const outgoing_request *it, const request_options *options) {
    text words[4 + TIMEOUTS] = {
        it->method.tag == METHOD_OTHER ? it->method.other : method_names[it->method.tag],
        it->target.some && it->target.value.size ? it->target.value : TEXT("/"),
        scheme_name(&it->scheme),
        it->authority.some ? it->authority.value : TEXT(""),
    };
    size_t size = 1 + lines_size(&it->headers);
    for (size_t i = 0; i < TIMEOUTS; i++)
        if (options && options->timeouts[i].some) words[4 + i] = decimal(options->timeouts[i].ns);
    for (size_t i = 0; i < 4 + TIMEOUTS; i++) size += words[i].size + 1;
    char *head = take_room(size), *at = head;
    for (size_t i = 0; i < 4 + TIMEOUTS; i++) at = put(put(at, words[i]), i < 3 + TIMEOUTS ? TEXT(" ") : TEXT("\r\n"));
    put_lines(at, &it->headers);
    return (text){head, size};
}

// A request is handed over with its body as far as it has come.
EXPORT("wasi:http/outgoing-handler@0.2.12#handle")
nothing_or_error *outgoing_handle(int32_t request, int32_t has_options, int32_t options) {
    outgoing_request *it = outgoing_request_rep(request);
    uint32_t id = number_for(it);
    it->handed = 1;
    outgoing_request_drop(request);
    text head = request_head(it, has_options ? request_options_take(options) : NULL);
    int open = it->body.taken && (!it->body.finished || it->body.trailers);
    nothing_or_error *answer = take_room(sizeof *answer);
    uint32_t wrong = (open ? host_start : host_send)(id, head.data, head.size);
    *answer = (nothing_or_error){wrong > 0, {0, {0}}};
    if (wrong) {
        answer->error.tag = (uint8_t)(wrong - 1);
        return answer;
    }
    if (it->dropped) host_abort(id);
    if (open && it->body.finished) request_finished(it);
    future_incoming_response *future = take_room(sizeof *future);
    *future = (future_incoming_response){.id = id};
    *(int32_t *)&answer->error = future_incoming_response_give(future);
    return answer;
}

uint32_t request_finished(outgoing_request *it) {
    static const fields none;
    const fields *trailers = it->body.trailers ? it->body.trailers : &none;
    if (!it->handed || !it->id) return 0;
    size_t size = lines_size(trailers);
    char *lines = take_room(size);
    put_lines(lines, trailers);
    return host_finish(it->id, lines, size);
}

void request_dropped(outgoing_request *it) {
    it->dropped = 1;
    if (it->handed && it->id) host_abort(it->id);
}

METHOD("future-incoming-response.subscribe")
int32_t future_incoming_response_subscribe(const future_incoming_response *it) {
    return give_pollable(it->got ? ALWAYS : PART(it->id, HEAD_OF));
}

// Nothing as long as there is no answer.
METHOD("future-incoming-response.get")
nested_result *future_incoming_response_get(future_incoming_response *it) {
    nested_result *answer = take_room(sizeof *answer);
    *answer = (nested_result){.some = 1, .again = it->got};
    if (it->got) return answer;
    if (!is_there(PART(it->id, HEAD_OF))) {
        answer->some = 0;
        return answer;
    }
    it->got = 1;
    text head = {0};
    host_head(it->id, &head);
    if (head.size > 6 && *head.data == 'e') {
        answer->failed = 1;
        answer->error = (error_code){(uint8_t)number_of((text){head.data + 6, head.size - 6}), {0}};
        return answer;
    }
    incoming_response *response = &it->response;
    *response = (incoming_response){.status = (uint16_t)number_of(head), .body = {.outgoing = 1, .id = it->id}};
    size_t line = 0;
    while (line + 1 < head.size && head.data[line] != '\r') line++;
    read_lines(&response->headers, (text){head.data + line + 2, head.size > line + 2 ? head.size - line - 2 : 0});
    response->headers.immutable = 1;
    answer->handle = incoming_response_give(response);
    return answer;
}

METHOD("incoming-response.status") int32_t incoming_response_status(const incoming_response *it) {
    return it->status;
}

METHOD("incoming-response.headers") int32_t incoming_response_headers(const incoming_response *it) {
    return give_view(&it->headers);
}

METHOD("incoming-response.consume") handle_or_nothing *incoming_response_consume(incoming_response *it) {
    if (it->consumed) return no_handle();
    it->consumed = 1;
    return ok_handle(incoming_body_give(&it->body));
}

// option<error-code>: of what ended the body of an answer.
typedef struct {
    uint8_t some;
    error_code error;
} optional_error;

EXPORT(TYPES "#http-error-code") optional_error *http_error_code(const io_error *error) {
    optional_error *answer = take_room(sizeof *answer);
    *answer = (optional_error){error->engine < ALWAYS && NUMBER(error->engine) <= ERROR_INTERNAL, {0, {0}}};
    if (answer->some) answer->error.tag = (uint8_t)NUMBER(error->engine);
    return answer;
}
