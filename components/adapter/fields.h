// The resource `fields`: header and trailer fields.
#pragma once
#include "abi.h"

// A field as `entries` gives it out, names in lower case.
typedef struct {
    text name;
    text value;
} field;

typedef struct {
    field *items;
    size_t count;
    size_t room;
    uint8_t immutable;
} fields;

RESOURCE(fields, "fields")

// A handle for an immutable view.
int32_t give_view(const fields *it);
// Field lines, each with CR LF, as `bridge.handle` describes them: their size, and their text at `at`.
size_t lines_size(const fields *it);
char *put_lines(char *at, const fields *it);
// Bytes as the characters of those numbers, and back (in place: the host's string is ours).
text latin1(const char *data, size_t size);
text latin1_back(text value);
// Read field lines up to an empty one; names that wasi:http forbids are left out. What follows the empty line.
text read_lines(fields *it, text lines);
