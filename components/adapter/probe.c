// A guest of the adapter for its tests: an ordinary wasi:http component that tries everything, one thing a path.
//
//   /                  200, "hello over wasi:http\n"
//   /describe          the request as it arrived: method, target, scheme, authority, a line for each field
//   /echo              the request's body back, as it is read
//   /status/418        that status, no body
//   /fields            what the operations on fields answer
//   /twice             what asking twice for what is given once answers
//   /trailers          a body, then the trailer x-sum: 7
//   /stream            a line written before the answer is set, then the request's body as it comes, never flushed
//   /late              the answer is set after its body was written
//   /log               a line on standard output, one on standard error
//   /count             how many requests this instance has seen
//   /fetch             a request to http://example.org:8080/there?x=1; the number of the error
//   /get?host:port/path        what a request there answers: status, a line for each field, and the body, as it is read
//                              then, if there are any, a line "trailers" and a line for each
//   /rest?host:port/path       the same, but for the body, which is not read
//   /post?host:port/path       the same, sending a body of 300,000 bytes
//   /both?host:port/path       two requests at once: their statuses
//   /early?host:port/path      a request there whose body, "first" and then the request's own, goes on when the answer's
//                              head has come, and ends with the trailer x-sum: 7; the answer's status and body
//   /crowd?host:port/path      twenty requests there at once: for each the status, or e and the number of the error
//   /error, /silent, /cut, /trap    the ways to fail: an error, no answer, half a body, a trap
//   /events            lines without end, each flushed
//   /large/N           N MiB
//   /pages/N           N times 4 KiB
//   /sum               the request's trailers, as /describe prints fields
//   /half              half a body, not flushed, then a trap
//   /spin              no answer, and no end
//   /stdin             how many bytes standard input has, at most 64
//   /fields/N          an answer with N fields of a hundred bytes
//   /sick, /poison     from here on its health check fails, or traps
//   /race?host:port/path       a request there and a timer of 200 ms: which of them was first
//   /sleep             an answer after a minute
#define ROOM_BYTES (256 * 1024)
#define PAGE_BYTES (64 * 1024)
#include "guest.h"

IMPORT(TYPES, "[method]fields.set") void set_field(int32_t, const char *, size_t, const text *, size_t, uint8_t *);
IMPORT(TYPES, "[method]fields.delete") void delete_field(int32_t, const char *, size_t, uint8_t *);
IMPORT(TYPES, "[method]fields.get") void get_field(int32_t, const char *, size_t, text *);
IMPORT(TYPES, "[method]fields.has") int32_t has_field(int32_t, const char *, size_t);
IMPORT(TYPES, "[method]fields.clone") int32_t clone_fields(int32_t);
IMPORT(TYPES, "[static]fields.from-list") void from_list(const field *, size_t, made *);
IMPORT(TYPES, "[constructor]outgoing-request") int32_t outgoing_new(int32_t);
IMPORT(TYPES, "[method]outgoing-request.set-scheme")
int32_t set_scheme(int32_t, int32_t, int32_t, const char *, size_t);
IMPORT(TYPES, "[method]outgoing-request.set-authority")
int32_t set_authority(int32_t, int32_t, const char *, size_t);
IMPORT(TYPES, "[method]outgoing-request.set-path-with-query")
int32_t set_target(int32_t, int32_t, const char *, size_t);
IMPORT(TYPES, "[constructor]request-options") int32_t options_new(void);
IMPORT(TYPES, "[method]request-options.set-connect-timeout") int32_t set_timeout(int32_t, int32_t, uint64_t);
IMPORT("wasi:http/outgoing-handler" V, "handle") void fetch(int32_t, int32_t, int32_t, void *);
IMPORT(TYPES, "[method]outgoing-request.set-method") int32_t set_method(int32_t, int32_t, const char *, size_t);
IMPORT(TYPES, "[method]outgoing-request.body") void request_body(int32_t, made *);
IMPORT(TYPES, "[method]future-incoming-response.subscribe") int32_t answer_ready(int32_t);
IMPORT(TYPES, "[method]future-incoming-response.get") void get_answer(int32_t, uint8_t *);
IMPORT(TYPES, "[resource-drop]future-incoming-response") void drop_answer(int32_t);
IMPORT(TYPES, "[method]incoming-response.status") int32_t answer_status(int32_t);
IMPORT(TYPES, "[method]incoming-response.headers") int32_t answer_headers(int32_t);
IMPORT(TYPES, "[method]incoming-response.consume") void answer_body(int32_t, made *);
IMPORT(TYPES, "[resource-drop]incoming-response") void drop_response(int32_t);
IMPORT(TYPES, "http-error-code") void error_code_of(int32_t, uint8_t *);
IMPORT("wasi:io/poll" V, "poll") void poll_list(const int32_t *, size_t, text *);
IMPORT(STREAMS, "[method]output-stream.subscribe") int32_t has_room(int32_t);
IMPORT("wasi:cli/stdin" V, "get-stdin") int32_t get_stdin(void);
IMPORT("wasi:cli/stdout" V, "get-stdout") int32_t get_stdout(void);
IMPORT("wasi:cli/stderr" V, "get-stderr") int32_t get_stderr(void);
IMPORT("wasi:clocks/monotonic-clock" V, "subscribe-duration") int32_t after(uint64_t ns);

