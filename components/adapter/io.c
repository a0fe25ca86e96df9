// wasi:io and the standard streams as the guest sees them: each stream, pollable and error stands for one of the engine's.
#include "channel.h"
#include "io.h"

#ifdef WITH_SOCKETS
#include "sockets.h"
#else // the parts of the adapter for a guest that may have none
#define IS_SOCKET(number) 0
#define SOCKET_ERROR UINT32_MAX
#define SOCKET_CLOSED 0
#define sockets_open 0
#endif

IMPORT(ENGINE_POLL, "[method]pollable.ready") int32_t engine_ready(int32_t it);
IMPORT(ENGINE_POLL, "[method]pollable.block") void engine_block(int32_t it);
IMPORT(ENGINE_POLL, "poll") void engine_poll(const int32_t *list, size_t count, text *ready);
IMPORT(ENGINE_POLL, "[resource-drop]pollable") void drop_pollable(int32_t it);
IMPORT(ENGINE_STREAMS, "[resource-drop]input-stream") void drop_input(int32_t it);
IMPORT(ENGINE_STREAMS, "[resource-drop]output-stream") void drop_output(int32_t it);
IMPORT(ENGINE_ERROR, "[method]error.to-debug-string") void engine_debug_string(int32_t it, text *said);
IMPORT(ENGINE_ERROR, "[resource-drop]error") void drop_error(int32_t it);
IMPORT("wasmfleet:engine/stderr@0.1.0", "get-stderr") int32_t engine_stderr(void);

// Room for resources, outside the arena: freed ones are linked. A guest that holds more at a time ends here.
#define OBJECTS 4096

typedef union object {
    int32_t engine;
    union object *next;
} object;

static object objects[OBJECTS], *free_objects;
static size_t used_objects;

static void *take_object(int32_t engine) {
    object *it = free_objects;
    if (it) {
        free_objects = it->next;
    } else {
        if (used_objects == OBJECTS) __builtin_trap();
        it = &objects[used_objects++];
    }
    it->engine = engine;
    return it;
}

static void give_object_back(void *it) {
    ((object *)it)->next = free_objects;
    free_objects = it;
}

int32_t give_pollable(int32_t engine) { return pollable_new(take_object(engine)); }
int32_t give_input(int32_t engine) { return input_stream_new(take_object(engine)); }
int32_t give_output(int32_t engine) { return output_stream_new(take_object(engine)); }

EXPORT(POLL "#[dtor]pollable") void pollable_dtor(pollable *it) {
    if (it->engine >= 0) drop_pollable(it->engine);
    give_object_back(it);
}

EXPORT(STREAMS "#[dtor]input-stream") void input_stream_dtor(input_stream *it) {
    if (it->engine >= 0) drop_input(it->engine);
    give_object_back(it);
}

EXPORT(STREAMS "#[dtor]output-stream") void output_stream_dtor(output_stream *it) {
    if (it->engine >= 0) drop_output(it->engine);
    give_object_back(it);
}

EXPORT(ERROR "#[dtor]error") void io_error_dtor(io_error *it) {
    if (it->engine >= 0) drop_error(it->engine);
    give_object_back(it);
}

// What a call gives back in the arena is needed until it has been read: then the arena is as it was.
static const void *mark;

static text given;

EXPORT(ERROR "#[method]error.to-debug-string") text *io_error_debug_string(const io_error *it) {
    mark = arena_mark();
    given = it->engine < ALWAYS ? TEXT("the outgoing request failed") : TEXT("lent");
    if (it->engine < ALWAYS && NUMBER(it->engine) >= SOCKET_ERROR) given = TEXT("the connection failed");
    if (it->engine >= 0) engine_debug_string(it->engine, &given);
    return &given;
}

EXPORT("cabi_post_" ERROR "#[method]error.to-debug-string") void io_error_debug_string_post(const void *it) {
    (void)it;
    arena_back(mark);
}

// True while the guest has asked the host for an outgoing request in the call in hand.
extern uint8_t asked_host;

#define IS_CHANNELS(wanted) ((wanted) < ALWAYS && NUMBER(wanted) <= ROOM_OF)
#define IS_HOSTS(wanted) ((wanted) < ALWAYS && NUMBER(wanted) > ROOM_OF)

static int channel_has(uint32_t part) {
    return part == ROOM_OF ? answer_ended || channel_credit() > 0 : part == BODY_OF ? channel_has_body() : channel_has_trailers();
}

