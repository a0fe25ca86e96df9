// As main.c.
use std::io::{BufRead, BufReader, Seek, Write};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    for each in &arguments {
        println!("argument {each}");
    }
    println!("unit {}", std::env::var("unit").unwrap_or("none".into()));
    match std::fs::OpenOptions::new().create(true).append(true).read(true).open("/data/kept") {
        Ok(mut file) => {
            writeln!(file, "line").unwrap();
            file.rewind().unwrap();
            println!("lines {}", BufReader::new(file).lines().count());
        }
        Err(_) => println!("no file"),
    }
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    println!("time {}", if now.as_secs() > 1700000000 { "now" } else { "past" });
    eprintln!("a warning");
    if arguments.last().is_some_and(|last| last == "fail") {
        std::process::exit(3);
    }
}
