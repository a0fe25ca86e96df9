// The answer that goes out: frames of the channel, or, without one, a head that is handed over by `finish` and a body on
// the store's standard output.
#include "channel.h"
#include "http.h"

DESTRUCTOR(outgoing_response, "outgoing-response")
DESTRUCTOR(response_outparam, "response-outparam")

IMPORT(ENGINE_STREAMS, "[method]output-stream.blocking-flush") void blocking_flush(int32_t stream, void *result);
IMPORT(ENGINE_STREAMS, "[method]output-stream.blocking-write-and-flush")
void blocking_write(int32_t stream, const char *data, size_t size, void *result);

IMPORT(HOST, "reset") void host_reset(void);
IMPORT(HOST, "answered") void host_answered(const char *outcome, size_t size);

#define WRITE_MAX 4096
#define HOPS_TOO_MANY 99

exchange now;
uint8_t asked_host;

static text outcome(void);

// Let the answer's end out once there is one, so that nothing that the guest does from there on delays it.
static void end_answer(void) {
    if (answer_ended || now.state == UNANSWERED) return;
    if (now.state == ANSWERED) {
        const outgoing_body *body = &now.response->body;
        if (body->taken && !body->finished && !body->dropped) return;
    }
    text said = outcome();
    if (looping) {
        channel_answer_ended(said);
    } else {
        answer_ended = 1;
        host_answered(said.data, said.size);
    }
}

EXPORT(TYPES "#[dtor]outgoing-body") void outgoing_body_dtor(outgoing_body *it) {
    if (it->request && !it->finished) request_dropped(it->request);
    it->dropped = !it->finished;
    end_answer();
    live--;
}

CONSTRUCTOR("outgoing-response") int32_t outgoing_response_constructor(int32_t headers) {
    outgoing_response *it = take_room(sizeof *it);
    *it = (outgoing_response){.status = 200, .headers = *fields_take(headers)};
    return outgoing_response_give(it);
}

METHOD("outgoing-response.status-code") int32_t outgoing_response_status(const outgoing_response *it) {
    return it->status;
}

METHOD("outgoing-response.set-status-code") int32_t outgoing_response_set_status(outgoing_response *it, int32_t status) {
    if (status < 100 || status > 999) return 1;
    it->status = (uint16_t)status;
    return 0;
}

METHOD("outgoing-response.headers") int32_t outgoing_response_headers(const outgoing_response *it) {
    return give_view(&it->headers);
}

METHOD("outgoing-response.body") handle_or_nothing *outgoing_response_body(outgoing_response *it) {
    if (it->body.taken) return no_handle();
    it->body.taken = 1;
    return ok_handle(outgoing_body_give(&it->body));
}

// Standard output, for what the adapter itself has to do there.
static int32_t own_stdout(void) {
    static int32_t stream = -1;
    if (stream < 0) stream = get_stdout();
    return stream;
}

static void write_out(text t) {
    uint32_t result[4];
    for (size_t at = 0, size; at < t.size; at += size) {
        size = t.size - at > WRITE_MAX ? WRITE_MAX : t.size - at;
        blocking_write(own_stdout(), t.data + at, size, result);
    }
}

static text head_lines(text first, const fields *headers, text last) {
    size_t size = first.size + lines_size(headers) + last.size;
    char *head = take_room(size);
    put(put_lines(put(head, first), headers), last);
    return (text){head, size};
}

static text status_line(uint16_t status, text rest) {
    text number = decimal(status);
    char *line = take_room(number.size + rest.size);
    put(put(line, number), rest);
    return (text){line, number.size + rest.size};
}