enum { NO_WAIT, NUDGED, WAITS, WAITS_A_MOMENT };

// Ask the host which of these are there; `wait` as in `host.poll`. Gives how many.
static size_t ask_host(const int32_t *wanted, size_t count, uint8_t *there, uint32_t wait) {
    if (!asked_host && !sockets_open) return 0;
    const void *before = arena_mark();
    char *words = take_room(count * 12), *at = words;
    for (size_t i = 0; i < count; i++)
        if (IS_HOSTS(wanted[i])) at = put(put(at, decimal(NUMBER(wanted[i]))), TEXT(" "));
    text found = {0};
    host_poll(words, (size_t)(at - words), wait, &found);
    size_t ready = 0, next = 0;
    for (size_t i = 0; i < count; i++)
        if (IS_HOSTS(wanted[i]) && next < found.size) ready += there[i] = found.data[next++] == '1';
    arena_back(before);
    return ready;
}

// Find which are there, and how many those are. Nobody nudges from here on.
static size_t look(const int32_t *wanted, size_t count, uint8_t *there) {
    size_t ready = 0;
    for (size_t i = 0; i < count; i++) {
        there[i] = wanted[i] == ALWAYS || (IS_CHANNELS(wanted[i]) && channel_has(NUMBER(wanted[i]))) ||
                   (wanted[i] >= 0 && engine_ready(wanted[i]));
        ready += there[i];
    }
    return ready + ask_host(wanted, count, there, NO_WAIT);
}

// Every wait of the guest: for these, and for the channel while a call of it is in hand. A guest that waits has written
// what it has to write for now.
static void wait_any(const int32_t *wanted, size_t count, uint8_t *there) {
    while (!look(wanted, count, there)) {
        if (in_call && channel_has_read()) {
            channel_take();
            continue;
        }
        channel_flush();
        const void *before = arena_mark();
        int32_t *engines = take_room((count + 1) * sizeof *engines);
        size_t used = 0, hosts = 0;
        for (size_t i = 0; i < count; i++) {
            if (wanted[i] >= 0) engines[used++] = wanted[i];
            hosts += IS_HOSTS(wanted[i]);
        }
        int here = hosts && !in_call;
        size_t ready = ask_host(wanted, count, there, !here ? NUDGED : used ? WAITS_A_MOMENT : WAITS);
        int arrived = 0;
        if (!ready && !here) {
            if (in_call) engines[used++] = channel_arrival();
            if (!used) __builtin_trap(); // nothing that could come
            text found;
            engine_poll(engines, used, &found);
            for (size_t i = 0; i < found.size; i++) arrived |= in_call && ((const uint32_t *)found.data)[i] == used - 1;
        }
        arena_back(before);
        if (ready) return;
        if (arrived) {
            ask_host(NULL, 0, NULL, NO_WAIT); // no nudge while frames are written
            channel_take();
        }
    }
}

void wait_for(int32_t part) {
    uint8_t there;
    wait_any(&part, 1, &there);
}

int is_there(int32_t part) {
    uint8_t there;
    return look(&part, 1, &there) > 0;
}

EXPORT(POLL "#[method]pollable.ready") int32_t pollable_ready(const pollable *it) {
    if (it->engine >= 0) return engine_ready(it->engine);
    if (IS_CHANNELS(it->engine) && !channel_has(NUMBER(it->engine))) channel_look();
    return is_there(it->engine);
}

EXPORT(POLL "#[method]pollable.block") void pollable_block(const pollable *it) {
    if (it->engine != ALWAYS) wait_for(it->engine);
}

EXPORT(POLL "#poll") text *poll_list(pollable *const *list, size_t count) {
    mark = list;
    uint32_t *found = take_room(count * sizeof *found);
    int32_t *wanted = take_room(count * sizeof *wanted);
    uint8_t *there = take_room(count);
    for (size_t i = 0; i < count; i++) wanted[i] = list[i]->engine;
    wait_any(wanted, count, there);
    size_t ready = 0;
    for (size_t i = 0; i < count; i++)
        if (there[i]) found[ready++] = (uint32_t)i;
    given = (text){(const char *)found, ready};
    return &given;
}

EXPORT("cabi_post_" POLL "#poll") void poll_list_post(const void *it) {
    (void)it;
    arena_back(mark);
}

// The engine's error in a result becomes one of ours.
static int32_t give_error(int32_t engine) { return io_error_new(take_object(engine)); }

