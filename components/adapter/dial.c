// A guest that does with wasi:sockets what it is told: a line for each step, words with a space between them, and a line
// about each in the answer. The steps are a request's body; with -DTASK, the configuration's `steps`, and the answer is
// what the task fails with.
//
//   t N F           a TCP socket N of family F (4, 6); u N F  a UDP one, bound to any address
//   b N ADDR PORT   bind a TCP socket; l N  listen
//   c N ADDR PORT   connect and wait for it
//   w N TEXT        write and flush; W N BYTES  write so many, as there is room
//   h N HEX         write bytes; H N BYTES  read so many, as hex
//   r N BYTES       read, waiting for some; R N BYTES  read so many
//   s N HOW         shut down: 0 receive, 1 send, 2 both
//   a N             this end's address, and the other's
//   o N             set options and read them back
//   p N MS          wait for something to read, or a timer
//   q N M           wait for something to read on either of two
//   d N             drop it, with its streams
//   U N [ADDR PORT] datagrams, to one peer alone
//   S N ADDR PORT TEXT  send one (`-` for no address); G N BYTES  one of so many; T N MS  receive, or a timer
//   n NAME          look a name up; C N PORT  connect to its first address
//   m N             make N sockets and drop none; k N ADDR PORT  connect and drop, N times
//   x N             subscribe N times and drop none
#define ROOM_BYTES (512 * 1024)
#define PAGE_BYTES (192 * 1024)
#include "guest.h"

#define TCP "wasi:sockets/tcp" V
#define UDP "wasi:sockets/udp" V
#define LOOKUP "wasi:sockets/ip-name-lookup" V
#define M(name) "[method]" name

typedef struct {
    uint8_t failed;
    union {
        uint8_t code;
        int32_t handles[2];
    } __attribute__((aligned(4)));
} opened;

typedef struct {
    uint8_t failed, code;
} plain;

typedef struct {
    uint8_t failed;
    union {
        uint8_t code;
        uint64_t value;
    } __attribute__((aligned(8)));
} counted;

#define PLACE int32_t, int32_t, int32_t, int32_t, int32_t, int32_t, int32_t, int32_t, int32_t, int32_t, int32_t, int32_t
#define GIVEN(it)                                                                                                      \
    (it).six, (it).p[0], (it).p[1], (it).p[2], (it).p[3], (it).p[4], (it).p[5], (it).p[6], (it).p[7], (it).p[8],       \
        (it).p[9], (it).p[10]

