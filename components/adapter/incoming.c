// The request that came in: its head was read by `begin`, its body comes over the channel, or is the store's standard
// input.
#include "channel.h"
#include "http.h"

DESTRUCTOR(incoming_request, "incoming-request")

METHOD("incoming-request.method") const method *incoming_request_method(const incoming_request *it) {
    return &it->method;
}

METHOD("incoming-request.path-with-query") optional_text *incoming_request_path(const incoming_request *it) {
    return some_text(it->target);
}

METHOD("incoming-request.scheme") const optional_scheme *incoming_request_scheme(const incoming_request *it) {
    return &it->scheme;
}

METHOD("incoming-request.authority") optional_text *incoming_request_authority(const incoming_request *it) {
    return some_text(it->authority);
}

METHOD("incoming-request.headers") int32_t incoming_request_headers(const incoming_request *it) {
    return give_view(&it->headers);
}

METHOD("incoming-request.consume") handle_or_nothing *incoming_request_consume(incoming_request *it) {
    if (it->consumed) return no_handle();
    it->consumed = 1;
    incoming_body *body = take_room(sizeof *body);
    *body = (incoming_body){.trailers = &it->trailers};
    return ok_handle(incoming_body_give(body));
}

METHOD("incoming-body.stream") handle_or_nothing *incoming_body_stream(incoming_body *it) {
    if (it->streamed) return no_handle();
    it->streamed = 1;
    if (it->outgoing) return ok_handle(give_input(OURS(it->id)));
    return ok_handle(give_input(looping ? OURS(REQUEST_BODY) : get_stdin()));
}

// An answer is forgotten with its body, or with the trailers behind it.
EXPORT(TYPES "#[dtor]incoming-body") void incoming_body_dtor(incoming_body *it) {
    if (it->outgoing && !it->finished) host_close(it->id);
    live--;
}

EXPORT(TYPES "#[dtor]future-trailers") void future_trailers_dtor(future_trailers *it) {
    if (it->outgoing) host_close(it->id);
    live--;
}

STATIC("incoming-body.finish") int32_t incoming_body_finish(int32_t body) {
    future_trailers *it = take_room(sizeof *it);
    incoming_body *from = incoming_body_rep(body);
    from->finished = 1;
    incoming_body_drop(body);
    *it = (future_trailers){.trailers = from->trailers, .outgoing = from->outgoing, .id = from->id};
    it->awaited = looping && !it->outgoing;
    if (it->awaited) channel_skip_body();
    return future_trailers_give(it);
}

METHOD("future-trailers.subscribe") int32_t future_trailers_subscribe(const future_trailers *it) {
    if (it->got) return give_pollable(ALWAYS);
    if (it->outgoing) return give_pollable(PART(it->id, TRAILERS_OF));
    return give_pollable(it->awaited ? PART(0, HEAD_OF) : ALWAYS);
}

// Take the trailers of an answer that came over the network, or what went wrong before.
static void take_received(future_trailers *it, nested_result *answer) {
    text last = {0};
    host_read(it->id, 1, &last);
    if (!last.size) return;
    text rest = {last.data + 1, last.size - 1};
    if (*last.data == '!') {
        answer->failed = 1;
        answer->error = (error_code){(uint8_t)number_of(rest), {0}};
    } else if (*last.data == '.') {
        read_lines(&it->received, rest);
        it->trailers = &it->received;
    }
}

// option<result<result<option<trailers>, error-code>>>: what came after the body, which may be heard once.
METHOD("future-trailers.get") nested_result *future_trailers_get(future_trailers *it) {
    nested_result *answer = take_room(sizeof *answer);
    int waits = it->awaited && !it->got && !channel_has_trailers();
    if (waits) channel_look(), waits = !channel_has_trailers();
    if (it->outgoing && !it->got) waits = !is_there(PART(it->id, TRAILERS_OF));
    *answer = (nested_result){.some = !waits, .again = it->got};
    if (waits) return answer;
    if (it->outgoing && !it->got) take_received(it, answer);
    if (it->awaited && !it->got) read_lines(it->trailers, channel_trailers());
    if (!it->got && !answer->failed && it->trailers && it->trailers->count) {
        answer->trailers.some = 1;
        answer->trailers.handle = give_view(it->trailers);
    }
    it->got = 1;
    return answer;
}
