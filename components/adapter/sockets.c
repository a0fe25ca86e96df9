// wasi:sockets: TCP clients, datagrams and names. States, options and checks are here; connections are the host's, each by
// a number. A socket's streams are those of io.c, with that number.
#include "sockets.h"
#include "fields.h"

#define NETWORK "wasi:sockets/network@0.2.12"
#define TCP "wasi:sockets/tcp@0.2.12"
#define UDP "wasi:sockets/udp@0.2.12"
#define LOOKUP "wasi:sockets/ip-name-lookup@0.2.12"

IMPORT("wasmfleet:adapter/sockets@0.1.0", "ask") void sockets_ask(const char *question, size_t size, text *answer);

uint32_t sockets_open;

#ifdef PLAIN
uint8_t asked_host;
#endif

// What a guest may hold at a time; the host has fewer connections.
#define SOCKETS 64
#define LOOKUPS 16
#define ADDRESSES 16
#define AT_ONCE 16 // datagrams in one call

enum code {
    UNKNOWN,
    ACCESS_DENIED,
    NOT_SUPPORTED,
    INVALID_ARGUMENT,
    OUT_OF_MEMORY,
    TIMEOUT,
    CONCURRENCY_CONFLICT,
    NOT_IN_PROGRESS,
    WOULD_BLOCK,
    INVALID_STATE,
    NEW_SOCKET_LIMIT,
    CODES = 21, // how many there are
};

typedef struct {
    uint8_t used;
} network;

// variant ip-socket-address
typedef struct {
    uint8_t six;
    union {
        struct {
            uint16_t port;
            uint8_t bytes[4];
        } v4;
        struct {
            uint16_t port;
            uint32_t flow;
            uint16_t words[8];
            uint32_t scope;
        } v6;
    } __attribute__((aligned(4)));
} address;

_Static_assert(sizeof(address) == 32 && offsetof(address, v6.words) == 12, "the canonical layout");

// An address as the host has it: its bytes, in network order.
typedef struct {
    uint8_t size;
    uint8_t bytes[16];
    uint16_t port;
} place;

enum state { UNBOUND, BINDING, BOUND, CONNECTING, CONNECTED, CLOSED };

typedef struct open_socket {
    struct open_socket *next;
    uint32_t number; // the host's, 0 for none
    uint32_t holders;
    uint8_t state, six, peer_only;
    place peer;
    uint8_t keep_alive, hops;
    uint32_t count;
    uint64_t idle, interval, receive, send;
} open_socket;

typedef open_socket tcp_socket, udp_socket, incoming_stream, outgoing_stream;

typedef struct {
    uint32_t number;
    uint8_t used, found, given, count;
    place addresses[ADDRESSES];
} lookup;

HANDLES(NETWORK, network, "network")
HANDLES(TCP, tcp_socket, "tcp-socket")
HANDLES(UDP, udp_socket, "udp-socket")
HANDLES(UDP, incoming_stream, "incoming-datagram-stream")
HANDLES(UDP, outgoing_stream, "outgoing-datagram-stream")
HANDLES(LOOKUP, lookup, "resolve-address-stream")

static open_socket sockets[SOCKETS];
static lookup lookups[LOOKUPS];

// result<_, error-code>, result<bool, ...>, result<u8, ...>
typedef struct {
    uint8_t failed;
    uint8_t value;
} small_result;

// result<own, error-code>, result<u32, ...>
typedef struct {
    uint8_t failed;
    union {
        uint8_t code;
        int32_t value;
    } __attribute__((aligned(4)));
} word_result;

typedef struct {
    uint8_t failed;
    union {
        uint8_t code;
        uint64_t value;
    } __attribute__((aligned(8)));
} long_result;

typedef struct {
    uint8_t failed;
    union {
        uint8_t code;
        address value;
    } __attribute__((aligned(4)));
} address_result;

// Two streams, or three handles.
typedef struct {
    uint8_t failed;
    union {
        uint8_t code;
        int32_t handles[3];
    } __attribute__((aligned(4)));
} handles_result;

static small_result small;
static word_result word;
static long_result number;
static address_result found_address;
static handles_result handles;