IMPORT("wasi:sockets/instance-network" V, "instance-network") int32_t instance_network(void);
IMPORT("wasi:sockets/tcp-create-socket" V, "create-tcp-socket") void create_tcp(int32_t, opened *);
IMPORT("wasi:sockets/udp-create-socket" V, "create-udp-socket") void create_udp(int32_t, opened *);
IMPORT(TCP, M("tcp-socket.start-bind")) void tcp_bind(int32_t, int32_t, PLACE, plain *);
IMPORT(TCP, M("tcp-socket.finish-bind")) void tcp_bound(int32_t, plain *);
IMPORT(TCP, M("tcp-socket.start-connect")) void tcp_connect(int32_t, int32_t, PLACE, plain *);
IMPORT(TCP, M("tcp-socket.finish-connect")) void tcp_connected(int32_t, opened *);
IMPORT(TCP, M("tcp-socket.start-listen")) void tcp_listen(int32_t, plain *);
IMPORT(TCP, M("tcp-socket.local-address")) void tcp_local(int32_t, uint8_t *);
IMPORT(TCP, M("tcp-socket.remote-address")) void tcp_remote(int32_t, uint8_t *);
IMPORT(TCP, M("tcp-socket.set-keep-alive-enabled")) void tcp_set_keep_alive(int32_t, int32_t, plain *);
IMPORT(TCP, M("tcp-socket.keep-alive-enabled")) void tcp_keep_alive(int32_t, plain *);
IMPORT(TCP, M("tcp-socket.set-hop-limit")) void tcp_set_hops(int32_t, int32_t, plain *);
IMPORT(TCP, M("tcp-socket.hop-limit")) void tcp_hops(int32_t, plain *);
IMPORT(TCP, M("tcp-socket.set-receive-buffer-size")) void tcp_set_receive(int32_t, uint64_t, plain *);
IMPORT(TCP, M("tcp-socket.receive-buffer-size")) void tcp_receive(int32_t, counted *);
IMPORT(TCP, M("tcp-socket.shutdown")) void tcp_shutdown(int32_t, int32_t, plain *);
IMPORT(TCP, M("tcp-socket.subscribe")) int32_t tcp_subscribe(int32_t);
IMPORT(TCP, "[resource-drop]tcp-socket") void drop_tcp(int32_t);
IMPORT(UDP, M("udp-socket.start-bind")) void udp_bind(int32_t, int32_t, PLACE, plain *);
IMPORT(UDP, M("udp-socket.finish-bind")) void udp_bound(int32_t, plain *);
IMPORT(UDP, M("udp-socket.stream")) void udp_stream(int32_t, int32_t, PLACE, opened *);
IMPORT(UDP, M("udp-socket.local-address")) void udp_local(int32_t, uint8_t *);
IMPORT(UDP, M("udp-socket.remote-address")) void udp_remote(int32_t, uint8_t *);
IMPORT(UDP, M("incoming-datagram-stream.receive")) void receive(int32_t, uint64_t, opened *);
IMPORT(UDP, M("incoming-datagram-stream.subscribe")) int32_t incoming_subscribe(int32_t);
IMPORT(UDP, M("outgoing-datagram-stream.check-send")) void check_send(int32_t, counted *);
IMPORT(UDP, M("outgoing-datagram-stream.send")) void send_datagrams(int32_t, const void *, size_t, counted *);
IMPORT(UDP, M("outgoing-datagram-stream.subscribe")) int32_t outgoing_subscribe(int32_t);
IMPORT(UDP, "[resource-drop]udp-socket") void drop_udp(int32_t);
IMPORT(UDP, "[resource-drop]incoming-datagram-stream") void drop_incoming(int32_t);
IMPORT(UDP, "[resource-drop]outgoing-datagram-stream") void drop_outgoing(int32_t);
IMPORT(LOOKUP, "resolve-addresses") void resolve(int32_t, const char *, size_t, opened *);
IMPORT(LOOKUP, M("resolve-address-stream.resolve-next-address")) void next_address(int32_t, uint8_t *);
IMPORT(LOOKUP, M("resolve-address-stream.subscribe")) int32_t lookup_subscribe(int32_t);
IMPORT(LOOKUP, "[resource-drop]resolve-address-stream") void drop_lookup(int32_t);
IMPORT(STREAMS, M("input-stream.read")) void read_some(int32_t, uint64_t, void *);
IMPORT(STREAMS, M("input-stream.subscribe")) int32_t input_subscribe(int32_t);
IMPORT(STREAMS, M("output-stream.subscribe")) int32_t output_subscribe(int32_t);
IMPORT("wasi:io/poll" V, "poll") void poll(const int32_t *, size_t, text *);
IMPORT("wasi:clocks/monotonic-clock" V, "subscribe-duration") int32_t timer(uint64_t);

typedef struct {
    int32_t six, p[11];
} place;

static struct {
    int32_t handle, in, out;
    uint8_t is_udp, is_open, streams, six;
} all[64];

static place found;

static text next_word(text *from) {
    size_t size = 0;
    while (size < from->size && from->data[size] != ' ') size++;
    text it = {from->data, size};
    if (size < from->size) size++;
    *from = (text){from->data + size, from->size - size};
    return it;
}

static uint32_t digit(char c) { return (uint32_t)(c <= '9' ? c - '0' : c - 'a' + 10); }

// Four numbers with dots, or 32 digits in hex; then a port.
static place next_place(text *from) {
    text address = next_word(from);
    place it = {.six = address.size == 32};
    for (size_t i = 0, part = 0; i < address.size; i++) {
        if (it.six) it.p[2 + i / 4] = (int32_t)((uint32_t)it.p[2 + i / 4] << 4 | digit(address.data[i]));
        else if (address.data[i] == '.') part++;
        else it.p[1 + part] = it.p[1 + part] * 10 + (int32_t)digit(address.data[i]);
    }
    it.p[0] = (int32_t)number_of(next_word(from));
    return it;
}