// One body of an exchange has the stream: bytes of two could not be told apart. What the host reads there first is
// always the adapter's: the answer's head, so that the host need not wait for the guest's end, or an empty line.
METHOD("outgoing-body.write") handle_or_nothing *outgoing_body_write(outgoing_body *it) {
    if (it->request) {
        if (it->written) return no_handle();
        it->written = 1;
        return ok_handle(request_stream(it->request));
    }
    if (it->written || now.streaming || answer_ended) return no_handle();
    if (looping) {
        if (now.state == ANSWERED && it != &now.response->body) return no_handle();
        it->written = now.streaming = 1;
        if (now.state != ANSWERED) channel_head(TEXT(""));
        return ok_handle(give_output(OURS(RESPONSE_BODY)));
    }
    it->written = now.streaming = 1;
    now.sent = now.state == ANSWERED && it == &now.response->body;
    text line = TEXT("\r\n");
    write_out(now.sent ? head_lines(status_line(now.response->status, line), &now.response->headers, line) : line);
    return ok_handle(give_output(get_stdout()));
}

STATIC("outgoing-body.finish")
nothing_or_error *outgoing_body_finish(int32_t body, int32_t has_trailers, int32_t trailers) {
    outgoing_body *it = outgoing_body_rep(body);
    it->finished = 1;
    if (has_trailers) it->trailers = fields_take(trailers);
    outgoing_body_drop(body); // ends the answer, if this is its body
    uint32_t wrong = it->request ? request_finished(it->request) : 0;
    nothing_or_error *answer = take_room(sizeof *answer);
    *answer = (nothing_or_error){wrong > 0, {wrong ? (uint8_t)(wrong - 1) : 0, {0}}};
    return answer;
}

static void send_head(void) {
    const outgoing_response *it = now.response;
    now.sent = (uint8_t)channel_head(head_lines(status_line(it->status, TEXT("\r\n")), &it->headers, TEXT("")));
    if (!now.sent) {
        now.state = FAILED;
        now.error = ERROR_RESPONSE_HEAD_SIZE;
    }
}

// The response is result<outgoing-response, error-code>, flattened.
STATIC("response-outparam.set")
void response_outparam_set(int32_t param, int32_t failed, int32_t response_or_error, int32_t a, int64_t b, int32_t c,
                           int32_t d, int32_t e, int32_t f) {
    (void)a, (void)b, (void)c, (void)d, (void)e, (void)f;
    response_outparam_drop(param);
    if (failed) {
        now.state = FAILED;
        now.error = (uint8_t)response_or_error;
    } else {
        now.state = ANSWERED;
        now.response = outgoing_response_take(response_or_error);
        if (looping) send_head();
    }
    end_answer();
}

static int is_cut(const outgoing_body *it) { return it->taken && !it->finished; }

static text answer_head(const outgoing_response *it) {
    static const fields none;
    const outgoing_body *body = &it->body;
    const fields *trailers = body->trailers ? body->trailers : &none;
    text end = is_cut(body) ? TEXT(" cut\r\n") : TEXT(" whole\r\n");
    text head = head_lines(status_line(now.sent ? 0 : it->status, end), now.sent ? &none : &it->headers, TEXT("\r\n"));
    size_t size = head.size + lines_size(trailers);
    char *whole = take_room(size);
    put_lines(put(whole, head), trailers);
    return (text){whole, size};
}

EXPORT("wasmfleet:adapter/exchange@0.1.0#flush") void flush(void) {
    uint32_t result[4];
    blocking_flush(own_stdout(), result);
}

static text so_far(void) {
    if (now.state == ANSWERED) return answer_head(now.response);
    if (now.state == UNANSWERED) return TEXT("unanswered");
    text number = decimal(now.error);
    char *data = take_room(6 + number.size);
    put(put(data, TEXT("error ")), number);
    return (text){data, 6 + number.size};
}

// What is said at the answer's end, in a frame; where its head or trailers are too large for one, that.
static text outcome(void) {
    // A guest may drop its stream unflushed; what the host still holds must not reach the next answer.
    if (now.streaming && !looping) flush();
    text said = so_far();
    if (said.size <= FRAME_MAX) return said;
    now.state = FAILED;
    now.error = ERROR_RESPONSE_HEAD_SIZE;
    return so_far();
}

