// A command of WASI Preview 1 that does what its arguments say, one call each, and writes a line about each of them. The
// first word names the call, the last argument of a call may have spaces. A line is the call's error, and what it gave.
//
//   open FD LOOKUP OFLAGS FDFLAGS RIGHTS NAME     close FD                 renumber FROM TO
//   write FD TEXT      read FD BYTES              pwrite FD AT TEXT        pread FD BYTES AT
//   fill FD BYTES      seek FD BY WHENCE          tell FD                  size FD BYTES
//   stat FD            look FD LOOKUP NAME        times FD AT MT FLAGS     touch FD LOOKUP AT MT FLAGS NAME
//   mkdir FD NAME      rmdir FD NAME              unlink FD NAME           list FD
//   rename FD FD OLD|NEW   link FD LOOKUP FD OLD|NEW   symlink FD TO|NAME   readlink FD BYTES NAME
//   sync FD            datasync FD                advise FD AT BYTES HOW   allocate FD AT BYTES
//   fdstat FD          setflags FD FLAGS          prestat FD
//   clock ID           resolution ID              sleep ID MS              until ID MS   wait FD WRITES
//   args               environ                    random BYTES             yield
//   recv FD            send FD                    shutdown FD HOW
//   say TEXT           warn TEXT                  exit CODE                trap          return
#include "../adapter/wasm.h"