static void say_code(int failed, uint32_t code) {
    if (failed) say(TEXT("e")), say_number(code);
    else say(TEXT("ok"));
}

// An address in memory: variant at `it`, with a port where it is that of a socket.
static void say_address(const uint8_t *it, int with_port) {
    const uint8_t *at = it + (with_port ? 4 : 2);
    uint16_t port = with_port ? *(const uint16_t *)(const void *)at : 0;
    if (it[0]) {
        at += with_port ? 8 : 0;
        for (int i = 0; i < 16; i++) {
            uint8_t byte = at[i ^ 1];
            char digits[2] = {"0123456789abcdef"[byte >> 4], "0123456789abcdef"[byte & 15]};
            say((text){digits, 2});
        }
    } else {
        at += with_port ? 2 : 0;
        for (int i = 0; i < 4; i++) {
            if (i) say(TEXT("."));
            say_number(at[i]);
        }
    }
    if (with_port) say(TEXT(" ")), say_number(port);
}

static void wait_for(int32_t pollable) {
    block(pollable);
    drop_pollable(pollable);
}

static uint32_t network(void) {
    static int32_t it = -1;
    if (it < 0) it = instance_network();
    return (uint32_t)it;
}

static void drop_all(size_t n) {
    if (!all[n].is_open) return;
    if (all[n].streams) {
        all[n].is_udp ? drop_incoming(all[n].in) : drop_input(all[n].in);
        all[n].is_udp ? drop_outgoing(all[n].out) : drop_output(all[n].out);
    }
    all[n].is_udp ? drop_udp(all[n].handle) : drop_tcp(all[n].handle);
    all[n].is_open = all[n].streams = 0;
}

static int create(size_t n, int is_udp, int six, int quiet) {
    opened it = {0};
    is_udp ? create_udp(six, &it) : create_tcp(six, &it);
    if (!it.failed) all[n].handle = it.handles[0], all[n].is_open = 1;
    all[n].is_udp = (uint8_t)is_udp, all[n].six = (uint8_t)six;
    if (!it.failed && is_udp) {
        plain done = {0};
        place any = {.six = six};
        udp_bind(all[n].handle, (int32_t)network(), GIVEN(any), &done);
        if (!done.failed) udp_bound(all[n].handle, &done);
        if (done.failed) it.failed = 1, it.code = done.code;
    }
    if (!quiet) say_code(it.failed, it.code);
    return !it.failed;
}

static int connect(size_t n, place to, int quiet) {
    plain done = {0};
    opened it = {0};
    tcp_connect(all[n].handle, (int32_t)network(), GIVEN(to), &done);
    if (done.failed) {
        if (!quiet) say_code(1, done.code);
        return 0;
    }
    for (;;) {
        tcp_connected(all[n].handle, &it);
        if (!it.failed || it.code != 8) break;
        wait_for(tcp_subscribe(all[n].handle));
    }
    if (!it.failed) all[n].in = it.handles[0], all[n].out = it.handles[1], all[n].streams = 1;
    if (!quiet) say_code(it.failed, it.code);
    return !it.failed;
}

// A stream's error: said, and forgotten.
static void say_broken(const uint32_t *result) {
    say(result[1] & 0xff ? TEXT("closed") : TEXT("failed"));
    if (!(result[1] & 0xff)) drop_io_error((int32_t)result[2]);
}

static void write_many(size_t n, uint32_t size) {
    static char piece[4096];
    uint32_t result[4], left = size;
    for (size_t i = 0; i < sizeof piece; i++) piece[i] = (char)('a' + i % 26);
    while (left) {
        check_write(all[n].out, result);
        if (result[0] & 0xff) break;
        uint32_t room = result[2] > sizeof piece ? sizeof piece : result[2];
        if (!room) {
            wait_for(output_subscribe(all[n].out));
            continue;
        }
        if (room > left) room = left;
        write_some(all[n].out, piece, room, result);
        if (result[0] & 0xff) {
            say_broken(result);
            return;
        }
        left -= room;
    }
    say_number(size - left);
}