static uint64_t scratch[8]; // where calls put answers that are not looked at

static int starts(text a, text b) {
    if (a.size < b.size) return 0;
    for (size_t i = 0; i < b.size; i++)
        if (a.data[i] != b.data[i]) return 0;
    return 1;
}

static int is(text a, text b) { return a.size == b.size && starts(a, b); }

static void say_result(const char *what, size_t size, const uint8_t *result) {
    static const text names[] = {TEXT("invalid-syntax\n"), TEXT("forbidden\n"), TEXT("immutable\n")};
    say((text){what, size});
    say(TEXT(": "));
    say(result[0] ? names[result[1]] : TEXT("ok\n"));
}

static void write_all(int32_t stream, text t) {
    while (t.size) {
        size_t size = t.size < 4096 ? t.size : 4096;
        blocking_write(stream, t.data, size, scratch);
        if (*(uint8_t *)scratch) __builtin_trap();
        t = (text){t.data + size, t.size - size};
    }
}

static int32_t outparam;
static int32_t seen;

// Begin the answer; what is given back is its body.
static int32_t answer(int32_t status) {
    made body;
    int32_t fields = fields_new();
    append(fields, SPREAD("Content-Type"), SPREAD("text/plain"), (uint8_t *)scratch);
    append(fields, SPREAD("x-bytes"), SPREAD("caf\xe9"), (uint8_t *)scratch);
    int32_t response = response_new(fields);
    if (set_status(response, status)) __builtin_trap();
    response_body(response, &body);
    set_response(outparam, 0, response, 0, 0, 0, 0, 0, 0);
    return must(body);
}

static int32_t open_body(int32_t body) {
    made stream;
    body_write(body, &stream);
    return must(stream);
}

static void finish(int32_t body, int32_t trailers) { finish_outgoing(body, trailers >= 0, trailers, scratch); }

static void answer_page(int32_t status) {
    int32_t body = answer(status), stream = open_body(body);
    write_all(stream, (text){page, written});
    drop_output(stream);
    finish(body, -1);
}

// The trailers come after the body, which nobody reads here.
static void trailers_of(int32_t request) {
    made body;
    uint8_t result[56];
    consume(request, &body);
    int32_t future = finish_incoming(must(body)), ready = trailers_ready(future);
    block(ready);
    drop_pollable(ready);
    get_trailers(future, result);
    say(TEXT("\n"));
    if (result[24]) list_fields(*(int32_t *)(result + 28));
    drop_future(future);
}

