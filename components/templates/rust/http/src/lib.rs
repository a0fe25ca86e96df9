use wasip2::exports::http::incoming_handler::Guest;
use wasip2::http::types::{Fields, IncomingRequest, OutgoingBody, OutgoingResponse, ResponseOutparam};

struct Component;

wasip2::http::proxy::export!(Component);

impl Guest for Component {
    fn handle(request: IncomingRequest, out: ResponseOutparam) {
        match request.path_with_query().as_deref() {
            Some("/") => answer(out, 200, b"hello from {{name}}\n"),
            _ => answer(out, 404, b"nothing here\n"),
        }
    }
}

fn answer(out: ResponseOutparam, status: u16, text: &[u8]) {
    let fields = Fields::new();
    fields.append("content-type", b"text/plain").expect("a valid field");
    let response = OutgoingResponse::new(fields);
    response.set_status_code(status).expect("a valid status");
    let body = response.body().expect("asked for once");
    ResponseOutparam::set(out, Ok(response));
    let stream = body.write().expect("asked for once");
    stream.blocking_write_and_flush(text).expect("the client is there");
    drop(stream);
    OutgoingBody::finish(body, None).expect("no length was promised");
}
