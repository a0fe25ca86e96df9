"""Text that native guests written in tests have in common."""


def handler(code, room):
    """Export `handle` of the core instance `code` as the handler; `room` has its memory, `realloc` and `reset`."""
    return f"""
  (type $request (record
    (field "method" string) (field "target" string) (field "headers" string) (field "body" (list u8))))
  (type $response (record (field "status" u16) (field "headers" string) (field "body" (list u8))))
  (func $handle (param "request" $request) (result $response)
    (canon lift (core func ${code} "handle") (memory (core memory ${room} "memory"))
      (realloc (core func ${room} "realloc")) (post-return (core func ${room} "reset"))))
  (instance $handler (export "request" (type $request)) (export "response" (type $response))
    (export "handle" (func $handle)))
  (export "wasmfleet:http/handler@0.1.0" (instance $handler))"""
