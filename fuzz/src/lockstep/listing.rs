//! What is shown of a guest: registers, and instructions as they are executed.

use std::fmt::Write;

use iced_x86::{Decoder, DecoderOptions, Formatter, IntelFormatter};
use lodger_guest_memory::GuestMemory;
use lodger_vcpu::{EngineError, Exit};
use lodger_x86::CpuState;
use lodger_x86::paging::{Access, Paging, PhysicalMemory, Privilege};

use super::pair::{Input, Pair, Step};

/// Lines of a trace, at most: its end is what matters.
const LINES: usize = 96;

/// The registers on a few lines.
pub fn registers(s: &CpuState) -> String {
    let mut text = String::new();
    const NAMES: [&str; 16] = [
        "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12",
        "r13", "r14", "r15",
    ];
    for (n, name) in NAMES.into_iter().enumerate() {
        let end = if n % 4 == 3 { '\n' } else { ' ' };
        let _ = write!(text, "  {name:>3} {:016x}{end}", s.gpr[n]);
    }
    let _ = writeln!(
        text,
        "  rip {:x} rflags {:x} cs {:x} cpl {} fs.base {:x} gs.base {:x} cr0 {:x} cr2 {:x} cr3 {:x} cr4 {:x} efer {:x}",
        s.rip,
        s.rflags,
        s.segments[1].selector,
        s.cpl(),
        s.segments[4].base,
        s.segments[5].base,
        s.cr0,
        s.cr2,
        s.cr3,
        s.cr4,
        s.efer
    );
    text
}

/// Steps the follower of a pair to `end` ticks, an instruction a line.
pub fn trace(pair: &mut Pair, step: &Step, end: u64) -> Result<String, EngineError> {
    let mut lines = Vec::new();
    for input in &step.inputs {
        lines.push(match input {
            Input::Dma(address, _) => format!("  a device wrote to the page at {address:#x}"),
            other => format!("  input {other:x?}"),
        });
    }
    pair.give_follower(&step.inputs);
    let mut entry = step.entry;
    while pair.follower.ticks() < end {
        if entry == lodger_vcpu::Entry::Resume {
            let state = pair.follower.vcpu.store()?;
            lines.push(instruction(&pair.follower.memory, &state));
        }
        let ticks = pair.follower.ticks();
        let exit = pair.follower.run(entry, ticks + 1)?;
        entry = lodger_vcpu::Entry::Resume;
        if exit != Exit::TickLimit {
            lines.push(format!("  {exit:x?}"));
            break;
        }
    }
    let skipped = lines.len().saturating_sub(LINES);
    Ok(lines.split_off(skipped).join("\n") + "\n")
}

/// The instruction at RIP: address, bytes, text, and some registers before.
fn instruction(memory: &GuestMemory, s: &CpuState) -> String {
    let linear = match s.segments[1].is_long() {
        true => s.rip,
        false => s.rip.wrapping_add(s.segments[1].base),
    };
    let bitness = match () {
        _ if s.segments[1].is_long() => 64,
        _ if s.segments[1].is_big() => 32,
        _ => 16,
    };
    let mut bytes = Vec::new();
    for at in linear..linear.saturating_add(15) {
        match byte(memory, s, at) {
            Some(byte) => bytes.push(byte),
            None => break,
        }
    }
    let mut decoder = Decoder::with_ip(bitness, &bytes, s.rip, DecoderOptions::NONE);
    if !decoder.can_decode() {
        return format!("  {:x}: not mapped", s.rip);
    }
    let instruction = decoder.decode();
    let mut line = String::new();
    IntelFormatter::new().format(&instruction, &mut line);
    let code: String = bytes[..instruction.len()]
        .iter()
        .map(|b| format!("{b:02x} "))
        .collect();
    format!(
        "  {:x}: {code:<34}{line:<44} flags {:x} rax {:x} rsp {:x}",
        s.rip, s.rflags, s.gpr[0], s.gpr[4]
    )
}

fn byte(memory: &GuestMemory, s: &CpuState, linear: u64) -> Option<u8> {
    let paging = Paging {
        cr0: s.cr0,
        cr3: s.cr3,
        cr4: s.cr4,
        efer: s.efer,
        pdptes: [0; 4],
        physical_bits: 52,
    };
    let privilege = Privilege {
        user: s.cpl() == 3,
        ac: true,
    };
    let walked = paging.walk(&Unchanged(memory), linear, Access::Read, privilege);
    let mut byte = [0];
    let address = walked.ok()?.page + linear % 4096;
    memory.read(address, &mut byte).ok()?;
    Some(byte[0])
}

/// Memory in which a walk leaves no marks.
struct Unchanged<'a>(&'a GuestMemory);

impl PhysicalMemory for Unchanged<'_> {
    fn read_u64(&self, address: u64) -> Option<u64> {
        self.0.read_u64(address).ok()
    }

    fn read_u32(&self, address: u64) -> Option<u32> {
        self.0.read_u32(address).ok()
    }

    fn exchange_u64(&self, _: u64, _: u64, _: u64) -> bool {
        true
    }

    fn exchange_u32(&self, _: u64, _: u32, _: u32) -> bool {
        true
    }
}
