//! The data lines, on the interpreter, and those that a user program can run also on the host processor.

use crate::host::Host;
use crate::lines::{self, Case, Machines};

const FILES: [(&str, &str); 8] = [
    ("devices", include_str!("cases/devices.txt")),
    ("integer", include_str!("cases/integer.txt")),
    ("stack", include_str!("cases/stack.txt")),
    ("string", include_str!("cases/string.txt")),
    ("flow", include_str!("cases/flow.txt")),
    ("segments", include_str!("cases/segments.txt")),
    ("paging", include_str!("cases/paging.txt")),
    ("system", include_str!("cases/system.txt")),
];

fn all(mut check: impl FnMut(&Case) -> Vec<String>) {
    let mut failures = 0;
    for (file, text) in FILES {
        for case in lines::parse(text) {
            let found = check(&case);
            if !found.is_empty() {
                failures += 1;
                println!("{file}: {}\n  {}", case.text, found.join("\n  "));
            }
        }
    }
    assert_eq!(failures, 0, "lines that do not hold");
}

#[test]
fn lines_on_the_interpreter() {
    let mut machines = Machines::new(crate::engine());
    all(|case| case.run(&mut machines));
}

#[test]
fn lines_on_the_host() {
    let mut machines = Machines::new(crate::engine());
    let mut host = Host::new();
    all(|case| match case.runs_on_host() {
        true => case.run_on_host(&mut machines, &mut host),
        false => Vec::new(),
    });
}