static void try_fields(int32_t request) {
    uint8_t r[8];
    made list;
    text values[2] = {TEXT("a"), TEXT("b")}, found;
    int32_t own = fields_new(), foreign = request_headers(request);
    append(own, SPREAD("X-One"), SPREAD("1"), r), say_result(SPREAD("append"), r);
    append(own, SPREAD("bad name"), SPREAD("1"), r), say_result(SPREAD("append a bad name"), r);
    append(own, SPREAD("x-two"), SPREAD("1\r\nx: y"), r), say_result(SPREAD("append a bad value"), r);
    append(own, SPREAD("Host"), SPREAD("other"), r), say_result(SPREAD("append host"), r);
    append(foreign, SPREAD("x"), SPREAD("y"), r), say_result(SPREAD("append to the request's"), r);
    delete_field(foreign, SPREAD("x"), r), say_result(SPREAD("delete from the request's"), r);
    set_field(own, SPREAD("x-one"), values, 2, r), say_result(SPREAD("set"), r);
    get_field(own, SPREAD("X-ONE"), &found);
    say(TEXT("get: ")), say_number((int32_t)found.size), say(TEXT("\n"));
    int32_t copy = clone_fields(own);
    delete_field(own, SPREAD("X-one"), r), say_result(SPREAD("delete"), r);
    say(TEXT("has, has in the copy: "));
    say_number(has_field(own, SPREAD("x-one"))), say_number(has_field(copy, SPREAD("x-one"))), say(TEXT("\n"));
    int32_t mine = clone_fields(foreign);
    append(mine, SPREAD("x"), SPREAD("y"), r), say_result(SPREAD("append to a copy of the request's"), r);
    field lines[2] = {{TEXT("a"), TEXT("1")}, {TEXT("upgrade"), TEXT("h2c")}};
    from_list(lines, 1, &list);
    say(TEXT("from-list: ")), say_number(list.tag), say(TEXT("\n"));
    drop_fields(must(list));
    from_list(lines, 2, &list);
    say(TEXT("from-list with upgrade: ")), say_number(list.tag), say_number(list.handle & 0xff), say(TEXT("\n"));
    drop_fields(own), drop_fields(foreign), drop_fields(copy), drop_fields(mine);
}

static void twice(int32_t request) {
    made body, stream;
    uint8_t trailers[56];
    consume(request, &body);
    say_number(body.tag);
    int32_t incoming = body.handle;
    consume(request, &body);
    say_number(body.tag);
    body_stream(incoming, &stream);
    say_number(stream.tag);
    drop_input(stream.handle);
    body_stream(incoming, &stream);
    say_number(stream.tag);
    int32_t future = finish_incoming(incoming), ready = trailers_ready(future);
    block(ready);
    drop_pollable(ready);
    get_trailers(future, trailers);
    say(TEXT(" ")), say_number(trailers[0]), say_number(trailers[8]), say_number(trailers[16]), say_number(trailers[24]);
    get_trailers(future, trailers);
    say(TEXT(" ")), say_number(trailers[0]), say_number(trailers[8]);
    drop_future(future);
    say(TEXT("\n"));
}

static void echo(int32_t request) {
    made body, input;
    int32_t out_body = answer(200), out = open_body(out_body);
    consume(request, &body);
    body_stream(must(body), &input);
    for (;;) {
        optional chunk;
        used = 0;
        blocking_read(must(input), 64 * 1024, &chunk);
        if (chunk.tag) break;
        write_all(out, chunk.value);
    }
    drop_input(input.handle);
    drop_future(finish_incoming(body.handle));
    drop_output(out);
    finish(out_body, -1);
}

static void late(void) {
    made body;
    int32_t response = response_new(fields_new());
    response_body(response, &body);
    int32_t stream = open_body(must(body));
    // Not flushed either: the adapter does that.
    check_write(stream, scratch);
    write_some(stream, SPREAD("written first\n"), scratch);
    drop_output(stream);
    finish(body.handle, -1);
    set_response(outparam, 0, response, 0, 0, 0, 0, 0, 0);
}

// As runtimes with a loop of events write.
static void write_with_room(int32_t stream, text t) {
    while (t.size) {
        check_write(stream, scratch);
        size_t size = t.size < scratch[1] ? t.size : (size_t)scratch[1];
        if (size) {
            write_some(stream, t.data, size, scratch);
        } else {
            int32_t ready = has_room(stream);
            block(ready);
            drop_pollable(ready);
        }
        t = (text){t.data + size, t.size - size};
    }
}

static void stream(int32_t request) {
    made body, incoming, input;
    int32_t response = response_new(fields_new());
    response_body(response, &body);
    int32_t out = open_body(must(body));
    write_with_room(out, TEXT("first\n"));
    set_response(outparam, 0, response, 0, 0, 0, 0, 0, 0);
    consume(request, &incoming);
    body_stream(must(incoming), &input);
    for (optional chunk; used = 0, blocking_read(must(input), 64 * 1024, &chunk), !chunk.tag;)
        write_with_room(out, chunk.value);
    drop_input(input.handle);
    drop_future(finish_incoming(incoming.handle));
    drop_output(out);
    finish(body.handle, -1);
}

