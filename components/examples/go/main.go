// The HTTP example in Go: the canonical ABI by hand, so that nothing but the standard toolchain is needed.
package main

import "unsafe"

// Where the host places arguments. A call into Go's allocator is not possible there: the arena is fixed.
var (
	arena [2 << 20]byte
	used  uintptr
)

//go:wasmexport cabi_realloc
func realloc(old unsafe.Pointer, oldSize, align, size uint32) unsafe.Pointer {
	start := (used + uintptr(align) - 1) &^ (uintptr(align) - 1)
	if old != nil || oldSize != 0 || start+uintptr(size) > uintptr(len(arena)) {
		panic("the arguments do not fit in the arena")
	}
	used = start + uintptr(size)
	return unsafe.Pointer(&arena[start])
}

// The canonical layout of `response`. Pointers are numbers there; the variables that they name are globals.
type response struct {
	status  uint16
	headers uint32
	size    uint32
	body    uint32
	length  uint32
}

var (
	answer     response
	plain      = []byte("content-type: text/plain\r\n")
	binary     = []byte("content-type: application/octet-stream\r\n")
	greeting   = []byte("hello from Go\n")
	wellResult [12]byte
)

func at(bytes []byte) (uint32, uint32) {
	return uint32(uintptr(unsafe.Pointer(unsafe.SliceData(bytes)))), uint32(len(bytes))
}

//go:wasmexport wasmfleet:http/handler@0.1.0#handle
func handle(method unsafe.Pointer, methodSize uint32, target unsafe.Pointer, targetSize uint32,
	headers unsafe.Pointer, headersSize uint32, body unsafe.Pointer, bodySize uint32) unsafe.Pointer {
	answer.status = 200
	if unsafe.String((*byte)(target), targetSize) == "/echo" {
		answer.headers, answer.size = at(binary)
		answer.body, answer.length = uint32(uintptr(body)), bodySize
	} else {
		answer.headers, answer.size = at(plain)
		answer.body, answer.length = at(greeting)
	}
	return unsafe.Pointer(&answer)
}

//go:wasmexport cabi_post_wasmfleet:http/handler@0.1.0#handle
func done(read unsafe.Pointer) {
	used = 0
}

//go:wasmexport wasmfleet:http/health@0.1.0#check
func check() unsafe.Pointer {
	return unsafe.Pointer(&wellResult)
}

func main() {}
