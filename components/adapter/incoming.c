// The request that came in: its head was read by `begin`, its body comes over the channel, or is the store's standard
// input.
#include "channel.h"
#include "http.h"

DESTRUCTOR(incoming_request, "incoming-request")
DESTRUCTOR(future_trailers, "future-trailers")

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

// The stream of an answer's body forgets the answer when it is dropped; without one, the body does.
EXPORT(TYPES "#[dtor]incoming-body") void incoming_body_dtor(incoming_body *it) {
    if (it->outgoing && !it->streamed) host_close(it->id);
    live--;
}

STATIC("incoming-body.finish") int32_t incoming_body_finish(int32_t body) {
    future_trailers *it = take_room(sizeof *it);
    incoming_body *from = incoming_body_take(body);
    *it = (future_trailers){.trailers = from->trailers, .awaited = looping && !from->outgoing};
    if (it->awaited) channel_skip_body();
    return future_trailers_give(it);
}

METHOD("future-trailers.subscribe") int32_t future_trailers_subscribe(const future_trailers *it) {
    return give_pollable(it->awaited && !it->got ? PART(0, HEAD_OF) : ALWAYS);
}

// option<result<result<option<trailers>, error-code>>>: what came after the body, which may be heard once.
METHOD("future-trailers.get") nested_result *future_trailers_get(future_trailers *it) {
    nested_result *answer = take_room(sizeof *answer);
    int waits = it->awaited && !it->got && !channel_has_trailers();
    if (waits) channel_look(), waits = !channel_has_trailers();
    *answer = (nested_result){.some = !waits, .again = it->got};
    if (waits) return answer;
    if (it->awaited && !it->got) read_lines(it->trailers, channel_trailers());
    if (!it->got && it->trailers && it->trailers->count) {
        answer->trailers.some = 1;
        answer->trailers.handle = give_view(it->trailers);
    }
    it->got = 1;
    return answer;
}