static void read_many(size_t n, uint32_t size) {
    uint32_t got = 0, sum = 0;
    while (got < size) {
        uint32_t result[3] = {0};
        used = 0;
        read_some(all[n].in, size - got, result);
        if (result[0] & 0xff) {
            say_broken(result), say(TEXT(" "));
            break;
        }
        if (!result[2]) wait_for(input_subscribe(all[n].in));
        for (uint32_t i = 0; i < result[2]; i++) sum += ((uint8_t *)(uintptr_t)result[1])[i];
        got += result[2];
    }
    say_number(got), say(TEXT(" ")), say_number(sum);
}

static void write_hex(size_t n, text digits) {
    char bytes[256];
    uint32_t result[3] = {0};
    size_t size = digits.size / 2 < sizeof bytes ? digits.size / 2 : sizeof bytes;
    for (size_t i = 0; i < size; i++) bytes[i] = (char)(digit(digits.data[2 * i]) << 4 | digit(digits.data[2 * i + 1]));
    blocking_write(all[n].out, bytes, size, result);
    if (result[0] & 0xff) say_broken(result);
    else say(TEXT("ok"));
}

static void read_hex(size_t n, uint32_t size) {
    while (size) {
        uint32_t result[3] = {0};
        used = 0;
        blocking_read(all[n].in, size, result);
        if (result[0] & 0xff) {
            say_broken(result);
            return;
        }
        for (uint32_t i = 0; i < result[2]; i++) {
            uint8_t byte = ((const uint8_t *)(uintptr_t)result[1])[i];
            say((text){(char[]){"0123456789abcdef"[byte >> 4], "0123456789abcdef"[byte & 15]}, 2});
        }
        size -= result[2];
    }
}

static void say_ready(int32_t first, int32_t second) {
    int32_t list[2] = {first, second};
    text ready;
    poll(list, 2, &ready);
    for (size_t i = 0; i < ready.size; i++) {
        if (i) say(TEXT(" "));
        say_number(((const uint32_t *)(const void *)ready.data)[i]);
    }
    drop_pollable(first), drop_pollable(second);
}

typedef struct {
    text data;
    uint8_t some __attribute__((aligned(4)));
    uint8_t six __attribute__((aligned(4)));
    uint16_t words[14] __attribute__((aligned(4)));
} datagram;

static void send_one(size_t n, int has_place, place to, text data) {
    datagram it = {.data = data, .some = (uint8_t)has_place, .six = (uint8_t)to.six};
    uint8_t *at = (uint8_t *)it.words;
    it.words[0] = (uint16_t)to.p[0];
    for (int i = 0; i < 8 && to.six; i++) it.words[4 + i] = (uint16_t)to.p[2 + i];
    for (int i = 0; i < 4 && !to.six; i++) at[2 + i] = (uint8_t)to.p[1 + i];
    counted sent;
    for (;;) {
        check_send(all[n].out, &sent);
        if (sent.failed || sent.value) break;
        wait_for(outgoing_subscribe(all[n].out));
    }
    send_datagrams(all[n].out, &it, 1, &sent);
    if (sent.failed) say_code(1, sent.code);
    else say_number((uint32_t)sent.value);
}

static void receive_one(size_t n, uint32_t ms) {
    int32_t ends = timer((uint64_t)ms * 1000000);
    for (;;) {
        opened it = {0};
        used = 0;
        receive(all[n].in, 1, &it);
        if (it.failed) {
            say_code(1, it.code);
            break;
        }
        if (it.handles[1]) {
            const datagram *one = (const datagram *)(uintptr_t)it.handles[0];
            say_address((const uint8_t *)one + 8, 1);
            say(TEXT(" ")), say(one->data);
            break;
        }
        int32_t list[2] = {incoming_subscribe(all[n].in), ends};
        text ready;
        poll(list, 2, &ready);
        drop_pollable(list[0]);
        if (ready.size == 1 && ((const uint32_t *)(const void *)ready.data)[0] == 1) {
            say(TEXT("nothing"));
            break;
        }
    }
    drop_pollable(ends);
}