static void log_lines(void) {
    int32_t out = get_stdout(), err = get_stderr();
    write_all(out, TEXT("to standard output\n"));
    write_all(err, TEXT("to standard error\n"));
    drop_output(out), drop_output(err);
    say(TEXT("logged\n"));
}

static void read_stdin(void) {
    optional result;
    int32_t in = get_stdin();
    blocking_read(in, 64, &result);
    drop_input(in);
    say_number(result.tag ? 0 : (int32_t)result.value.size);
    answer_page(200);
}

static void many_fields(text number) {
    static char value[100];
    uint8_t result[16];
    uint32_t count = number_of(number);
    for (size_t i = 0; i < sizeof value; i++) value[i] = 'v';
    int32_t fields = fields_new();
    while (count--) append(fields, SPREAD("x-field"), value, sizeof value, result);
    int32_t response = response_new(fields);
    made body;
    response_body(response, &body);
    set_response(outparam, 0, response, 0, 0, 0, 0, 0, 0);
    finish(must(body), -1);
}

static int sick, poisoned;

// result<_, string>
typedef struct {
    uint32_t failed;
    text said;
} outcome;

EXPORT("wasmfleet:http/health@0.1.0#check") outcome *check(void) {
    static outcome it;
    if (poisoned) __builtin_trap();
    it = (outcome){sick != 0, TEXT("it is sick")};
    return &it;
}

static void try_fetch(void) {
    uint8_t result[40];
    int32_t fields = fields_new(), options = options_new();
    append(fields, SPREAD("x-key"), SPREAD("v"), result);
    int32_t request = outgoing_new(fields);
    say_number(set_authority(request, 1, SPREAD("bad host")));
    say_number(set_target(request, 1, SPREAD("/with space")));
    say_number(set_scheme(request, 1, 0, NULL, 0));
    say_number(set_authority(request, 1, SPREAD("example.org:8080")));
    say_number(set_target(request, 1, SPREAD("/there?x=1")));
    set_timeout(options, 1, 1500000000);
    fetch(request, 1, options, result);
    say(TEXT(" ")), say_number(result[0]), say(TEXT(" ")), say_number(result[8]), say(TEXT("\n"));
}

// Begin a request to `host:port/path`; the future, or -1 - the error's number. `body`: of a posted one, to be written.
static int32_t begin(text place, int posted, made *body) {
    uint8_t result[40];
    size_t slash = 0;
    while (slash < place.size && place.data[slash] != '/') slash++;
    int32_t request = outgoing_new(fields_new());
    set_scheme(request, 1, 0, NULL, 0);
    if (set_authority(request, 1, place.data, slash)) __builtin_trap();
    set_target(request, 1, place.data + slash, place.size - slash);
    if (posted) {
        set_method(request, 2, NULL, 0);
        request_body(request, body);
    }
    fetch(request, 0, 0, result);
    return result[0] ? -1 - result[8] : *(int32_t *)(result + 8);
}

static int32_t ask(text place, int posted) {
    made body = {1, 0};
    int32_t future = begin(place, posted, &body);
    if (posted) {
        int32_t stream = open_body(must(body));
        for (size_t i = 0; i < sizeof room; i++) room[i] = (char)i;
        for (size_t sent = 0; sent < 300000; sent += 4096)
            blocking_write(stream, room, 300000 - sent < 4096 ? 300000 - sent : 4096, scratch);
        drop_output(stream);
        finish(body.handle, -1);
    }
    return future;
}

// Wait for the answer; -1 - the error's number for none.
static int32_t take_answer(int32_t future) {
    uint8_t result[64] __attribute__((aligned(8)));
    if (future < 0) return future;
    int32_t ready = answer_ready(future);
    block(ready);
    drop_pollable(ready);
    get_answer(future, result);
    drop_answer(future);
    if (!result[0] || result[8]) __builtin_trap();
    return result[16] ? -1 - result[24] : *(int32_t *)(result + 24);
}

// What came behind the body of an answer.
static void write_trailers(int32_t body, int32_t out, int was_read) {
    uint8_t result[56] __attribute__((aligned(8)));
    int32_t future = finish_incoming(body), ready = trailers_ready(future);
    block(ready);
    drop_pollable(ready);
    get_trailers(future, result);
    drop_future(future);
    if (!result[0]) __builtin_trap();
    written = 0;
    if (result[16] && !was_read) say(TEXT("\nno trailers ")), say_number(result[24]);
    else if (!result[16] && result[24]) say(TEXT("\ntrailers\n")), list_fields(*(int32_t *)(result + 28));
    write_all(out, (text){page, written});
}

