// Frames, see channel.h. One call is in hand at a time; whole requests may be written ahead behind it.
#include "channel.h"
#include "io.h"

#define PAYLOAD_MAX FRAME_MAX
#define HEADER 9u
#define INITIAL_CREDIT 65536u
#define CREDIT_STEP 16384u // of a body that the guest has read: small bodies cost no frame of credit
#define AHEAD_MAX (16384u + 16u * (HEADER + 1u)) // whole requests behind the one in hand, with their frames

enum kind { REQUEST = 1, WHOLE_REQUEST, BODY, END, CREDIT, RESPONSE, YIELD, STORE_FAILED, CANCEL, NUDGE, ANSWERED, ASK };

IMPORT("wasmfleet:engine/stdin@0.1.0", "get-stdin") int32_t channel_stdin(void);
IMPORT("wasmfleet:engine/stdout@0.1.0", "get-stdout") int32_t channel_stdout(void);
IMPORT(ENGINE_STREAMS, "[method]input-stream.blocking-read")
void blocking_read(int32_t stream, uint64_t most, bytes_result *to);
IMPORT(ENGINE_STREAMS, "[method]output-stream.check-write") void check_write(int32_t stream, count_result *to);
IMPORT(ENGINE_STREAMS, "[method]output-stream.write")
void write_now(int32_t stream, const char *data, size_t size, nothing_result *to);
IMPORT(ENGINE_STREAMS, "[method]input-stream.subscribe") int32_t subscribe(int32_t stream);
IMPORT(ENGINE_POLL, "[method]pollable.ready") int32_t has_arrived(int32_t pollable);
IMPORT(HOST, "cancelled") void host_cancelled(void);
IMPORT(HOST, "wrote") void host_wrote(uint32_t size);

typedef struct {
    uint32_t size;
    uint8_t kind;
    uint32_t call;
} frame;

int looping, metered, prompt, in_call, answer_ended, body_cut;

static int32_t in = -1, out = -1;
static int exact;                                   // the next store reads on where this one stops
static char inbox[4096];                            // what was read and belongs to no frame yet
static uint32_t in_at, in_end;
static char outbox[PAYLOAD_MAX + 2 * (HEADER + 1)];
static uint32_t out_end, open_frame;                // a frame of the body at `open_frame` may still grow; 0 for none
static char ahead[AHEAD_MAX];
static uint32_t ahead_at, ahead_end;
static char body[INITIAL_CREDIT];                   // a ring: what the router has sent and the guest has not read
static uint32_t body_at, body_size, body_taken;
static char trailers[PAYLOAD_MAX];
static uint32_t trailers_size;
static uint32_t call, credit, last_ended;
static int body_open, body_skipped, asked;

// Nobody waits for this call any more: its guest ends here.
static _Noreturn void give_up(void) {
    host_cancelled();
    __builtin_trap();
}

// Fill `to`; 0 where the channel ends first.
static int fill(char *to, uint32_t size) {
    if (in < 0) in = channel_stdin();
    while (size) {
        uint32_t piece = in_end - in_at;
        if (piece) {
            if (piece > size) piece = size;
            __builtin_memcpy(to, inbox + in_at, piece);
            in_at += piece;
        } else {
            const void *mark = arena_mark();
            bytes_result read;
            blocking_read(in, exact || size > sizeof inbox ? size : sizeof inbox, &read);
            if (read.failed) return 0;
            piece = read.read.size < size ? read.read.size : size;
            __builtin_memcpy(to, read.read.data, piece);
            in_at = 0;
            in_end = read.read.size - piece;
            __builtin_memcpy(inbox, read.read.data + piece, in_end);
            arena_back(mark);
        }
        to += piece;
        size -= piece;
    }
    return 1;
}

static int read_header(frame *it) {
    char raw[HEADER];
    if (!fill(raw, HEADER)) return 0;
    __builtin_memcpy(&it->size, raw, 4);
    it->kind = (uint8_t)raw[4];
    __builtin_memcpy(&it->call, raw + 5, 4);
    if (it->size > PAYLOAD_MAX) __builtin_trap();
    return 1;
}

static int read_end(void) {
    char end;
    if (!fill(&end, 1)) return 0;
    if (end != '\n') __builtin_trap();
    return 1;
}

static int skip(uint32_t size) {
    char waste[256];
    for (uint32_t piece; size; size -= piece) {
        piece = size < sizeof waste ? size : sizeof waste;
        if (!fill(waste, piece)) return 0;
    }
    return 1;
}

static void give_credit(void);