static void look_up(text name) {
    opened it = {0};
    resolve((int32_t)network(), name.data, name.size, &it);
    if (it.failed) {
        say_code(1, it.code);
        return;
    }
    found = (place){0};
    for (int count = 0;;) {
        uint8_t next[22] __attribute__((aligned(4))) = {0};
        next_address(it.handles[0], next);
        if (next[0] && next[2] == 8) {
            wait_for(lookup_subscribe(it.handles[0]));
            continue;
        }
        if (next[0]) say_code(1, next[2]);
        if (next[0] || !next[2]) break;
        if (count++) say(TEXT(" "));
        say_address(next + 4, 0);
        if (count == 1) {
            found.six = next[4];
            for (int i = 0; i < 8 && found.six; i++) found.p[2 + i] = *(uint16_t *)(void *)(next + 6 + 2 * i);
            for (int i = 0; i < 4 && !found.six; i++) found.p[1 + i] = next[6 + i];
        }
    }
    drop_lookup(it.handles[0]);
}

static void say_ends(size_t n) {
    uint8_t it[36] __attribute__((aligned(4)));
    all[n].is_udp ? udp_local(all[n].handle, it) : tcp_local(all[n].handle, it);
    if (it[0]) say_code(1, it[4]);
    else say_address(it + 4, 1);
    say(TEXT(" "));
    all[n].is_udp ? udp_remote(all[n].handle, it) : tcp_remote(all[n].handle, it);
    if (it[0]) say_code(1, it[4]);
    else say_address(it + 4, 1);
}

static void try_options(size_t n) {
    plain done;
    counted size;
    tcp_set_keep_alive(all[n].handle, 1, &done), tcp_keep_alive(all[n].handle, &done);
    say_number(done.code), say(TEXT(" "));
    tcp_set_hops(all[n].handle, 0, &done), say_code(done.failed, done.code), say(TEXT(" "));
    tcp_set_hops(all[n].handle, 9, &done), tcp_hops(all[n].handle, &done);
    say_number(done.code), say(TEXT(" "));
    tcp_set_receive(all[n].handle, 10000, &done), tcp_receive(all[n].handle, &size);
    say_number((uint32_t)size.value);
}

static void step(char what, text rest) {
    static char many[65536];
    plain done = {0};
    opened made_streams = {0};
    if (what == 'n') {
        look_up(rest);
        return;
    }
    size_t n = number_of(next_word(&rest));
    uint32_t result[3] = {0};
    place to;
    if (what == 'm' || what == 'k' || what == 'x') {
        uint32_t count = 0;
        if (what == 'k') to = next_place(&rest);
        for (uint32_t i = 0; i < n; i++) {
            if (what == 'x') {
                input_subscribe(all[0].in);
                count++;
                continue;
            }
            size_t at = what == 'm' && i < 64 ? i : 63;
            if (!create(at, 0, 0, 1)) break;
            if (what == 'k') count += (uint32_t)connect(at, to, 1), drop_all(at);
            else count++;
        }
        say_number(count);
        return;
    }
    if (n > 63) __builtin_trap();
    switch (what) {
    case 't':
    case 'u': create(n, what == 'u', number_of(next_word(&rest)) == 6, 0); break;
    case 'b':
        to = next_place(&rest);
        tcp_bind(all[n].handle, (int32_t)network(), GIVEN(to), &done);
        if (!done.failed) tcp_bound(all[n].handle, &done);
        say_code(done.failed, done.code);
        break;
    case 'l': tcp_listen(all[n].handle, &done), say_code(done.failed, done.code); break;
    case 'c': connect(n, next_place(&rest), 0); break;
    case 'C':
        to = found;
        to.p[0] = (int32_t)number_of(next_word(&rest));
        connect(n, to, 0);
        break;
    case 'w':
        blocking_write(all[n].out, rest.data, rest.size, result);
        if (result[0] & 0xff) say_broken(result);
        else say(TEXT("ok"));
        break;
    case 'h': write_hex(n, rest); break;
    case 'H': read_hex(n, number_of(next_word(&rest))); break;
    case 'W': write_many(n, number_of(next_word(&rest))); break;
    case 'r':
        blocking_read(all[n].in, number_of(next_word(&rest)), result);
        if (result[0] & 0xff) say_broken(result);
        else say((text){(const char *)(uintptr_t)result[1], result[2]});
        break;
    case 'R': read_many(n, number_of(next_word(&rest))); break;
    case 's': tcp_shutdown(all[n].handle, (int32_t)number_of(next_word(&rest)), &done), say_code(done.failed, done.code); break;
    case 'a': say_ends(n); break;
    case 'o': try_options(n); break;
    case 'p': say_ready(input_subscribe(all[n].in), timer((uint64_t)number_of(next_word(&rest)) * 1000000)); break;
    case 'q': say_ready(input_subscribe(all[n].in), input_subscribe(all[number_of(next_word(&rest))].in)); break;
    case 'd': drop_all(n), say(TEXT("ok")); break;
    case 'U':
        to = rest.size ? next_place(&rest) : (place){0};
        udp_stream(all[n].handle, to.p[0] != 0, GIVEN(to), &made_streams);
        if (!made_streams.failed) all[n].in = made_streams.handles[0], all[n].out = made_streams.handles[1], all[n].streams = 1;
        say_code(made_streams.failed, made_streams.code);
        break;
    case 'S':
        if (rest.size && *rest.data == '-') next_word(&rest), send_one(n, 0, (place){0}, rest);
        else to = next_place(&rest), send_one(n, 1, to, rest);
        break;
    case 'G': {
        uint32_t size = number_of(next_word(&rest));
        send_one(n, 0, (place){0}, (text){many, size < sizeof many ? size : sizeof many});
        break;
    }
    case 'T': receive_one(n, number_of(next_word(&rest))); break;
    default: say(TEXT("?"));
    }
}