#define FAIL(result, which) ((result) = (__typeof__(result)){.failed = 1, .code = (which)}, &(result))

static small_result *done(int code) {
    small = code < 0 ? (small_result){0, 0} : (small_result){1, (uint8_t)code};
    return &small;
}

#define WELL (-1)

// -- questions to the host

static char *put_number(char *at, uint64_t value) { return put(put(at, TEXT(" ")), decimal(value)); }

static char *put_place(char *at, const place *it) {
    static const char digits[] = "0123456789abcdef";
    *at++ = ' ';
    for (size_t i = 0; i < it->size; i++) *at++ = digits[it->bytes[i] >> 4], *at++ = digits[it->bytes[i] & 15];
    return put_number(at, it->port);
}

static uint8_t nibble(char c) { return (uint8_t)(c <= '9' ? c - '0' : c - 'a' + 10) & 15; }

// Read an address and, behind a space, a port; what follows.
static text take_place(place *it, text from) {
    size_t at = 0;
    *it = (place){0};
    while (at + 1 < from.size && from.data[at] != ' ' && it->size < sizeof it->bytes) {
        it->bytes[it->size++] = (uint8_t)(nibble(from.data[at]) << 4 | nibble(from.data[at + 1]));
        at += 2;
    }
    while (at < from.size && from.data[at] == ' ') at++;
    text rest = {from.data + at, from.size - at};
    it->port = (uint16_t)number_of(rest);
    return rest;
}

// What the host has said, in the arena: `WELL` and what comes behind the `+`, or an error's code.
static int answer_of(text *said) {
    if (!said->size) return UNKNOWN;
    char first = *said->data;
    *said = (text){said->data + 1, said->size - 1};
    if (first == '+') return WELL;
    if (first == '?') return WOULD_BLOCK;
    uint32_t code = number_of(*said);
    return code < CODES ? (int)code : UNKNOWN;
}

static int ask(const char *question, const char *end, text *said) {
    *said = (text){0};
    sockets_ask(question, (size_t)(end - question), said);
    return answer_of(said);
}

// Ask about a socket: a word, its number, and nothing else; the answer's text is not needed.
static int ask_of(text verb, uint32_t it, uint32_t more, int has_more) {
    const void *mark = arena_mark();
    char *question = take_room(64), *at = put_number(put(question, verb), it);
    if (has_more) at = put_number(at, more);
    text said;
    int code = ask(question, at, &said);
    arena_back(mark);
    return code;
}

// Ask for a new number of the host's, with an address.
static int ask_new(text verb, const place *it, uint32_t *got) {
    const void *mark = arena_mark();
    char *question = take_room(80);
    text said;
    int code = ask(question, put_place(put(question, verb), it), &said);
    if (code == WELL) *got = number_of(said), sockets_open++;
    arena_back(mark);
    return code;
}

static int deny(text function) {
    const void *mark = arena_mark();
    char *question = take_room(64);
    text said;
    ask(question, put(put(question, TEXT("denied ")), function), &said);
    arena_back(mark);
    return ACCESS_DENIED;
}

static void forget(uint32_t *it) {
    if (*it) host_close(*it), sockets_open--;
    *it = 0;
}

// -- addresses

// The flattened parameters of an ip-socket-address: a port and four bytes, or port, flow, eight words and scope.
#define ADDRESS_PARAMS                                                                                                 \
    int32_t six, int32_t p0, int32_t p1, int32_t p2, int32_t p3, int32_t p4, int32_t p5, int32_t p6, int32_t p7,       \
        int32_t p8, int32_t p9, int32_t p10
#define ADDRESS_GIVEN six, (const int32_t[]){p0, p1, p2, p3, p4, p5, p6, p7, p8, p9, p10}

static place place_of(int32_t six, const int32_t *params) {
    place it = {.size = six ? 16 : 4, .port = (uint16_t)params[0]};
    for (size_t i = 0; i < it.size; i++)
        it.bytes[i] = six ? (uint8_t)(params[2 + i / 2] >> (i & 1 ? 0 : 8)) : (uint8_t)params[1 + i];
    return it;
}

