//! What is told about a crash, for a person to read.

use std::fmt::{Display, Formatter, Result};

use lodger_vcpu::Exit;
use lodger_x86::{CpuState, DescriptorTable, Segment};

/// A triple fault.
#[derive(Debug, Clone)]
pub struct CrashReport {
    /// What was booted.
    pub kernel: String,
    /// The vCPU that crashed.
    pub crashed: u32,
    /// All vCPUs, by index.
    pub vcpus: Vec<CrashedVcpu>,
}

/// A vCPU of a VM that crashed.
#[derive(Debug, Clone)]
pub struct CrashedVcpu {
    /// Its index.
    pub index: u32,
    /// Instructions that it executed, if the engine counts them.
    pub ticks: u64,
    /// Its state.
    pub state: CpuState,
    /// The last instructions, oldest first: linear address and text.
    pub instructions: Vec<(u64, String)>,
    /// The last exits, oldest first.
    pub exits: Vec<Exit>,
}

impl Display for CrashReport {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        writeln!(
            f,
            "The guest crashed: triple fault of vCPU {}.",
            self.crashed
        )?;
        writeln!(f, "kernel: {}", self.kernel)?;
        for vcpu in &self.vcpus {
            match vcpu.index == self.crashed {
                true => write!(f, "{vcpu}")?,
                false => {
                    let CpuState { rip, activity, .. } = vcpu.state;
                    writeln!(f, "\nvCPU {}: {activity:?}, rip {rip:016x}", vcpu.index)?;
                }
            }
        }
        Ok(())
    }
}

impl Display for CrashedVcpu {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        write!(f, "\nvCPU {}", self.index)?;
        match self.ticks {
            0 => writeln!(f)?,
            n => writeln!(f, " after {n} instructions")?,
        }
        registers(f, &self.state)?;
        if !self.instructions.is_empty() {
            writeln!(f, "\nlast instructions, the newest at the end:")?;
        }
        for (address, text) in &self.instructions {
            writeln!(f, "  {address:016x}  {text}")?;
        }
        if !self.exits.is_empty() {
            writeln!(f, "\nlast exits, the newest at the end:")?;
        }
        let mut exits = self.exits.iter().peekable();
        while let Some(exit) = exits.next() {
            let mut times = 1;
            while exits.next_if_eq(&exit).is_some() {
                times += 1;
            }
            write!(f, "  ")?;
            write_exit(f, exit)?;
            match times {
                1 => writeln!(f)?,
                n => writeln!(f, "  ({n} times)")?,
            }
        }
        Ok(())
    }
}

fn registers(f: &mut Formatter<'_>, s: &CpuState) -> Result {
    const GENERAL: [&str; 16] = [
        "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8 ", "r9 ", "r10", "r11", "r12",
        "r13", "r14", "r15",
    ];
    const SEGMENTS: [&str; 6] = ["es", "cs", "ss", "ds", "fs", "gs"];
    // The order in which people look for them.
    const ORDER: [usize; 16] = [0, 3, 1, 2, 6, 7, 5, 4, 8, 9, 10, 11, 12, 13, 14, 15];
    writeln!(f, "  rip {:016x}  rflags {:016x}", s.rip, s.rflags)?;
    for row in ORDER.chunks(4) {
        for &i in row {
            write!(f, "  {} {:016x}", GENERAL[i], s.gpr[i])?;
        }
        writeln!(f)?;
    }
    for (name, segment) in SEGMENTS.iter().zip(&s.segments) {
        write_segment(f, name, segment)?;
    }
    write_segment(f, "ldtr", &s.ldtr)?;
    write_segment(f, "tr", &s.tr)?;
    write_table(f, "gdtr", &s.gdtr)?;
    write_table(f, "idtr", &s.idtr)?;
    let control = [
        ("cr0", s.cr0),
        ("cr2", s.cr2),
        ("cr3", s.cr3),
        ("cr4", s.cr4),
        ("efer", s.efer),
    ];
    for (name, value) in control {
        write!(f, "  {name} {value:x}")?;
    }
    writeln!(f)
}

fn write_segment(f: &mut Formatter<'_>, name: &str, s: &Segment) -> Result {
    let Segment {
        selector,
        attributes,
        limit,
        base,
    } = s;
    writeln!(
        f,
        "  {name:4} {selector:04x}  base {base:016x}  limit {limit:08x}  attributes {attributes:04x}"
    )
}

fn write_table(f: &mut Formatter<'_>, name: &str, t: &DescriptorTable) -> Result {
    writeln!(
        f,
        "  {name:4}       base {:016x}  limit {:08x}",
        t.base, t.limit
    )
}

fn write_exit(f: &mut Formatter<'_>, exit: &Exit) -> Result {
    let bits = |size: u8| u32::from(size) * 8;
    match *exit {
        Exit::PortRead { port, size } => write!(f, "in    port {port:#06x}, {} bits", bits(size)),
        Exit::PortWrite { port, size, value } => {
            write!(f, "out   port {port:#06x}, {} bits: {value:#x}", bits(size))
        }
        Exit::MmioRead { address, size } => write!(f, "read  {address:#010x}, {} bits", bits(size)),
        Exit::MmioWrite {
            address,
            size,
            value,
        } => write!(f, "write {address:#010x}, {} bits: {value:#x}", bits(size)),
        Exit::InterruptAcknowledge => write!(f, "interrupt of the 8259s"),
        Exit::Eoi(vector) => write!(f, "end of interrupt {vector:#04x}"),
        Exit::Kicked => write!(f, "kicked"),
        Exit::TickLimit => write!(f, "tick limit"),
        Exit::Shutdown => write!(f, "shutdown"),
    }
}