EXPORT("wasmfleet:adapter/exchange@0.1.0#finish") text *finish(void) {
    text *head = take_room(sizeof *head);
    *head = outcome();
    return head;
}

EXPORT("cabi_post_wasmfleet:adapter/exchange@0.1.0#finish") void finish_post(text *head) {
    (void)head;
    now = (exchange){0};
    if (!looping) answer_ended = 0;
    asked_host = 0;
    if (!live) empty_arena();
}

// The next word of `*rest`, up to a space or the end of the line.
static text word(text *rest) {
    size_t size = 0;
    while (size < rest->size && rest->data[size] != ' ' && rest->data[size] != '\r') size++;
    text found = {rest->data, size};
    size_t skip = size < rest->size ? size + (rest->data[size] == ' ' ? 1 : 2) : size;
    *rest = (text){rest->data + skip, rest->size - skip};
    return found;
}

static uint32_t hops_of(const fields *headers) {
    for (size_t i = 0; i < headers->count; i++) {
        text value = headers->items[i].value;
        if (!same(headers->items[i].name, TEXT("x-wasmfleet-hops"))) continue;
        size_t digits = 0;
        while (digits < value.size && value.data[digits] >= '0' && value.data[digits] <= '9') digits++;
        return digits && digits == value.size && digits < 3 ? number_of(value) : HOPS_TOO_MANY;
    }
    return 0;
}

typedef struct {
    int32_t request;
    int32_t outparam;
} begun;

EXPORT("wasmfleet:adapter/exchange@0.1.0#begin") begun *begin(const char *data, size_t size) {
    text rest = {data, size};
    incoming_request *it = take_room(sizeof *it);
    *it = (incoming_request){.method = {METHOD_OTHER, word(&rest)}, .target = word(&rest)};
    for (uint8_t tag = 0; tag < METHOD_OTHER; tag++)
        if (same(it->method.other, method_names[tag])) it->method.tag = tag;
    text name = word(&rest);
    it->scheme = (optional_scheme){name.size > 0, {same(name, TEXT("https")) ? 1 : 0, {0}}};
    it->authority = word(&rest);
    rest = read_lines(&it->headers, rest);
    it->headers.immutable = 1;
    read_lines(&it->trailers, rest);
    response_outparam *param = take_room(sizeof *param);
    *param = (response_outparam){0};
    now = (exchange){.hops = hops_of(&it->headers)};
    begun *both = take_room(sizeof *both);
    *both = (begun){incoming_request_give(it), response_outparam_give(param)};
    return both;
}

EXPORT("wasmfleet:adapter/exchange@0.1.0#align") int32_t align(const char *data, size_t size) {
    int found = channel_align((text){data, size});
    arena_back(data);
    return found;
}

// result<tuple<incoming-request, response-outparam>, u32>
typedef struct {
    uint8_t failed;
    union {
        begun both;
        uint32_t turn;
    };
} next_call;

EXPORT("wasmfleet:adapter/exchange@0.1.0#next") next_call *next(int32_t exact) {
    static next_call it;
    text head = {0};
    it = (next_call){.failed = 1, .turn = channel_next(exact, &head)};
    if (it.turn == CALL) it = (next_call){.both = *begin(head.data, head.size)};
    return &it;
}

EXPORT("wasmfleet:adapter/exchange@0.1.0#reply") uint32_t reply(int32_t last) {
    enum turn turn = channel_end(answer_ended ? TEXT("") : outcome(), last);
    // No instance goes on after an answer that failed, or was cut off.
    if ((now.state != ANSWERED || is_cut(&now.response->body)) && !last) turn = MISPLACED;
    if (asked_host) host_reset();
    finish_post(NULL);
    return turn;
}

EXPORT("wasmfleet:adapter/exchange@0.1.0#replied") uint32_t replied(void) { return channel_ended(); }

EXPORT("wasmfleet:adapter/exchange@0.1.0#tell") void tell(int32_t of_writes, int32_t of_returns) {
    metered = of_writes;
    prompt = of_returns;
}
