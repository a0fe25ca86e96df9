use std::{thread, time::Duration};

fn main() {
    println!("hello from {{name}}");
    loop {
        thread::sleep(Duration::from_secs(60));
    }
}