static bytes_result bytes;
static count_result count;
static nothing_result nothing;

#define TAKE_OVER(result) ((result).failed && !(result).closed ? (void)((result).error = give_error((result).error)) : (void)0)

// What an input stream of ours waits for.
static int32_t arrival_of(const input_stream *it) {
    uint32_t number = NUMBER(it->engine);
    if (number == NO_BODY) return ALWAYS;
    return IS_OURS(number) ? PART(0, BODY_OF) : PART(number, BODY_OF);
}

// The body of the request in hand, or of an answer that came over the network.
static bytes_result *body_read(const input_stream *it, uint64_t most, int wait) {
    text piece = {0};
    int32_t arrival = arrival_of(it);
    if (IS_OURS(NUMBER(it->engine))) {
        if (NUMBER(it->engine) == REQUEST_BODY && most) {
            if (!channel_has_body()) channel_look();
            if (wait) wait_for(arrival);
            piece = channel_read(most);
        }
        bytes = (bytes_result){.read = piece};
        if (most && !piece.size && (NUMBER(it->engine) == NO_BODY || channel_has_body())) {
            bytes = (bytes_result){.failed = 1, .closed = 1};
            if (NUMBER(it->engine) == REQUEST_BODY && body_cut)
                bytes = (bytes_result){.failed = 1, .error = give_error(OURS(ERROR_CONNECTION_TERMINATED))};
        }
        return &bytes;
    }
    for (;;) {
        host_read(NUMBER(it->engine), most < 65536 ? (uint32_t)most : 65536, &piece);
        if (!wait || !most || piece.size != 1 || *piece.data != '+') break;
        wait_for(arrival);
    }
    if (piece.size && *piece.data == '+') {
        bytes = (bytes_result){.read = latin1_back((text){piece.data + 1, piece.size - 1})};
    } else if (piece.size && *piece.data == '!') {
        bytes = (bytes_result){.failed = 1, .error = give_error(OURS(number_of((text){piece.data + 1, piece.size - 1})))};
    } else {
        bytes = (bytes_result){.failed = 1, .closed = 1};
    }
    return &bytes;
}

static count_result *body_skip(const input_stream *it, uint64_t most, int wait) {
    const void *before = arena_mark();
    body_read(it, most, wait);
    arena_back(before);
    count = (count_result){.count = bytes.read.size};
    if (bytes.failed) count = (count_result){.failed = 1, .closed = bytes.closed, .error = bytes.error};
    return &count;
}

// What an output stream of ours waits for, and how much it takes now.
static int32_t room_for(const output_stream *it) {
    return IS_OURS(NUMBER(it->engine)) ? PART(0, ROOM_OF) : PART(NUMBER(it->engine), ROOM_OF);
}

static uint32_t room_of(const output_stream *it) {
    if (!IS_OURS(NUMBER(it->engine))) return host_room(NUMBER(it->engine));
    if (!channel_credit()) channel_look();
    return channel_credit();
}

// True of the body of an answer that has ended.
static int has_ended(const output_stream *it) { return answer_ended && NUMBER(it->engine) == RESPONSE_BODY; }

// The body of the answer in hand, or of a request on its way out: waits for room, which a guest that asked has.
static nothing_result *body_write(const output_stream *it, const char *data, size_t size) {
    nothing = (nothing_result){0};
    if (has_ended(it)) nothing = (nothing_result){.failed = 1, .closed = 1};
    while (size && !nothing.failed) {
        size_t room = room_of(it);
        if (!room) {
            wait_for(room_for(it));
            continue;
        }
        if (room > size) room = size;
        if (IS_OURS(NUMBER(it->engine))) {
            channel_write(data, room);
        } else {
            const void *before = arena_mark();
            text piece = latin1(data, room);
            uint32_t wrong = host_write(NUMBER(it->engine), piece.data, piece.size);
            arena_back(before);
            if (wrong && wrong == SOCKET_CLOSED) nothing = (nothing_result){.failed = 1, .closed = 1};
            else if (wrong) nothing = (nothing_result){.failed = 1, .error = give_error(OURS(wrong - 1))};
        }
        data += room;
        size -= room;
    }
    return &nothing;
}

