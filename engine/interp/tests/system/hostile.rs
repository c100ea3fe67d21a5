//! Whatever a guest does, the engine neither panics nor hangs: random code and tables in every mode.

use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;

use lodger_vcpu::{Entry, Exit};
use lodger_x86::bits::{cr0, cr4, efer};

use crate::machine::*;

/// xorshift64*.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn pick<T: Copy>(&mut self, list: &[T]) -> T {
        list[self.below(list.len() as u64) as usize]
    }
}

/// Beginnings of instructions that random bytes seldom form.
const OPCODES: &[&[u8]] = &[
    &[0x0f, 0x00],
    &[0x0f, 0x01],
    &[0x0f, 0x02],
    &[0x0f, 0x03],
    &[0x0f, 0x05],
    &[0x0f, 0x07],
    &[0x0f, 0x20],
    &[0x0f, 0x21],
    &[0x0f, 0x22],
    &[0x0f, 0x23],
    &[0x0f, 0x30],
    &[0x0f, 0x32],
    &[0x0f, 0x34],
    &[0x0f, 0x35],
    &[0x0f, 0xa2],
    &[0x0f, 0xae],
    &[0x0f, 0xb2],
    &[0x0f, 0xb4],
    &[0x0f, 0xb5],
    &[0x0f, 0xc7],
    &[0x48],
    &[0x63],
    &[0x66],
    &[0x67],
    &[0x6c],
    &[0x6e],
    &[0x8e],
    &[0x9a],
    &[0x9c],
    &[0x9d],
    &[0xc4],
    &[0xc5],
    &[0xc8],
    &[0xca],
    &[0xcb],
    &[0xcc],
    &[0xcd],
    &[0xce],
    &[0xcf],
    &[0xe4],
    &[0xe6],
    &[0xea],
    &[0xec],
    &[0xee],
    &[0xf0],
    &[0xf1],
    &[0xf3, 0xa4],
    &[0xf3, 0xab],
    &[0xfa],
    &[0xfb],
    &[0xff, 0x1b],
    &[0xff, 0x2b],
];

/// A number that is likely to mean something: a selector, an address, a boundary.
fn value(r: &mut Random) -> u64 {
    match r.below(8) {
        0 => r.below(0x100),
        1 => r.below(0x1_2000),
        2 => 0x1000 + r.below(0x2800),
        3 => r.pick(&[
            GDT,
            LDT,
            IDT,
            TSS,
            TSS2,
            STACK,
            DATA,
            CODE,
            0x10_0000,
            0xfee0_0000,
        ]),
        4 => r.pick(&[
            0xffff,
            0x1_0000,
            0xffff_ffff,
            0x7fff_ffff_ffff,
            0xffff_8000_0000_0000,
        ]),
        5 => r.pick(&[
            0x174,
            0x1b,
            0x10,
            0x277,
            0x830,
            0xc000_0080,
            0xc000_0100,
            0x4b56_4d01,
        ]),
        6 => u64::from(r.next() as u32),
        _ => r.next(),
    }
}

fn code(r: &mut Random, len: usize) -> Vec<u8> {
    let mut code = Vec::new();
    while code.len() < len {
        code.extend(r.pick(OPCODES));
        for _ in 0..r.below(5) {
            code.push(r.next() as u8);
        }
        if r.below(3) == 0 {
            code.extend((value(r) as u32).to_le_bytes());
        }
    }
    code
}

/// A descriptor or gate.
fn entry(r: &mut Random) -> u64 {
    let kind = r.next() as u8 | r.pick(&[0x80, 0x80, 0x80, 0]);
    match r.below(3) {
        0 => gate(
            value(r) as u16 & 0xff,
            r.pick(&[CODE, CODE2, 0x4100]) as u32,
            kind,
            r.next() as u8,
        ),
        1 => descriptor(
            0,
            0xf_ffff,
            u16::from(kind) | r.pick(&[0xc000, 0xa000, 0x8000]),
        ),
        _ => descriptor(
            value(r) as u32,
            value(r) as u32,
            u16::from(kind) | (r.next() as u16 & 0xf000),
        ),
    }
}

