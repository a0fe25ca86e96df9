//! The HTTP example in Rust, for the target wasm32-unknown-unknown: std without a system, so nothing is imported.

wit_bindgen::generate!({
    path: "../../wit",
    world: "wasmfleet:worlds/http",
});

use exports::wasmfleet::http::handler::{Guest as Handler, Request, Response};
use exports::wasmfleet::http::health::Guest as Health;

struct Hello;

impl Handler for Hello {
    fn handle(request: Request) -> Response {
        if request.target == "/echo" {
            return Response {
                status: 200,
                headers: "content-type: application/octet-stream\r\n".into(),
                body: request.body,
            };
        }
        Response {
            status: 200,
            headers: "content-type: text/plain\r\n".into(),
            body: b"hello from Rust\n".to_vec(),
        }
    }
}

impl Health for Hello {
    fn check() -> Result<(), String> {
        Ok(())
    }
}

export!(Hello);