static nothing_result *body_zeroes(const output_stream *it, uint64_t size) {
    static const char zeroes[256];
    nothing = (nothing_result){0};
    while (size && !nothing.failed) {
        size_t piece = size < sizeof zeroes ? (size_t)size : sizeof zeroes;
        body_write(it, zeroes, piece);
        size -= piece;
    }
    return &nothing;
}

#define READS(id, name, wait)                                                                                              \
    IMPORT(ENGINE_STREAMS, "[method]input-stream." name) void engine_##id(int32_t it, uint64_t most, bytes_result *to); \
    EXPORT(STREAMS "#[method]input-stream." name) bytes_result *input_##id(const input_stream *it, uint64_t most) {    \
        mark = arena_mark();                                                                                           \
        if (it->engine < ALWAYS) return body_read(it, most, wait);                                                           \
        engine_##id(it->engine, most, &bytes);                                                                         \
        TAKE_OVER(bytes);                                                                                              \
        return &bytes;                                                                                                 \
    }                                                                                                                  \
    EXPORT("cabi_post_" STREAMS "#[method]input-stream." name) void input_##id##_post(const void *it) {                \
        (void)it;                                                                                                      \
        arena_back(mark);                                                                                              \
    }

#define SKIPS(id, name, wait)                                                                                              \
    IMPORT(ENGINE_STREAMS, "[method]input-stream." name) void engine_##id(int32_t it, uint64_t most, count_result *to); \
    EXPORT(STREAMS "#[method]input-stream." name) count_result *input_##id(const input_stream *it, uint64_t most) {    \
        if (it->engine < ALWAYS) return body_skip(it, most, wait);                                                           \
        engine_##id(it->engine, most, &count);                                                                         \
        TAKE_OVER(count);                                                                                              \
        return &count;                                                                                                 \
    }

READS(read, "read", 0)
READS(blocking_read, "blocking-read", 1)
SKIPS(skip, "skip", 0)
SKIPS(blocking_skip, "blocking-skip", 1)

IMPORT(ENGINE_STREAMS, "[method]input-stream.subscribe") int32_t engine_input_subscribe(int32_t it);
IMPORT(ENGINE_STREAMS, "[method]output-stream.subscribe") int32_t engine_output_subscribe(int32_t it);
IMPORT(ENGINE_STREAMS, "[method]output-stream.check-write") void engine_check_write(int32_t it, count_result *to);

EXPORT(STREAMS "#[method]input-stream.subscribe") int32_t input_subscribe(const input_stream *it) {
    return give_pollable(it->engine < ALWAYS ? arrival_of(it) : engine_input_subscribe(it->engine));
}

EXPORT(STREAMS "#[method]output-stream.subscribe") int32_t output_subscribe(const output_stream *it) {
    return give_pollable(it->engine < ALWAYS ? room_for(it) : engine_output_subscribe(it->engine));
}

EXPORT(STREAMS "#[method]output-stream.check-write") count_result *output_check_write(const output_stream *it) {
    if (it->engine < ALWAYS) {
        count = (count_result){.count = room_of(it)};
        if (has_ended(it)) count = (count_result){.failed = 1, .closed = 1};
        return &count;
    }
    engine_check_write(it->engine, &count);
    TAKE_OVER(count);
    return &count;
}

#define WRITES(id, name, then)                                                                                            \
    IMPORT(ENGINE_STREAMS, "[method]output-stream." name)                                                              \
    void engine_##id(int32_t it, const char *data, size_t size, nothing_result *to);                                   \
    EXPORT(STREAMS "#[method]output-stream." name)                                                                     \
    nothing_result *output_##id(const output_stream *it, const char *data, size_t size) {                              \
        if (it->engine < ALWAYS) body_write(it, data, size), then;                                                     \
        else engine_##id(it->engine, data, size, &nothing), (void)TAKE_OVER(nothing);                                  \
        if (size) arena_back(data);                                                                                    \
        return &nothing;                                                                                               \
    }

#define FLUSHES(id, name)                                                                                              \
    IMPORT(ENGINE_STREAMS, "[method]output-stream." name) void engine_##id(int32_t it, nothing_result *to);            \
    EXPORT(STREAMS "#[method]output-stream." name) nothing_result *output_##id(const output_stream *it) {              \
        nothing = (nothing_result){0};                                                                                 \
        if (it->engine >= 0) engine_##id(it->engine, &nothing);                                                        \
        else channel_flush();                                                                                          \
        TAKE_OVER(nothing);                                                                                            \
        return &nothing;                                                                                               \
    }