static char script[65536];

static void run(size_t size) {
    for (size_t at = 0; at < size;) {
        size_t end = at;
        while (end < size && script[end] != '\n') end++;
        used = 0;
        if (end - at > 1) step(script[at], (text){script + at + 2, end - at - 2});
        say(TEXT("\n"));
        at = end + 1;
    }
}

#ifdef TASK
IMPORT("wasi:config/store@0.2.0-rc.1", "get") void config_get(const char *, size_t, uint32_t *);

// result<_, string>
static struct {
    uint8_t failed;
    text said __attribute__((aligned(4)));
} answer;

EXPORT("wasmfleet:schedule/task@0.1.0#run") void *task_run(uint64_t scheduled) {
    (void)scheduled;
    uint32_t result[4] = {0};
    used = written = 0;
    config_get(SPREAD("steps"), result);
    size_t size = 0;
    if (!(result[0] & 0xff) && (result[1] & 0xff)) {
        size = result[3] < sizeof script ? result[3] : sizeof script;
        __builtin_memcpy(script, (const void *)(uintptr_t)result[2], size);
    }
    run(size);
    for (size_t n = 0; n < 64; n++) drop_all(n);
    answer.failed = 1;
    answer.said = (text){page, written};
    return &answer;
}

EXPORT("cabi_post_wasmfleet:schedule/task@0.1.0#run") void task_run_post(void *it) { (void)it; }
#else
EXPORT("wasi:http/incoming-handler" V "#handle") void handle(int32_t request, int32_t outparam) {
    made it;
    size_t size = 0;
    used = written = 0;
    consume(request, &it);
    int32_t incoming = must(it), input;
    body_stream(incoming, &it);
    input = must(it);
    for (;;) {
        uint32_t result[3] = {0};
        used = 0;
        blocking_read(input, sizeof script - size, result);
        if (result[0] & 0xff) break;
        __builtin_memcpy(script + size, (const void *)(uintptr_t)result[1], result[2]);
        size += result[2];
    }
    drop_input(input);
    drop_future(finish_incoming(incoming));
    drop_request(request);
    run(size);
    int32_t response = response_new(fields_new()), body, stream;
    response_body(response, &it);
    body = must(it);
    set_response(outparam, 0, response, 0, 0, 0, 0, 0, 0);
    body_write(body, &it);
    stream = must(it);
    for (size_t at = 0; at < written;) {
        uint32_t result[3];
        size_t piece = written - at < 4096 ? written - at : 4096;
        blocking_write(stream, page + at, piece, result);
        at += piece;
    }
    drop_output(stream);
    uint8_t done[40] __attribute__((aligned(8)));
    finish_outgoing(body, 0, 0, done);
}
#endif