static void get(text place, int posted, int reads) {
    int32_t response = take_answer(ask(place, posted));
    if (response < 0) {
        say(TEXT("error "));
        say_number(-1 - response);
        answer_page(200);
        return;
    }
    made body, input;
    int32_t out_body = answer(200), out = open_body(out_body);
    say_number(answer_status(response)), say(TEXT("\n"));
    list_fields(answer_headers(response));
    say(TEXT("\n"));
    write_all(out, (text){page, written});
    answer_body(response, &body);
    body_stream(must(body), &input);
    while (reads) {
        uint32_t chunk[3];
        used = 0;
        blocking_read(must(input), 64 * 1024, chunk);
        if (!(chunk[0] & 0xff)) {
            write_all(out, (text){(const char *)(uintptr_t)chunk[1], chunk[2]});
            continue;
        }
        if (!(chunk[1] & 0xff)) {
            uint8_t code[40] __attribute__((aligned(8)));
            error_code_of((int32_t)chunk[2], code);
            written = 0;
            say(TEXT("\nbroken ")), say_number(code[0] ? code[8] : -1);
            write_all(out, (text){page, written});
            drop_io_error((int32_t)chunk[2]);
        }
        break;
    }
    drop_input(input.handle);
    write_trailers(body.handle, out, reads);
    drop_response(response);
    drop_output(out);
    finish(out_body, -1);
}

static void both(text place) {
    int32_t futures[2] = {ask(place, 0), ask(place, 0)}, ready[2];
    text list;
    for (size_t i = 0; i < 2; i++) ready[i] = answer_ready(futures[i]);
    poll_list(ready, 2, &list);
    say_number((int32_t)list.size > 0);
    for (size_t i = 0; i < 2; i++) {
        drop_pollable(ready[i]);
        int32_t response = take_answer(futures[i]);
        say(TEXT(" ")), say_number(response < 0 ? -1 - response : answer_status(response));
        if (response >= 0) drop_response(response);
    }
    answer_page(200);
}

static void early(int32_t request, text place) {
    made body, incoming, input;
    int32_t future = begin(place, 1, &body), stream = open_body(must(body));
    write_all(stream, TEXT("first "));
    int32_t response = take_answer(future);
    if (response < 0) __builtin_trap();
    say_number(answer_status(response)), say(TEXT(" "));
    consume(request, &incoming);
    body_stream(must(incoming), &input);
    for (optional chunk; used = 0, blocking_read(must(input), 64 * 1024, &chunk), !chunk.tag;)
        write_all(stream, chunk.value);
    drop_input(input.handle);
    drop_future(finish_incoming(incoming.handle));
    drop_output(stream);
    int32_t trailers = fields_new();
    append(trailers, SPREAD("x-sum"), SPREAD("7"), (uint8_t *)scratch);
    finish(body.handle, trailers);
    answer_body(response, &incoming);
    body_stream(must(incoming), &input);
    for (;;) {
        uint32_t chunk[3];
        blocking_read(must(input), 8 * 1024, chunk);
        if (chunk[0] & 0xff) break;
        say((text){(const char *)(uintptr_t)chunk[1], chunk[2]});
    }
    drop_input(input.handle);
    drop_future(finish_incoming(incoming.handle));
    drop_response(response);
    answer_page(200);
}

static void crowd(text place) {
    int32_t futures[20];
    for (size_t i = 0; i < 20; i++) futures[i] = ask(place, 0);
    for (size_t i = 0; i < 20; i++) {
        int32_t response = take_answer(futures[i]);
        say(response < 0 ? TEXT("e") : TEXT(""));
        say_number(response < 0 ? -1 - response : answer_status(response));
        say(TEXT(" "));
        if (response >= 0) drop_response(response);
    }
    answer_page(200);
}

static void race(text place) {
    int32_t future = ask(place, 0), ready[2] = {answer_ready(future), after(200000000)};
    text list;
    poll_list(ready, 2, &list);
    say(*(const uint32_t *)list.data ? TEXT("timer") : TEXT("answer"));
    drop_pollable(ready[0]), drop_pollable(ready[1]);
    drop_answer(future);
    answer_page(200);
}

static void sleep(void) {
    int32_t ready = after(60000000000);
    block(ready);
    drop_pollable(ready);
    answer_page(200);
}

