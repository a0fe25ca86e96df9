// Bytes as the characters of those numbers, and back: strings are all that crosses to the host.
#include "fields.h"

text latin1(const char *data, size_t size) {
    size_t room = size;
    for (size_t i = 0; i < size; i++) room += (uint8_t)data[i] > 127;
    char *to = take_room(room), *at = to;
    for (size_t i = 0; i < size; i++) {
        uint8_t c = (uint8_t)data[i];
        if (c > 127) *at++ = (char)(0xc0 | c >> 6);
        *at++ = (char)(c > 127 ? 0x80 | (c & 0x3f) : c);
    }
    return (text){to, room};
}

text latin1_back(text value) {
    char *to = (char *)value.data;
    for (size_t i = 0; i < value.size; i++) {
        uint8_t c = (uint8_t)value.data[i];
        if (c > 127 && i + 1 < value.size) c = (uint8_t)(c << 6 | ((uint8_t)value.data[++i] & 0x3f));
        *to++ = (char)c;
    }
    return (text){value.data, (size_t)(to - value.data)};
}
