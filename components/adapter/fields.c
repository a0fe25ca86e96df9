#include "fields.h"

DESTRUCTOR(fields, "fields")

enum header_error { INVALID_SYNTAX, FORBIDDEN, IMMUTABLE, NONE };

// result<_, header-error>
typedef struct {
    uint8_t failed;
    uint8_t error;
} changed;

// result<own<fields>, header-error>
typedef struct {
    uint8_t failed;
    union {
        int32_t handle;
        uint8_t error;
    };
} made;

typedef struct {
    text *values;
    size_t count;
} texts;

// What belongs to the connection is the host's: the same names that wasmtime's own wasi:http forbids.
static int is_forbidden(text name) {
    static const text names[] = {
        TEXT("connection"),        TEXT("keep-alive"),       TEXT("proxy-authenticate"),
        TEXT("proxy-authorization"), TEXT("proxy-connection"), TEXT("transfer-encoding"),
        TEXT("upgrade"),           TEXT("host"),             TEXT("http2-settings"),
    };
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (same(name, names[i])) return 1;
    return 0;
}

static text lower(text name) {
    char *to = take_room(name.size);
    for (size_t i = 0; i < name.size; i++) {
        char c = name.data[i];
        to[i] = c >= 'A' && c <= 'Z' ? (char)(c | 0x20) : c;
    }
    return (text){to, name.size};
}

static int is_value(text value) {
    for (size_t i = 0; i < value.size; i++) {
        uint8_t c = (uint8_t)value.data[i];
        if ((c < ' ' && c != '\t') || c == 127) return 0;
    }
    return 1;
}

static void add(fields *it, text name, text value) {
    if (it->count == it->room) {
        it->room = it->room ? it->room * 2 : 8;
        field *more = take_room(it->room * sizeof *more);
        __builtin_memcpy(more, it->items, it->count * sizeof *more);
        it->items = more;
    }
    it->items[it->count++] = (field){name, value};
}

static enum header_error check_name(text *name) {
    if (!is_token(*name)) return INVALID_SYNTAX;
    *name = lower(*name);
    return is_forbidden(*name) ? FORBIDDEN : NONE;
}

static enum header_error append(fields *it, text name, text value) {
    enum header_error error = check_name(&name);
    if (error != NONE) return error;
    if (!is_value(value)) return INVALID_SYNTAX;
    if (it->immutable) return IMMUTABLE;
    add(it, name, value);
    return NONE;
}

static void discard(fields *it, text name) {
    size_t kept = 0;
    for (size_t i = 0; i < it->count; i++)
        if (!same(it->items[i].name, name)) it->items[kept++] = it->items[i];
    it->count = kept;
}

static changed *outcome(enum header_error error) {
    changed *it = take_room(sizeof *it);
    *it = (changed){error != NONE, error};
    return it;
}

int32_t give_view(const fields *it) {
    fields *view = take_room(sizeof *view);
    *view = *it;
    view->immutable = 1;
    return fields_give(view);
}

CONSTRUCTOR("fields") int32_t fields_constructor(void) {
    fields *it = take_room(sizeof *it);
    *it = (fields){0};
    return fields_give(it);
}

STATIC("fields.from-list") made *fields_from_list(const field *entries, size_t count) {
    fields *it = take_room(sizeof *it);
    made *answer = take_room(sizeof *answer);
    *it = (fields){0};
    for (size_t i = 0; i < count; i++) {
        enum header_error error = append(it, entries[i].name, entries[i].value);
        if (error != NONE) {
            *answer = (made){.failed = 1, .error = error};
            return answer;
        }
    }
    *answer = (made){.failed = 0, .handle = fields_give(it)};
    return answer;
}

METHOD("fields.get") texts *fields_get(const fields *it, const char *data, size_t size) {
    text name = lower((text){data, size});
    texts *found = take_room(sizeof *found);
    *found = (texts){take_room(it->count * sizeof(text)), 0};
    for (size_t i = 0; i < it->count; i++)
        if (same(it->items[i].name, name)) found->values[found->count++] = it->items[i].value;
    return found;
}

METHOD("fields.has") int fields_has(const fields *it, const char *data, size_t size) {
    text name = lower((text){data, size});
    for (size_t i = 0; i < it->count; i++)
        if (same(it->items[i].name, name)) return 1;
    return 0;
}

METHOD("fields.set") changed *fields_set(fields *it, const char *data, size_t size, const text *values, size_t count) {
    text name = {data, size};
    enum header_error error = check_name(&name);
    for (size_t i = 0; i < count && error == NONE; i++)
        if (!is_value(values[i])) error = INVALID_SYNTAX;
    if (error == NONE && it->immutable) error = IMMUTABLE;
    if (error != NONE) return outcome(error);
    discard(it, name);
    for (size_t i = 0; i < count; i++) add(it, name, values[i]);
    return outcome(NONE);
}

METHOD("fields.delete") changed *fields_delete(fields *it, const char *data, size_t size) {
    text name = {data, size};
    enum header_error error = check_name(&name);
    if (error == NONE && it->immutable) error = IMMUTABLE;
    if (error == NONE) discard(it, name);
    return outcome(error);
}

METHOD("fields.append")
changed *fields_append(fields *it, const char *name, size_t name_size, const char *value, size_t value_size) {
    return outcome(append(it, (text){name, name_size}, (text){value, value_size}));
}

// list<tuple<field-name, field-value>> lies in memory as `items` does.
METHOD("fields.entries") texts *fields_entries(const fields *it) {
    texts *all = take_room(sizeof *all);
    *all = (texts){(text *)it->items, it->count};
    return all;
}

METHOD("fields.clone") int32_t fields_clone(const fields *it) {
    fields *copy = take_room(sizeof *copy);
    *copy = (fields){take_room(it->count * sizeof(field)), it->count, it->count, 0};
    __builtin_memcpy(copy->items, it->items, it->count * sizeof(field));
    return fields_give(copy);
}

size_t lines_size(const fields *it) {
    size_t size = 0;
    for (size_t i = 0; i < it->count; i++) {
        text value = it->items[i].value;
        size += it->items[i].name.size + value.size + 4;
        for (size_t k = 0; k < value.size; k++) size += (uint8_t)value.data[k] > 127;
    }
    return size;
}

char *put_lines(char *at, const fields *it) {
    for (size_t i = 0; i < it->count; i++) {
        text value = it->items[i].value;
        at = put(put(at, it->items[i].name), TEXT(": "));
        for (size_t k = 0; k < value.size; k++) {
            uint8_t c = (uint8_t)value.data[k];
            if (c > 127) *at++ = (char)(0xc0 | c >> 6);
            *at++ = (char)(c > 127 ? 0x80 | (c & 0x3f) : c);
        }
        at = put(at, TEXT("\r\n"));
    }
    return at;
}

text read_lines(fields *it, text lines) {
    const char *end = lines.data + lines.size;
    for (const char *at = lines.data; at < end;) {
        if (*at == '\r') return (text){at + 2, (size_t)(end - at) - 2};
        const char *colon = at, *stop;
        while (colon < end && *colon != ':') colon++;
        for (stop = colon; stop < end && *stop != '\r'; stop++) {}
        if (stop == end) break;
        const char *value = colon + 1;
        while (value < stop && *value == ' ') value++;
        text name = lower((text){at, (size_t)(colon - at)});
        if (!is_forbidden(name)) add(it, name, latin1_back((text){value, (size_t)(stop - value)}));
        at = stop + 2;
    }
    return (text){0};
}
