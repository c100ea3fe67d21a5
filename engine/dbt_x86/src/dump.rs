//! A block as guest code and host code, for a person.

use std::fmt::Write;

use iced_x86::{Decoder, DecoderOptions, Formatter, Instruction, IntelFormatter};

/// Disassembles `code` at `address`, one instruction a line.
fn lines(code: &[u8], address: u64, bitness: u32, into: &mut String) {
    let mut formatter = IntelFormatter::new();
    let mut text = String::new();
    let mut instruction = Instruction::default();
    let mut decoder = Decoder::with_ip(bitness, code, address, DecoderOptions::NONE);
    while decoder.can_decode() {
        decoder.decode_out(&mut instruction);
        text.clear();
        formatter.format(&instruction, &mut text);
        let _ = writeln!(into, "    {:x}  {text}", instruction.ip());
    }
}

/// The guest's code at `linear` and what was made of it.
pub fn block(guest: &[u8], linear: u64, bitness: u32, host: &[u8], base: u64) -> String {
    let mut text = String::from("  guest\n");
    lines(guest, linear, bitness, &mut text);
    text.push_str("  host\n");
    lines(host, base, 64, &mut text);
    text
}
