//! The C API, re-exported so that one shared library carries every `wasmtime_*` symbol.
pub use wasmtime_c_api::*;
