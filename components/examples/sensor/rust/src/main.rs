//! Reads a register of a meter by Modbus TCP, counts the readings, and sends them to the operator. One run, one reading.

use std::error::Error;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use wasi::config::store as config;
use wasi::keyvalue::{atomics, store};
use wasi::messaging::producer;
use wasi::messaging::types::{Client, Message};

wit_bindgen::generate!({
    path: ["../../../wit/deps/keyvalue", "../../../wit/deps/messaging", "../../../adapter/config.wit", "../wit/uses.wit"],
    world: "wasmfleet:sensor/uses",
    generate_all,
});

const REGISTER: u16 = 100; // temperature in tenths of a degree

fn main() -> Result<(), Box<dyn Error>> {
    let meter = config::get("meter")?.ok_or("no meter is configured")?;
    let topic = config::get("topic")?.ok_or("no topic is configured")?;
    let tenths = read_register(&meter, REGISTER)?;

    let bucket = store::open("default")?;
    let readings = atomics::increment(&bucket, "readings", 1)?;

    let celsius = f64::from(tenths) / 10.0;
    let reading = format!("{{\"celsius\": {celsius:.1}, \"readings\": {readings}}}");
    let message = Message::new(reading.as_bytes());
    message.set_content_type("application/json");
    producer::send(&Client::connect("")?, &topic, message)?;
    println!("sent {reading}");
    Ok(())
}

/// Read one holding register of unit 1.
fn read_register(meter: &str, register: u16) -> Result<u16, Box<dyn Error>> {
    let mut connection = TcpStream::connect(meter)?;
    connection.set_read_timeout(Some(Duration::from_secs(5)))?;
    let [high, low] = register.to_be_bytes();
    // transaction 1, protocol 0, 6 bytes: unit 1, function 3, the register, one of them
    connection.write_all(&[0, 1, 0, 0, 0, 6, 1, 3, high, low, 0, 1])?;
    let mut answer = [0; 9];
    connection.read_exact(&mut answer)?;
    if answer[7] != 3 {
        return Err(format!("the meter refuses register {register}: error {}", answer[8]).into());
    }
    let mut value = [0; 2];
    connection.read_exact(&mut value)?;
    Ok(u16::from_be_bytes(value))
}