EXPORT("wasi:http/incoming-handler" V "#handle") void handle(int32_t request, int32_t param) {
    optional it;
    used = written = 0;
    outparam = param;
    seen++;
    request_target(request, &it);
    text target = it.value;
    if (is(target, TEXT("/trap"))) __builtin_trap();
    if (is(target, TEXT("/spin")))
        for (static volatile int spun;;) spun++;
    if (is(target, TEXT("/silent"))) {
        drop_outparam(param);
    } else if (is(target, TEXT("/error"))) {
        set_response(param, 1, 38, 0, 0, 0, 0, 0, 0);
    } else if (is(target, TEXT("/cut"))) {
        int32_t body = answer(200), stream = open_body(body);
        write_all(stream, TEXT("half of it"));
        drop_output(stream);
        drop_body(body);
    } else if (is(target, TEXT("/half"))) {
        int32_t stream = open_body(answer(200));
        check_write(stream, scratch);
        write_some(stream, SPREAD("half a line"), scratch);
        __builtin_trap();
    } else if (is(target, TEXT("/echo"))) {
        echo(request);
    } else if (starts(target, TEXT("/get?"))) {
        get((text){target.data + 5, target.size - 5}, 0, 1);
    } else if (starts(target, TEXT("/rest?"))) {
        get((text){target.data + 6, target.size - 6}, 0, 0);
    } else if (starts(target, TEXT("/post?"))) {
        get((text){target.data + 6, target.size - 6}, 1, 1);
    } else if (starts(target, TEXT("/both?"))) {
        both((text){target.data + 6, target.size - 6});
    } else if (starts(target, TEXT("/early?"))) {
        early(request, (text){target.data + 7, target.size - 7});
    } else if (starts(target, TEXT("/crowd?"))) {
        crowd((text){target.data + 7, target.size - 7});
    } else if (starts(target, TEXT("/race?"))) {
        race((text){target.data + 6, target.size - 6});
    } else if (is(target, TEXT("/sleep"))) {
        sleep();
    } else if (is(target, TEXT("/stdin"))) {
        read_stdin();
    } else if (starts(target, TEXT("/fields/"))) {
        many_fields((text){target.data + 8, target.size - 8});
    } else if (is(target, TEXT("/stream"))) {
        stream(request);
    } else if (is(target, TEXT("/late"))) {
        late();
    } else if (is(target, TEXT("/trailers"))) {
        int32_t body = answer(200), stream = open_body(body), trailers = fields_new();
        write_all(stream, TEXT("body\n"));
        drop_output(stream);
        append(trailers, SPREAD("x-sum"), SPREAD("7"), (uint8_t *)scratch);
        finish(body, trailers);
    } else if (is(target, TEXT("/events"))) {
        for (int32_t stream = open_body(answer(200));;) write_all(stream, TEXT("event\n"));
    } else if (starts(target, TEXT("/large/")) || starts(target, TEXT("/pages/"))) {
        int32_t body = answer(200), stream = open_body(body);
        uint32_t blocks = number_of((text){target.data + 7, target.size - 7});
        if (target.data[1] == 'l') blocks *= 256;
        for (uint32_t n = 0; n < blocks; n++) {
            for (size_t i = 0; i < 4096; i += 4) *(uint32_t *)(page + i) = n;
            write_all(stream, (text){page, 4096});
        }
        drop_output(stream);
        finish(body, -1);
    } else if (starts(target, TEXT("/status/")) && target.size == 11) {
        finish(answer((int32_t)number_of((text){target.data + 8, 3})), -1);
    } else {
        if (is(target, TEXT("/fields"))) try_fields(request);
        else if (is(target, TEXT("/twice"))) twice(request);
        else if (is(target, TEXT("/sum"))) trailers_of(request);
        else if (is(target, TEXT("/log"))) log_lines();
        else if (is(target, TEXT("/fetch"))) try_fetch();
        else if (is(target, TEXT("/count"))) say_number(seen), say(TEXT("\n"));
        else if (is(target, TEXT("/sick"))) sick = 1, say(TEXT("sick\n"));
        else if (is(target, TEXT("/poison"))) poisoned = 1, say(TEXT("poisoned\n"));
        else if (starts(target, TEXT("/describe"))) describe(request);
        else say(TEXT("hello over wasi:http\n"));
        answer_page(200);
    }
    drop_request(request);
}