static place place_from(const address *from) {
    place it = {.size = from->six ? 16 : 4, .port = from->six ? from->v6.port : from->v4.port};
    for (size_t i = 0; i < it.size; i++)
        it.bytes[i] = from->six ? (uint8_t)(from->v6.words[i / 2] >> (i & 1 ? 0 : 8)) : from->v4.bytes[i];
    return it;
}

static void put_words(uint16_t *to, const place *it) {
    for (size_t i = 0; i < 8; i++) to[i] = (uint16_t)(it->bytes[2 * i] << 8 | it->bytes[2 * i + 1]);
}

static address address_of(const place *it) {
    address to = {.six = it->size == 16};
    if (to.six) {
        to.v6.port = it->port;
        put_words(to.v6.words, it);
    } else {
        to.v4.port = it->port;
        __builtin_memcpy(to.v4.bytes, it->bytes, 4);
    }
    return to;
}

static int is_unspecified(const place *it) {
    uint8_t any = 0;
    for (size_t i = 0; i < it->size; i++) any |= it->bytes[i];
    return !any;
}

// -- what TCP and UDP share

static open_socket *free_sockets;
static size_t used_sockets;

static open_socket *new_socket(int six) {
    open_socket *it = free_sockets;
    if (it) free_sockets = it->next;
    else if (used_sockets < SOCKETS) it = &sockets[used_sockets++];
    else return NULL;
    *it = (open_socket){
        .holders = 1, .six = six != 0, .hops = 64, .count = 9, .receive = 65536, .send = 65536,
        .idle = 7200000000000, .interval = 75000000000,
    };
    return it;
}

static void let_go(open_socket *it) {
    if (--it->holders) return;
    forget(&it->number);
    it->next = free_sockets;
    free_sockets = it;
}

// Only the address that stands for all, with a port that is chosen: nobody is to find a component here.
static small_result *bind(open_socket *it, const place *local, text function) {
    if (it->state != UNBOUND) return done(INVALID_STATE);
    if ((local->size == 16) != it->six) return done(INVALID_ARGUMENT);
    if (local->port || !is_unspecified(local)) return done(deny(function));
    it->state = BINDING;
    return done(WELL);
}

static small_result *bound(open_socket *it) {
    if (it->state != BINDING) return done(NOT_IN_PROGRESS);
    it->state = BOUND;
    return done(WELL);
}

static address_result *local_address(const open_socket *it) {
    if (it->state < BOUND || it->state == CLOSED) return FAIL(found_address, INVALID_STATE);
    place local = {.size = it->six ? 16 : 4};
    if (it->number) {
        const void *mark = arena_mark();
        char *question = take_room(32);
        text said;
        int code = ask(question, put_number(put(question, TEXT("local")), it->number), &said);
        if (code == WELL) take_place(&local, said);
        arena_back(mark);
        if (code != WELL) return FAIL(found_address, code);
    }
    found_address = (address_result){.value = address_of(&local)};
    return &found_address;
}

static address_result *remote_address(const open_socket *it) {
    if (it->state != CONNECTED || !it->peer.size) return FAIL(found_address, INVALID_STATE);
    found_address = (address_result){.value = address_of(&it->peer)};
    return &found_address;
}

static void tell_options(const open_socket *it) {
    if (!it->number || it->state != CONNECTED) return;
    const void *mark = arena_mark();
    char *question = take_room(160), *at = put_number(put(question, TEXT("options")), it->number);
    at = put_number(put_number(put_number(at, it->keep_alive), it->idle), it->interval);
    at = put_number(put_number(put_number(put_number(at, it->count), it->hops), it->receive), it->send);
    text said;
    ask(question, at, &said);
    arena_back(mark);
}

static small_result *small_value(uint8_t value) {
    small = (small_result){0, value};
    return &small;
}

static long_result *long_value(uint64_t value) {
    number = (long_result){.value = value};
    return &number;
}