static int read_body(uint32_t size) {
    if (body_skipped) {
        body_taken += size;
        if (!skip(size)) return 0;
        give_credit();
        return 1;
    }
    if (size > sizeof body - body_size) __builtin_trap(); // more than its credit
    while (size) {
        uint32_t to = (body_at + body_size) % sizeof body, piece = sizeof body - to;
        if (piece > size) piece = size;
        if (!fill(body + to, piece)) return 0;
        body_size += piece;
        size -= piece;
    }
    return 1;
}

// A whole request behind the call in hand: kept with its header, as it came. As long as one waits at each moment, the
// place of those that have begun is free only once the others are moved there.
static int read_ahead(const frame *it) {
    if (it->size + HEADER > sizeof ahead - ahead_end) {
        __builtin_memmove(ahead, ahead + ahead_at, ahead_end - ahead_at);
        ahead_end -= ahead_at;
        ahead_at = 0;
    }
    if (it->size + HEADER > sizeof ahead - ahead_end) __builtin_trap(); // more than may be written ahead
    char *at = ahead + ahead_end;
    __builtin_memcpy(at, &it->size, 4);
    at[4] = (char)it->kind;
    __builtin_memcpy(at + 5, &it->call, 4);
    ahead_end += HEADER + it->size;
    return fill(at + HEADER, it->size);
}

// Nothing more comes of the request's body. Behind the answer's end the next frame may be another call's: none is read.
static void end_body(void) {
    body_open = 0;
    if (answer_ended) in_call = 0;
}

// One frame while a call is in hand; those of earlier calls are skipped. At the channel's end the call ends.
static void take_frame(void) {
    frame it;
    int ok = read_header(&it);
    if (!ok) give_up();
    if (it.kind == WHOLE_REQUEST) {
        ok = read_ahead(&it);
    } else if (it.call != call || (!body_open && it.kind != CREDIT && it.kind != CANCEL && it.kind != ASK)) {
        ok = skip(it.size);
    } else if (it.kind == BODY) {
        ok = read_body(it.size);
    } else if (it.kind == END) {
        end_body();
        trailers_size = it.size;
        ok = fill(trailers, it.size);
    } else if (it.kind == CREDIT) {
        uint32_t more;
        if (it.size != sizeof more) __builtin_trap();
        ok = fill((char *)&more, sizeof more);
        credit += more;
    } else if (it.kind == CANCEL) {
        if (!answer_ended) give_up();
        body_cut = body_open; // the client got its answer, and sends no more
        end_body();
    } else if (it.kind == ASK) {
        asked = 1;
    } else {
        __builtin_trap();
    }
    if (!ok || !read_end()) give_up();
}

void channel_flush(void) {
    if (!out_end) return;
    if (out < 0) out = channel_stdout();
    count_result room;
    nothing_result done;
    if (metered) host_wrote(out_end);
    for (uint32_t at = 0, piece; at < out_end; at += piece) {
        check_write(out, &room);
        if (room.failed) give_up();
        if (!room.count) __builtin_trap(); // its writes wait, so there is always room
        piece = room.count < out_end - at ? (uint32_t)room.count : out_end - at;
        write_now(out, outbox + at, piece, &done);
        if (done.failed) give_up();
    }
    out_end = open_frame = 0;
}

static void put_frame(enum kind kind, text payload) {
    if (sizeof outbox - out_end < HEADER + 1 + payload.size) channel_flush();
    uint32_t size = (uint32_t)payload.size;
    char *at = outbox + out_end;
    __builtin_memcpy(at, &size, 4);
    at[4] = (char)kind;
    __builtin_memcpy(at + 5, &call, 4);
    *put(at + HEADER, payload) = '\n';
    open_frame = kind == BODY ? out_end + 1 : 0;
    out_end += HEADER + size + 1;
}

int channel_align(text token) {
    uint32_t matched = 0;
    exact = 1;
    while (matched < token.size) {
        char window[64];
        if (token.size > sizeof window) __builtin_trap();
        // What matches is a beginning of the token: read as much as it lacks, and look again where it may begin.
        __builtin_memcpy(window, token.data, matched);
        if (!fill(window + matched, token.size - matched)) return 0;
        uint32_t at = 0;
        while (at < token.size && !same((text){window + at, token.size - at}, (text){token.data, token.size - at})) at++;
        matched = token.size - at;
    }
    return 1;
}

static void begin_call(uint32_t number, int with_body) {
    call = number;
    credit = INITIAL_CREDIT;
    body_at = body_size = body_taken = trailers_size = 0;
    body_open = with_body;
    body_skipped = body_cut = answer_ended = asked = 0;
    in_call = 1;
    if (metered) host_wrote(0);
}