#define CALL(name, ...)                                                                                                \
    __attribute__((import_module("wasi_snapshot_preview1"), import_name(#name))) int32_t p1_##name(__VA_ARGS__);
#define HERE __attribute__((aligned(8)))
typedef int32_t n;
typedef int64_t l;

CALL(args_get, const char **, char *)
CALL(args_sizes_get, uint32_t *, uint32_t *)
CALL(clock_res_get, n, uint64_t *)
CALL(clock_time_get, n, l, uint64_t *)
CALL(environ_get, const char **, char *)
CALL(environ_sizes_get, uint32_t *, uint32_t *)
CALL(fd_advise, n, l, l, n)
CALL(fd_allocate, n, l, l)
CALL(fd_close, n)
CALL(fd_datasync, n)
CALL(fd_fdstat_get, n, uint8_t *)
CALL(fd_fdstat_set_flags, n, n)
CALL(fd_filestat_get, n, uint8_t *)
CALL(fd_filestat_set_size, n, l)
CALL(fd_filestat_set_times, n, l, l, n)
CALL(fd_pread, n, const text *, n, l, uint32_t *)
CALL(fd_prestat_get, n, uint32_t *)
CALL(fd_prestat_dir_name, n, char *, n)
CALL(fd_pwrite, n, const text *, n, l, uint32_t *)
CALL(fd_read, n, const text *, n, uint32_t *)
CALL(fd_readdir, n, uint8_t *, n, l, uint32_t *)
CALL(fd_renumber, n, n)
CALL(fd_seek, n, l, n, uint64_t *)
CALL(fd_sync, n)
CALL(fd_tell, n, uint64_t *)
CALL(fd_write, n, const text *, n, uint32_t *)
CALL(path_create_directory, n, const char *, n)
CALL(path_filestat_get, n, n, const char *, n, uint8_t *)
CALL(path_filestat_set_times, n, n, const char *, n, l, l, n)
CALL(path_link, n, n, const char *, n, n, const char *, n)
CALL(path_open, n, n, const char *, n, n, l, l, n, uint32_t *)
CALL(path_readlink, n, const char *, n, char *, n, uint32_t *)
CALL(path_remove_directory, n, const char *, n)
CALL(path_rename, n, const char *, n, n, const char *, n)
CALL(path_symlink, const char *, n, n, const char *, n)
CALL(path_unlink_file, n, const char *, n)
CALL(poll_oneoff, const uint8_t *, uint8_t *, n, uint32_t *)
CALL(random_get, uint8_t *, n)
CALL(sched_yield, void)
CALL(sock_recv, n, const text *, n, n, uint32_t *, uint32_t *)
CALL(sock_send, n, const text *, n, n, uint32_t *)
CALL(sock_shutdown, n, n)
__attribute__((import_module("wasi_snapshot_preview1"), import_name("proc_exit"))) void p1_proc_exit(n);

static char page[64 * 1024], buffer[64 * 1024] HERE, words[64 * 1024];
static const char *list[1024];
static size_t written;

static size_t length(const char *of) {
    size_t size = 0;
    while (of[size]) size++;
    return size;
}

static void flush(void) {
    for (size_t at = 0; at < written;) {
        text rest = {page + at, written - at};
        uint32_t done = 0;
        if (p1_fd_write(1, &rest, 1, &done) || !done) break;
        at += done;
    }
    written = 0;
}

static void say(text t) {
    if (t.size > sizeof page - written) __builtin_trap();
    __builtin_memcpy(page + written, t.data, t.size);
    written += t.size;
}

static void number(uint64_t value) {
    char digits[21], *at = digits + sizeof digits;
    do *--at = (char)('0' + value % 10);
    while (value /= 10);
    *--at = ' ';
    say((text){at, (size_t)(digits + sizeof digits - at)});
}

static void failed(n code) {
    if (code) say(TEXT("error")), number((uint64_t)code);
    else say(TEXT("ok"));
}

// What is read, with every byte that is no plain letter as a dot.
static void shown(const char *data, size_t size) {
    say(TEXT(" "));
    for (size_t i = 0; i < size && i < 200; i++) say((text){data[i] > 31 && data[i] < 127 ? data + i : ".", 1});
}

static const char *rest;

static text word(void) {
    const char *from = rest;
    while (*rest && *rest != ' ') rest++;
    text found = {from, (size_t)(rest - from)};
    if (*rest) rest++;
    return found;
}

static l next(void) {
    text t = word();
    int less = t.size && *t.data == '-';
    l value = 0;
    for (size_t i = (size_t)less; i < t.size; i++) value = value * 10 + (t.data[i] - '0');
    return less ? -value : value;
}

static int is(text a, const char *b) {
    size_t i = 0;
    while (i < a.size && a.data[i] == b[i]) i++;
    return i == a.size && !b[i];
}

// The rest up to a bar, and what is behind it.
static text before_bar(void) {
    const char *from = rest;
    while (*rest && *rest != '|') rest++;
    text found = {from, (size_t)(rest - from)};
    if (*rest) rest++;
    return found;
}

static void say_stat(n code, const uint8_t *it) {
    failed(code);
    if (code) return;
    say(TEXT(" type")), number(it[16]);
    if (it[16] != 3) say(TEXT(" links")), number(*(const uint64_t *)(const void *)(it + 24));
    if (it[16] == 4) say(TEXT(" bytes")), number(*(const uint64_t *)(const void *)(it + 32));
}

// Names in order, for the order of a directory is chance; with their types.
static void list_names(n fd) {
    uint64_t cookie = 0;
    size_t count = 0, kept = 0;
    uint32_t used;
    do {
        n code = p1_fd_readdir(fd, (uint8_t *)buffer, 4096, (l)cookie, &used);
        if (code) {
            failed(code);
            return;
        }
        for (size_t at = 0; at + 24 <= used;) {
            uint32_t size = *(uint32_t *)(void *)(buffer + at + 16);
            if (at + 24 + size > used) break;
            cookie = *(uint64_t *)(void *)(buffer + at);
            words[kept] = (char)('0' + buffer[at + 20]);
            __builtin_memcpy(words + kept + 1, buffer + at + 24, size);
            words[kept + 1 + size] = 0;
            size_t place = count++;
            for (; place; place--) {
                const char *a = list[place - 1] + 1, *b = words + kept + 1;
                while (*a && *a == *b) a++, b++;
                if (*a <= *b) break;
                list[place] = list[place - 1];
            }
            list[place] = words + kept;
            kept += size + 2;
            at += 24 + size;
        }
    } while (used == 4096);
    failed(0);
    for (size_t i = 0; i < count; i++) say(TEXT(" ")), say((text){list[i], length(list[i])});
}

static void strings(n code, uint32_t count) {
    failed(code);
    for (uint32_t i = 0; !code && i < count; i++) say(TEXT(" [")), say((text){list[i], length(list[i])}), say(TEXT("]"));
}

static void poll_one(uint8_t kind, n id, uint64_t timeout, uint16_t flags) {
    uint8_t HERE ask[48] = {0}, HERE event[32] = {0};
    uint64_t before = 0, after = 0;
    uint32_t count = 0;
    *(uint64_t *)(void *)ask = 77;
    ask[8] = kind;
    *(uint32_t *)(void *)(ask + 16) = (uint32_t)id;
    *(uint64_t *)(void *)(ask + 24) = timeout;
    *(uint16_t *)(void *)(ask + 40) = flags;
    p1_clock_time_get(1, 0, &before);
    n code = p1_poll_oneoff(ask, event, 1, &count);
    p1_clock_time_get(1, 0, &after);
    failed(code);
    if (code) return;
    number(count), number(*(uint64_t *)(void *)event), number(*(uint16_t *)(void *)(event + 8)), number(event[10]);
    if (!kind && !flags) say(after - before >= timeout ? TEXT(" waited") : TEXT(" early"));
}

static int act(const char *step) {
    rest = step;
    text what = word();
    uint8_t HERE stat[64] = {0};
    uint64_t value = 0;
    uint32_t count = 0, size = 0;
#define IS(name) (is(what, name))
    if (IS("open")) {
        n fd = (n)next(), lookup = (n)next(), oflags = (n)next(), fdflags = (n)next();
        l rights = next();
        n code = p1_path_open(fd, lookup, rest, (n)length(rest), oflags, rights, rights, fdflags, &count);
        failed(code);
        if (!code) number(count);
    } else if (IS("close")) failed(p1_fd_close((n)next()));
    else if (IS("renumber")) {
        n from = (n)next();
        failed(p1_fd_renumber(from, (n)next()));
    } else if (IS("write") || IS("pwrite")) {
        n fd = (n)next();
        l at = IS("pwrite") ? next() : 0;
        text it = {rest, length(rest)};
        n code = IS("pwrite") ? p1_fd_pwrite(fd, &it, 1, at, &count) : p1_fd_write(fd, &it, 1, &count);
        failed(code);
        if (!code) number(count);
    } else if (IS("fill")) {
        n fd = (n)next(), code = 0;
        uint64_t left = (uint64_t)next();
        for (; left && !code; left -= count) {
            text it = {buffer, left < sizeof buffer ? left : sizeof buffer};
            code = p1_fd_write(fd, &it, 1, &count);
            if (!code) value += count;
        }
        failed(code), number(value);
    } else if (IS("read") || IS("pread")) {
        n fd = (n)next();
        text it = {buffer, (size_t)next()};
        n code = IS("pread") ? p1_fd_pread(fd, &it, 1, next(), &count) : p1_fd_read(fd, &it, 1, &count);
        failed(code);
        if (!code) number(count), shown(buffer, count);
    } else if (IS("seek")) {
        n fd = (n)next();
        l by = next();
        n code = p1_fd_seek(fd, by, (n)next(), &value);
        failed(code);
        if (!code) number(value);
    } else if (IS("tell")) {
        n code = p1_fd_tell((n)next(), &value);
        failed(code);
        if (!code) number(value);
    } else if (IS("size")) {
        n fd = (n)next();
        failed(p1_fd_filestat_set_size(fd, next()));
    } else if (IS("stat")) {
        n code = p1_fd_filestat_get((n)next(), stat);
        say_stat(code, stat);
    } else if (IS("look")) {
        n fd = (n)next(), lookup = (n)next();
        n code = p1_path_filestat_get(fd, lookup, rest, (n)length(rest), stat);
        say_stat(code, stat);
    } else if (IS("times")) {
        n fd = (n)next();
        l at = next(), mt = next();
        n code = p1_fd_filestat_set_times(fd, at, mt, (n)next());
        failed(code);
        if (!code && !p1_fd_filestat_get(fd, stat)) number(*(uint64_t *)(void *)(stat + 40)), number(*(uint64_t *)(void *)(stat + 48));
    } else if (IS("touch")) {
        n fd = (n)next(), lookup = (n)next();
        l at = next(), mt = next();
        n flags = (n)next(), code = p1_path_filestat_set_times(fd, lookup, rest, (n)length(rest), at, mt, flags);
        failed(code);
        if (!code && !p1_path_filestat_get(fd, lookup, rest, (n)length(rest), stat)) number(*(uint64_t *)(void *)(stat + 48));
    } else if (IS("mkdir") || IS("rmdir") || IS("unlink")) {
        n fd = (n)next(), bytes = (n)length(rest);
        failed(IS("mkdir")   ? p1_path_create_directory(fd, rest, bytes)
               : IS("rmdir") ? p1_path_remove_directory(fd, rest, bytes)
                             : p1_path_unlink_file(fd, rest, bytes));
    } else if (IS("list")) list_names((n)next());
    else if (IS("rename")) {
        n from = (n)next(), to = (n)next();
        text old = before_bar();
        failed(p1_path_rename(from, old.data, (n)old.size, to, rest, (n)length(rest)));
    } else if (IS("link")) {
        n from = (n)next(), lookup = (n)next(), to = (n)next();
        text old = before_bar();
        failed(p1_path_link(from, lookup, old.data, (n)old.size, to, rest, (n)length(rest)));
    } else if (IS("symlink")) {
        n fd = (n)next();
        text to = before_bar();
        failed(p1_path_symlink(to.data, (n)to.size, fd, rest, (n)length(rest)));
    } else if (IS("readlink")) {
        n fd = (n)next(), bytes = (n)next();
        n code = p1_path_readlink(fd, rest, (n)length(rest), buffer, bytes, &count);
        failed(code);
        if (!code) number(count), shown(buffer, count);
    } else if (IS("sync")) failed(p1_fd_sync((n)next()));
    else if (IS("datasync")) failed(p1_fd_datasync((n)next()));
    else if (IS("advise")) {
        n fd = (n)next();
        l at = next(), bytes = next();
        failed(p1_fd_advise(fd, at, bytes, (n)next()));
    } else if (IS("allocate")) {
        n fd = (n)next();
        l at = next();
        failed(p1_fd_allocate(fd, at, next()));
    } else if (IS("fdstat")) {
        n code = p1_fd_fdstat_get((n)next(), stat);
        failed(code);
        if (!code) number(stat[0]), number(*(uint16_t *)(void *)(stat + 2));
    } else if (IS("setflags")) {
        n fd = (n)next();
        failed(p1_fd_fdstat_set_flags(fd, (n)next()));
    } else if (IS("prestat")) {
        n fd = (n)next(), code = p1_fd_prestat_get(fd, (uint32_t *)(void *)stat);
        size = *(uint32_t *)(void *)(stat + 4);
        if (!code) code = p1_fd_prestat_dir_name(fd, buffer, (n)size);
        failed(code);
        if (!code) shown(buffer, size);
    } else if (IS("clock") || IS("resolution")) {
        n id = (n)next(), code = IS("clock") ? p1_clock_time_get(id, 0, &value) : p1_clock_res_get(id, &value);
        failed(code);
        if (!code && IS("clock") && !id) say(value > 1700000000000000000 ? TEXT(" of this time") : TEXT(" long past"));
        else if (!code) say(value ? TEXT(" some") : TEXT(" none"));
    } else if (IS("sleep") || IS("until")) {
        n id = (n)next();
        poll_one(0, id, (uint64_t)next() * 1000000, IS("until"));
    } else if (IS("wait")) {
        n fd = (n)next();
        poll_one(next() ? 2 : 1, fd, 0, 0);
    } else if (IS("args")) {
        n code = p1_args_sizes_get(&count, &size);
        strings(code ? code : p1_args_get(list, words), count);
    } else if (IS("environ")) {
        n code = p1_environ_sizes_get(&count, &size);
        strings(code ? code : p1_environ_get(list, words), count);
    } else if (IS("random")) {
        n bytes = (n)next(), code = p1_random_get((uint8_t *)buffer, bytes);
        for (n i = 0; i < bytes; i++) count |= (uint8_t)buffer[i];
        failed(code), say(count ? TEXT(" some") : TEXT(" none"));
    } else if (IS("yield")) failed(p1_sched_yield());
    else if (IS("recv")) {
        text it = {buffer, 16};
        failed(p1_sock_recv((n)next(), &it, 1, 0, &count, &size));
    } else if (IS("send")) {
        text it = {"x", 1};
        failed(p1_sock_send((n)next(), &it, 1, 0, &count));
    } else if (IS("shutdown")) {
        n fd = (n)next();
        failed(p1_sock_shutdown(fd, (n)next()));
    } else if (IS("say")) say((text){rest, length(rest)});
    else if (IS("warn")) {
        text it = {rest, length(rest)};
        failed(p1_fd_write(2, &it, 1, &count));
    } else if (IS("exit")) {
        flush();
        p1_proc_exit((n)next());
    } else if (IS("return")) return 0;
    else {
        flush();
        __builtin_trap();
    }
    say(TEXT("\n"));
    return 1;
}

static const char *steps[256];
static char given[64 * 1024];

EXPORT("_start") void start(void) {
    uint32_t count, size;
    if (p1_args_sizes_get(&count, &size) || count > 256 || size > sizeof given || p1_args_get(steps, given))
        __builtin_trap();
    for (uint32_t i = 1; i < count && act(steps[i]); i++) flush();
    flush();
}
