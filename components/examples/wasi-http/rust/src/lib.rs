//! Greets, and gives back what is posted to /echo.

use wasip2::exports::http::incoming_handler::Guest;
use wasip2::http::types::{Fields, IncomingRequest, OutgoingBody, OutgoingResponse, ResponseOutparam};
use wasip2::io::streams::OutputStream;

struct Hello;

wasip2::http::proxy::export!(Hello);

impl Guest for Hello {
    fn handle(request: IncomingRequest, out: ResponseOutparam) {
        match request.path_with_query().as_deref() {
            Some("/") => answer(out, 200, |stream| write(stream, b"hello from Rust\n")),
            Some("/echo") => answer(out, 200, |stream| echo(&request, stream)),
            _ => answer(out, 404, |stream| write(stream, b"nothing here\n")),
        }
    }
}

fn answer(out: ResponseOutparam, status: u16, body_into: impl FnOnce(&OutputStream)) {
    let fields = Fields::new();
    fields.append("content-type", b"text/plain").expect("a field of ours");
    let response = OutgoingResponse::new(fields);
    response.set_status_code(status).expect("a status of ours");
    let body = response.body().expect("asked for once");
    ResponseOutparam::set(out, Ok(response));
    let stream = body.write().expect("asked for once");
    body_into(&stream);
    drop(stream);
    OutgoingBody::finish(body, None).expect("no length was promised");
}

fn write(stream: &OutputStream, bytes: &[u8]) {
    for chunk in bytes.chunks(4096) {
        stream.blocking_write_and_flush(chunk).expect("the client is there");
    }
}

fn echo(request: &IncomingRequest, to: &OutputStream) {
    let body = request.consume().expect("asked for once");
    let from = body.stream().expect("asked for once");
    // It ends with an error: the stream is closed, and that was the body.
    while let Ok(chunk) = from.blocking_read(64 * 1024) {
        write(to, &chunk);
    }
}