#define ZEROES(id, name)                                                                                               \
    IMPORT(ENGINE_STREAMS, "[method]output-stream." name)                                                              \
    void engine_##id(int32_t it, uint64_t size, nothing_result *to);                                                   \
    EXPORT(STREAMS "#[method]output-stream." name) nothing_result *output_##id(const output_stream *it, uint64_t size) { \
        if (it->engine < ALWAYS) return body_zeroes(it, size);                                                         \
        engine_##id(it->engine, size, &nothing);                                                                       \
        TAKE_OVER(nothing);                                                                                            \
        return &nothing;                                                                                               \
    }

WRITES(write, "write", (void)0)
WRITES(write_and_flush, "blocking-write-and-flush", channel_flush())
FLUSHES(flush, "flush")
FLUSHES(blocking_flush, "blocking-flush")
ZEROES(zeroes, "write-zeroes")
ZEROES(blocking_zeroes, "blocking-write-zeroes-and-flush")

// Splicing is reading and writing: the engine's own streams may lie on one side only.
static count_result *splice(const output_stream *to, const input_stream *from, uint64_t most, int blocking) {
    if (blocking && to->engine < ALWAYS) wait_for(room_for(to));
    if (blocking && to->engine >= 0) {
        int32_t room = engine_output_subscribe(to->engine);
        engine_block(room);
        drop_pollable(room);
    }
    if (output_check_write(to)->failed) return &count;
    if (count.count < most) most = count.count;
    const void *before = arena_mark();
    (blocking ? input_blocking_read : input_read)(from, most);
    if (bytes.failed) {
        count = (count_result){.failed = 1, .closed = bytes.closed, .error = bytes.error};
        return &count;
    }
    size_t size = bytes.read.size;
    if (to->engine < ALWAYS) body_write(to, bytes.read.data, size);
    else engine_write(to->engine, bytes.read.data, size, &nothing), (void)TAKE_OVER(nothing);
    arena_back(before);
    count = (count_result){.count = size};
    if (nothing.failed) count = (count_result){.failed = 1, .closed = nothing.closed, .error = nothing.error};
    return &count;
}

EXPORT(STREAMS "#[method]output-stream.splice")
count_result *output_splice(const output_stream *it, const input_stream *from, uint64_t most) {
    return splice(it, from, most, 0);
}

EXPORT(STREAMS "#[method]output-stream.blocking-splice")
count_result *output_blocking_splice(const output_stream *it, const input_stream *from, uint64_t most) {
    return splice(it, from, most, 1);
}

#ifdef PLAIN
IMPORT("wasmfleet:engine/stdin@0.1.0", "get-stdin") int32_t engine_stdin(void);
IMPORT("wasmfleet:engine/stdout@0.1.0", "get-stdout") int32_t engine_stdout(void);
EXPORT("wasi:cli/stdin@0.2.12#get-stdin") int32_t guest_stdin(void) { return give_input(engine_stdin()); }
EXPORT("wasi:cli/stdout@0.2.12#get-stdout") int32_t guest_stdout(void) { return give_output(engine_stdout()); }
#else
// The standard streams: there is nothing to read, and what the guest prints goes to its log.
EXPORT("wasi:cli/stdin@0.2.12#get-stdin") int32_t guest_stdin(void) { return give_input(OURS(NO_BODY)); }
EXPORT("wasi:cli/stdout@0.2.12#get-stdout") int32_t guest_stdout(void) { return give_output(engine_stderr()); }
#endif
EXPORT("wasi:cli/stderr@0.2.12#get-stderr") int32_t guest_stderr(void) { return give_output(engine_stderr()); }

// What shims ask for.
#define WRAP "wasmfleet:adapter/wrap@0.1.0#"

EXPORT(WRAP "wait") int32_t wrap_wait(int32_t engine) { return give_pollable(engine); }
EXPORT(WRAP "input") int32_t wrap_input(int32_t engine) { return give_input(engine); }
EXPORT(WRAP "output") int32_t wrap_output(int32_t engine) { return give_output(engine); }

EXPORT(WRAP "lend") handle_or_nothing *wrap_lend(io_error *it) {
    static handle_or_nothing lent;
    lent = (handle_or_nothing){it->engine >= 0, it->engine};
    it->engine = -1;
    return &lent;
}

EXPORT(WRAP "give-back") void wrap_give_back(io_error *it, int32_t engine) { it->engine = engine; }