// Options whose value is a number other than 0.
#define SET_OPTION(prefix, name, id, type, field)                                                                      \
    EXPORT(prefix "set-" name) small_result *id##_set_##field(open_socket *it, type value) {                           \
        if (!value) return done(INVALID_ARGUMENT);                                                                     \
        it->field = (__typeof__(it->field))value;                                                                      \
        tell_options(it);                                                                                              \
        return done(WELL);                                                                                             \
    }
#define BOTH(prefix, name, id, type, field, gives)                                                                     \
    EXPORT(prefix "." name) __typeof__(*gives(0)) *id##_##field(const open_socket *it) { return gives(it->field); }    \
    SET_OPTION(prefix ".", name, id, type, field)

// -- network

static network the_network;

EXPORT("wasi:sockets/instance-network@0.2.12#instance-network") int32_t instance_network(void) {
    return network_new(&the_network);
}

EXPORT(NETWORK "#[dtor]network") void network_dtor(network *it) { (void)it; }

// option<error-code>
EXPORT(NETWORK "#network-error-code") small_result *network_error_code(const io_error *it) {
    uint32_t code = it->engine < ALWAYS ? NUMBER(it->engine) - SOCKET_ERROR : CODES;
    small = code < CODES ? (small_result){1, (uint8_t)code} : (small_result){0, 0};
    return &small;
}

// -- TCP

#define TCP_METHOD TCP "#[method]tcp-socket"

EXPORT("wasi:sockets/tcp-create-socket@0.2.12#create-tcp-socket") word_result *create_tcp(int32_t six) {
    open_socket *it = new_socket(six);
    if (!it) return FAIL(word, NEW_SOCKET_LIMIT);
    word = (word_result){.value = tcp_socket_new(it)};
    return &word;
}

EXPORT(TCP "#[dtor]tcp-socket") void tcp_socket_dtor(open_socket *it) { let_go(it); }

EXPORT(TCP_METHOD ".start-bind") small_result *tcp_bind(open_socket *it, const network *net, ADDRESS_PARAMS) {
    (void)net;
    place local = place_of(ADDRESS_GIVEN);
    return bind(it, &local, TEXT("wasi:sockets/tcp.start-bind"));
}

EXPORT(TCP_METHOD ".finish-bind") small_result *tcp_bound(open_socket *it) { return bound(it); }

EXPORT(TCP_METHOD ".start-connect") small_result *tcp_connect(open_socket *it, const network *net, ADDRESS_PARAMS) {
    (void)net;
    if (it->state == CONNECTING) return done(CONCURRENCY_CONFLICT);
    if (it->state != UNBOUND && it->state != BOUND) return done(INVALID_STATE);
    place peer = place_of(ADDRESS_GIVEN);
    if ((peer.size == 16) != it->six || !peer.port || is_unspecified(&peer)) return done(INVALID_ARGUMENT);
    int code = ask_new(TEXT("tcp"), &peer, &it->number);
    if (code != WELL) {
        if (code != NEW_SOCKET_LIMIT) it->state = CLOSED;
        return done(code);
    }
    it->peer = peer;
    it->state = CONNECTING;
    return done(WELL);
}

EXPORT(TCP_METHOD ".finish-connect") handles_result *tcp_connected(open_socket *it) {
    if (it->state != CONNECTING) return FAIL(handles, NOT_IN_PROGRESS);
    int code = ask_of(TEXT("connected"), it->number, 0, 0);
    if (code == WOULD_BLOCK) return FAIL(handles, code);
    if (code != WELL) {
        forget(&it->number);
        it->state = CLOSED;
        return FAIL(handles, code);
    }
    it->state = CONNECTED;
    tell_options(it);
    handles = (handles_result){.handles = {give_input(OURS(it->number)), give_output(OURS(it->number))}};
    return &handles;
}

EXPORT(TCP_METHOD ".start-listen") small_result *tcp_listen(open_socket *it) {
    return done(it->state == BOUND ? deny(TEXT("wasi:sockets/tcp.start-listen")) : INVALID_STATE);
}

EXPORT(TCP_METHOD ".finish-listen") small_result *tcp_listening(open_socket *it) {
    (void)it;
    return done(NOT_IN_PROGRESS);
}

EXPORT(TCP_METHOD ".accept") handles_result *tcp_accept(open_socket *it) {
    (void)it;
    return FAIL(handles, INVALID_STATE);
}