static int next_ahead(text *head) {
    if (ahead_at == ahead_end) return 0;
    uint32_t size, number;
    __builtin_memcpy(&size, ahead + ahead_at, 4);
    __builtin_memcpy(&number, ahead + ahead_at + 5, 4);
    char *to = take_room(size);
    __builtin_memcpy(to, ahead + ahead_at + HEADER, size);
    ahead_at += HEADER + size;
    *head = (text){to, size};
    begin_call(number, 0);
    return 1;
}

// The guest has returned from a call whose answer had ended before.
static void say_returned(uint32_t number) {
    call = number;
    put_frame(END, TEXT(""));
    channel_flush();
}

enum turn channel_next(int last, text *head) {
    looping = 1;
    exact = last;
    if (next_ahead(head)) return CALL;
    for (;;) {
        frame it;
        if (!read_header(&it)) return CHANNEL_ENDED;
        int wanted = it.kind == REQUEST || it.kind == WHOLE_REQUEST;
        char *to = wanted ? take_room(it.size) : NULL;
        if (!(wanted ? fill(to, it.size) : skip(it.size)) || !read_end()) return CHANNEL_ENDED;
        if (it.kind == YIELD) return LEAVE;
        if (it.kind == ASK) say_returned(it.call);
        if (!wanted) continue; // of a call that has ended
        *head = (text){to, it.size};
        begin_call(it.call, it.kind == REQUEST);
        return CALL;
    }
}

static void give_credit(void) {
    if (!body_open || body_taken < CREDIT_STEP) return;
    put_frame(CREDIT, (text){(const char *)&body_taken, sizeof body_taken});
    body_taken = 0;
    channel_flush();
}

int channel_has_body(void) { return body_size || !body_open; }

int channel_has_trailers(void) { return !body_open; }

text channel_read(uint64_t most) {
    uint32_t size = sizeof body - body_at;
    if (size > body_size) size = body_size;
    if (size > most) size = (uint32_t)most;
    char *data = take_room(size);
    __builtin_memcpy(data, body + body_at, size);
    body_at = (body_at + size) % sizeof body;
    body_size -= size;
    body_taken += size;
    give_credit();
    return (text){data, size};
}

void channel_skip_body(void) {
    body_taken += body_size;
    body_size = 0;
    body_skipped = 1;
    give_credit();
}

text channel_trailers(void) {
    wait_for(PART(0, HEAD_OF));
    return (text){trailers, trailers_size};
}

int32_t channel_arrival(void) {
    static int32_t arrival = -1;
    if (arrival < 0) arrival = subscribe(in);
    return arrival;
}

int channel_has_read(void) { return in_at != in_end; }

void channel_take(void) { take_frame(); }

void channel_look(void) {
    if (in_call && (channel_has_read() || has_arrived(channel_arrival()))) take_frame();
}

uint32_t channel_credit(void) { return answer_ended ? 0 : credit < PAYLOAD_MAX ? credit : PAYLOAD_MAX; }

// Further bytes in the frame of the body that was written last, so that small writes share one.
static void grow_frame(const char *data, uint32_t size) {
    char *at = outbox + open_frame - 1;
    uint32_t had;
    __builtin_memcpy(&had, at, 4);
    had += size;
    __builtin_memcpy(at, &had, 4);
    out_end--;
    *put(outbox + out_end, (text){data, size}) = '\n';
    out_end += size + 1;
}

void channel_write(const char *data, size_t size) {
    while (size) {
        uint32_t piece = channel_credit();
        if (!piece) __builtin_trap(); // the caller has waited for credit
        uint32_t room = sizeof outbox - out_end;
        if (room < HEADER + 2) {
            channel_flush();
            continue;
        }
        if (piece > size) piece = (uint32_t)size;
        if (piece > room - HEADER - 1) piece = room - HEADER - 1;
        if (open_frame && out_end - open_frame + 1 + piece <= PAYLOAD_MAX) grow_frame(data, piece);
        else put_frame(BODY, (text){data, piece});
        credit -= piece;
        data += piece;
        size -= piece;
    }
}

int channel_head(text head) {
    if (head.size > PAYLOAD_MAX) return 0;
    put_frame(RESPONSE, head);
    return 1;
}

void channel_answer_ended(text outcome) {
    put_frame(ANSWERED, outcome);
    channel_flush();
    answer_ended = 1;
    in_call = body_open;
}

enum turn channel_end(text outcome, int last) {
    if (!answer_ended) {
        put_frame(END, outcome);
        channel_flush();
    } else if (asked || prompt) {
        say_returned(call); // otherwise the router finds out by what comes next, or asks: that costs no write here
    }
    body_open = body_size = in_call = 0;
    last_ended = call;
    return last && (ahead_at != ahead_end || in_at != in_end) ? MISPLACED : CALL;
}

uint32_t channel_ended(void) { return last_ended; }
