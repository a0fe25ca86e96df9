//! The HTTP example in Zig: the canonical ABI by hand, as components/demo does in C.

const Text = extern struct {
    data: [*]const u8,
    size: usize,

    fn of(bytes: []const u8) Text {
        return .{ .data = bytes.ptr, .size = bytes.len };
    }
};

const Response = extern struct { status: u16, headers: Text, body: Text };
const Outcome = extern struct { failed: bool, err: Text };

// What the host places arguments in; it lives as long as one call.
var arena: [2 << 20]u8 align(8) = undefined;
var used: usize = 0;

export fn cabi_realloc(old: ?[*]u8, old_size: usize, alignment: usize, size: usize) [*]u8 {
    const start = (used + alignment - 1) & ~(alignment - 1);
    if (old != null or old_size != 0 or size > arena.len - start) @trap();
    used = start + size;
    return arena[start..].ptr;
}

var answer: Response = undefined;

fn handle(method: Text, target: Text, headers: Text, body: Text) callconv(.c) *Response {
    _ = method;
    _ = headers;
    const echo = "/echo";
    const is_echo = target.size == echo.len and for (echo, 0..) |byte, at| {
        if (target.data[at] != byte) break false;
    } else true;
    answer = if (is_echo)
        .{ .status = 200, .headers = .of("content-type: application/octet-stream\r\n"), .body = body }
    else
        .{ .status = 200, .headers = .of("content-type: text/plain\r\n"), .body = .of("hello from Zig\n") };
    return &answer;
}

fn handle_flat(
    method: [*]const u8,
    method_size: usize,
    target: [*]const u8,
    target_size: usize,
    headers: [*]const u8,
    headers_size: usize,
    body: [*]const u8,
    body_size: usize,
) callconv(.c) *Response {
    return handle(
        .{ .data = method, .size = method_size },
        .{ .data = target, .size = target_size },
        .{ .data = headers, .size = headers_size },
        .{ .data = body, .size = body_size },
    );
}

fn done(read: *Response) callconv(.c) void {
    _ = read;
    used = 0;
}

var well: Outcome = .{ .failed = false, .err = .of("") };

fn check() callconv(.c) *Outcome {
    return &well;
}

comptime {
    @export(&handle_flat, .{ .name = "wasmfleet:http/handler@0.1.0#handle" });
    @export(&done, .{ .name = "cabi_post_wasmfleet:http/handler@0.1.0#handle" });
    @export(&check, .{ .name = "wasmfleet:http/health@0.1.0#check" });
}