EXPORT(TCP_METHOD ".local-address") address_result *tcp_local(const open_socket *it) { return local_address(it); }
EXPORT(TCP_METHOD ".remote-address") address_result *tcp_remote(const open_socket *it) { return remote_address(it); }

EXPORT(TCP_METHOD ".is-listening") int32_t tcp_is_listening(const open_socket *it) {
    (void)it;
    return 0;
}

EXPORT(TCP_METHOD ".address-family") int32_t tcp_family(const open_socket *it) { return it->six; }

EXPORT(TCP_METHOD ".set-listen-backlog-size") small_result *tcp_backlog(open_socket *it, int64_t value) {
    (void)it;
    return done(value ? NOT_SUPPORTED : INVALID_ARGUMENT);
}

EXPORT(TCP_METHOD ".keep-alive-enabled") small_result *tcp_keep_alive(const open_socket *it) {
    return small_value(it->keep_alive);
}

EXPORT(TCP_METHOD ".set-keep-alive-enabled") small_result *tcp_set_keep_alive(open_socket *it, int32_t value) {
    it->keep_alive = value != 0;
    tell_options(it);
    return done(WELL);
}

EXPORT(TCP_METHOD ".keep-alive-count") word_result *tcp_count(const open_socket *it) {
    word = (word_result){.value = (int32_t)it->count};
    return &word;
}

SET_OPTION(TCP_METHOD ".", "keep-alive-count", tcp, int32_t, count)
BOTH(TCP_METHOD, "keep-alive-idle-time", tcp, int64_t, idle, long_value)
BOTH(TCP_METHOD, "keep-alive-interval", tcp, int64_t, interval, long_value)
BOTH(TCP_METHOD, "hop-limit", tcp, int32_t, hops, small_value)
BOTH(TCP_METHOD, "receive-buffer-size", tcp, int64_t, receive, long_value)
BOTH(TCP_METHOD, "send-buffer-size", tcp, int64_t, send, long_value)

EXPORT(TCP_METHOD ".subscribe") int32_t tcp_subscribe(const open_socket *it) {
    return give_pollable(it->state == CONNECTING ? PART(it->number, HEAD_OF) : ALWAYS);
}

EXPORT(TCP_METHOD ".shutdown") small_result *tcp_shutdown(open_socket *it, int32_t which) {
    if (it->state != CONNECTED) return done(INVALID_STATE);
    return done(ask_of(TEXT("shutdown"), it->number, (uint32_t)which, 1));
}

// -- UDP

#define UDP_METHOD UDP "#[method]udp-socket"
#define INCOMING UDP "#[method]incoming-datagram-stream"
#define OUTGOING UDP "#[method]outgoing-datagram-stream"

EXPORT("wasi:sockets/udp-create-socket@0.2.12#create-udp-socket") word_result *create_udp(int32_t six) {
    open_socket *it = new_socket(six);
    if (!it) return FAIL(word, NEW_SOCKET_LIMIT);
    word = (word_result){.value = udp_socket_new(it)};
    return &word;
}

EXPORT(UDP "#[dtor]udp-socket") void udp_socket_dtor(open_socket *it) { let_go(it); }
EXPORT(UDP "#[dtor]incoming-datagram-stream") void incoming_dtor(open_socket *it) { let_go(it); }
EXPORT(UDP "#[dtor]outgoing-datagram-stream") void outgoing_dtor(open_socket *it) { let_go(it); }

EXPORT(UDP_METHOD ".start-bind") small_result *udp_bind(open_socket *it, const network *net, ADDRESS_PARAMS) {
    (void)net;
    place local = place_of(ADDRESS_GIVEN);
    return bind(it, &local, TEXT("wasi:sockets/udp.start-bind"));
}

EXPORT(UDP_METHOD ".finish-bind") small_result *udp_bound(open_socket *it) { return bound(it); }