#[test]
fn random_systems() {
    let mut r = Random(0x1234_5678_9abc_def1);
    for round in 0..1500 {
        let mut m = match round % 6 {
            0 => Machine::real(),
            1 => Machine::protected(0),
            2 => Machine::protected(3),
            3 => Machine::long(0),
            4 => Machine::long(3),
            _ => {
                let mut m = Machine::protected(3);
                m.state.rflags |= 0x2_0000;
                m
            }
        };
        for _ in 0..r.below(12) {
            let at = GDT + 8 * r.below(24);
            let random = entry(&mut r);
            m.u64(at, random);
        }
        for _ in 0..r.below(30) {
            let at =
                r.pick(&[IDT, LDT, TSS, TSS2]) + 8 * r.below(if round % 2 == 0 { 32 } else { 12 });
            let random = if r.below(2) == 0 {
                entry(&mut r)
            } else {
                value(&mut r)
            };
            m.u64(at, random);
        }
        for at in [CODE, CODE2, 0x4100] {
            let code = code(&mut r, 200);
            m.memory.write(at, &code).unwrap();
        }
        for i in 0..16 {
            if i != 4 || r.below(4) == 0 {
                m.state.gpr[i] = value(&mut r);
            }
        }
        m.state.rflags |= r.next() & 0x4_7fd5;
        m.state.cr4 |= r.next()
            & (cr4::PGE
                | cr4::DE
                | cr4::OSXSAVE
                | cr4::OSFXSR
                | cr4::FSGSBASE
                | cr4::TSD
                | cr4::PSE
                | cr4::SMAP);
        m.state.cr0 |= r.next() & (cr0::AM | cr0::TS | cr0::EM | cr0::MP);
        if m.state.cr0 & cr0::PG == 0 && round % 2 == 0 {
            m.state.efer |= r.next() & (efer::LME | efer::NXE | efer::SCE);
        }
        if r.below(4) == 0 {
            m.state.dr = [CODE + 3, value(&mut r), value(&mut r), 0x60];
            m.state.dr7 = 0x400 | r.next() & 0xffff_23ff;
        }
        m.state.msrs.star = r.next() & 0x00ff_00ff_ffff_ffff;
        m.state.msrs.lstar = r.pick(&[CODE, CODE2]);
        m.state.msrs.sysenter_cs = r.next() & 0xff;
        m.state.msrs.sysenter_eip = CODE2;
        m.state.nmi_pending = r.below(8) == 0;

        // A halted vCPU would wait for ever.
        let kicker = m.vcpu.kicker();
        let (finished, waiting) = std::sync::mpsc::channel::<()>();
        let watchdog = std::thread::spawn(move || {
            while waiting.recv_timeout(Duration::from_millis(20)) == Err(RecvTimeoutError::Timeout)
            {
                kicker.kick();
            }
        });
        m.vcpu.load(&m.state).unwrap();
        let limit = m.vcpu.ticks() + 500;
        m.vcpu.set_tick_limit(Some(limit));
        let mut next = Entry::Resume;
        for _ in 0..300 {
            next = match m.vcpu.run(next).unwrap() {
                Exit::PortRead { size, .. } | Exit::MmioRead { size, .. } => {
                    Entry::Data(r.next() & (u64::MAX >> (64 - 8 * u32::from(size))))
                }
                Exit::PortWrite { .. } | Exit::MmioWrite { .. } => Entry::Written,
                Exit::Eoi(_) => Entry::Resume,
                Exit::InterruptAcknowledge => Entry::Interrupt(Some(0x20)),
                Exit::Kicked | Exit::TickLimit | Exit::Shutdown => break,
            };
        }
        drop(finished);
        watchdog.join().unwrap();
    }
}
