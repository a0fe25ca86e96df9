// Exports, imports and text, as each of the C sources has them.
#pragma once
#include <stddef.h>
#include <stdint.h>

#define EXPORT(name) __attribute__((export_name(name)))
#define IMPORT(module, name) __attribute__((import_module(module), import_name(name)))

typedef struct {
    const char *data;
    size_t size;
} text;

#define TEXT(literal) ((text){literal, sizeof(literal) - 1})