EXPORT(UDP_METHOD ".stream") handles_result *udp_stream(open_socket *it, int32_t some, ADDRESS_PARAMS) {
    if (it->state != BOUND && it->state != CONNECTED) return FAIL(handles, INVALID_STATE);
    place peer = some ? place_of(ADDRESS_GIVEN) : (place){.size = it->six ? 16 : 4};
    if (some && ((peer.size == 16) != it->six || !peer.port || is_unspecified(&peer)))
        return FAIL(handles, INVALID_ARGUMENT);
    // Streams that the guest had before must be gone: another peer is another socket of the host's.
    if (it->holders > 1) return FAIL(handles, INVALID_STATE);
    forget(&it->number);
    int code = ask_new(TEXT("udp"), &peer, &it->number);
    if (code != WELL) return FAIL(handles, code);
    it->peer = some ? peer : (place){0};
    it->peer_only = some != 0;
    it->state = CONNECTED;
    it->holders += 2;
    handles = (handles_result){.handles = {incoming_stream_new(it), outgoing_stream_new(it)}};
    return &handles;
}

EXPORT(UDP_METHOD ".local-address") address_result *udp_local(const open_socket *it) { return local_address(it); }
EXPORT(UDP_METHOD ".remote-address") address_result *udp_remote(const open_socket *it) { return remote_address(it); }
EXPORT(UDP_METHOD ".address-family") int32_t udp_family(const open_socket *it) { return it->six; }
BOTH(UDP_METHOD, "unicast-hop-limit", udp, int32_t, hops, small_value)
BOTH(UDP_METHOD, "receive-buffer-size", udp, int64_t, receive, long_value)
BOTH(UDP_METHOD, "send-buffer-size", udp, int64_t, send, long_value)

EXPORT(UDP_METHOD ".subscribe") int32_t udp_subscribe(const open_socket *it) {
    (void)it;
    return give_pollable(ALWAYS);
}

typedef struct {
    text data;
    address from;
} incoming_datagram;

typedef struct {
    text data;
    uint8_t some __attribute__((aligned(4)));
    address to;
} outgoing_datagram;

// result<list<incoming-datagram>, error-code>
typedef struct {
    uint8_t failed;
    union {
        uint8_t code;
        text list;
    } __attribute__((aligned(4)));
} datagrams_result;

_Static_assert(sizeof(incoming_datagram) == 40 && sizeof(outgoing_datagram) == 44, "the canonical layout");

static datagrams_result datagrams;
static const void *received_mark;

EXPORT(INCOMING ".receive") datagrams_result *incoming_receive(open_socket *it, uint64_t most) {
    received_mark = arena_mark();
    if (most > AT_ONCE) most = AT_ONCE;
    incoming_datagram *list = take_room(AT_ONCE * sizeof *list);
    size_t count = 0;
    int code = WELL;
    while (count < most) {
        char *question = take_room(32);
        text said;
        place from;
        code = ask(question, put_number(put(question, TEXT("receive")), it->number), &said);
        if (code != WELL) break;
        text rest = take_place(&from, said);
        while (rest.size && *rest.data != '\n') rest.data++, rest.size--;
        if (rest.size) rest.data++, rest.size--;
        list[count++] = (incoming_datagram){latin1_back(rest), address_of(&from)};
    }
    if (!count && code != WELL && code != WOULD_BLOCK) return FAIL(datagrams, code);
    datagrams = (datagrams_result){.list = {(const char *)list, count}};
    return &datagrams;
}

EXPORT("cabi_post_" INCOMING ".receive") void incoming_receive_post(const void *it) {
    (void)it;
    arena_back(received_mark);
}

EXPORT(INCOMING ".subscribe") int32_t incoming_subscribe(const open_socket *it) {
    return give_pollable(PART(it->number, BODY_OF));
}

EXPORT(OUTGOING ".check-send") long_result *outgoing_check(const open_socket *it) {
    uint32_t room = host_room(it->number);
    return long_value(room < AT_ONCE ? room : AT_ONCE);
}

static int send_one(const open_socket *it, const outgoing_datagram *each) {
    place to = each->some ? place_from(&each->to) : it->peer;
    if (!to.size || !to.port || (to.size == 16) != it->six || is_unspecified(&to)) return INVALID_ARGUMENT;
    // A socket with a peer sends to that alone.
    if (it->peer_only && (to.port != it->peer.port || !same((text){(char *)to.bytes, 16}, (text){(char *)it->peer.bytes, 16})))
        return INVALID_ARGUMENT;
    if (each->data.size > 65507) return 17; // datagram-too-large
    const void *mark = arena_mark();
    text data = latin1(each->data.data, each->data.size), said;
    char *question = take_room(data.size + 96);
    char *at = put_place(put_number(put(question, TEXT("send")), it->number), &to);
    *at++ = '\n';
    int code = ask(question, put(at, data), &said);
    arena_back(mark);
    return code;
}

EXPORT(OUTGOING ".send") long_result *outgoing_send(open_socket *it, const outgoing_datagram *list, size_t count) {
    size_t sent = 0;
    int code = WELL;
    while (sent < count && sent < AT_ONCE && code == WELL) {
        code = send_one(it, &list[sent]);
        sent += code == WELL;
    }
    if (count) arena_back(list);
    if (!sent && code != WELL && code != WOULD_BLOCK) return FAIL(number, code);
    return long_value(sent);
}

EXPORT(OUTGOING ".subscribe") int32_t outgoing_subscribe(const open_socket *it) {
    return give_pollable(PART(it->number, ROOM_OF));
}

// -- names

EXPORT(LOOKUP "#[dtor]resolve-address-stream") void lookup_dtor(lookup *it) {
    forget(&it->number);
    it->used = 0;
}

EXPORT(LOOKUP "#resolve-addresses") word_result *resolve(const network *net, const char *name, size_t size) {
    (void)net;
    lookup *it = NULL;
    for (size_t i = 0; i < LOOKUPS && !it; i++)
        if (!lookups[i].used) it = &lookups[i];
    int code = it ? INVALID_ARGUMENT : NEW_SOCKET_LIMIT;
    if (it && size && size < 1024) {
        *it = (lookup){0};
        char *question = take_room(size + 16);
        text said;
        code = ask(question, put(put(question, TEXT("name ")), (text){name, size}), &said);
        if (code == WELL) it->number = number_of(said), it->used = 1, sockets_open++;
    }
    if (size) arena_back(name);
    if (code != WELL) return FAIL(word, code);
    word = (word_result){.value = lookup_new(it)};
    return &word;
}

// result<option<ip-address>, error-code>
typedef struct {
    uint8_t failed;
    uint8_t some_or_code __attribute__((aligned(2)));
    uint8_t six __attribute__((aligned(2)));
    union {
        uint8_t bytes[4];
        uint16_t words[8];
    } __attribute__((aligned(2)));
} next_address;

_Static_assert(sizeof(next_address) == 22, "the canonical layout");

EXPORT(LOOKUP "#[method]resolve-address-stream.resolve-next-address") next_address *next_of(lookup *it) {
    static next_address to;
    if (!it->found) {
        const void *mark = arena_mark();
        char *question = take_room(32);
        text said;
        int code = ask(question, put_number(put(question, TEXT("addresses")), it->number), &said);
        while (code == WELL && said.size && it->count < ADDRESSES) {
            size_t size = 0;
            while (size < said.size && said.data[size] != ' ') size++;
            take_place(&it->addresses[it->count++], (text){said.data, size});
            size_t skip = size < said.size ? size + 1 : size;
            said = (text){said.data + skip, said.size - skip};
        }
        arena_back(mark);
        if (code != WELL) {
            to = (next_address){.failed = 1, .some_or_code = (uint8_t)code};
            return &to;
        }
        it->found = 1;
    }
    to = (next_address){0};
    if (it->given < it->count) {
        const place *each = &it->addresses[it->given++];
        to.some_or_code = 1;
        to.six = each->size == 16;
        if (to.six) put_words(to.words, each);
        else __builtin_memcpy(to.bytes, each->bytes, 4);
    }
    return &to;
}

EXPORT(LOOKUP "#[method]resolve-address-stream.subscribe") int32_t lookup_subscribe(const lookup *it) {
    return give_pollable(it->found ? ALWAYS : PART(it->number, HEAD_OF));
}
