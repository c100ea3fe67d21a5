//! Instructions that run natively on the host (`lodger-native`): the checks that the guest may execute them, and their
//! memory operands.
//!
//! x87 errors are always reported as #MF, also with CR0.NE clear, where a PC would raise IRQ 13 instead.

use iced_x86::OpKind;
use lodger_native::{Class, Guest, MemUse, Native, NativeState, Outcome};
use lodger_softmmu::Direction;
use lodger_x86::bits::{STATUS_FLAGS, cr0, cr4, xcr0};
use lodger_x86::paging::Access;
use lodger_x86::{Exception, Vector};

use crate::cpu::{Cpu, Exec, Stop};
use crate::op::{Handler, Op};
use crate::word::Word;

const GPR: u8 = 0;
const SSE: u8 = 1;
const AVX: u8 = 2;
const OTHER: u8 = 3;

const NONE: u8 = 0;
const READ: u8 = 1;
const WRITE: u8 = 2;

/// The handler that fits best.
pub fn handler(native: &Native) -> Handler {
    macro_rules! by_memory {
        ($class:ident) => {
            match native.mem {
                MemUse::None => run::<$class, NONE> as Handler,
                MemUse::Read(_) => run::<$class, READ>,
                MemUse::Write(_) => run::<$class, WRITE>,
            }
        };
    }
    match native.class {
        // CVTPS2PH to memory.
        _ if native.raises_simd_fp && native.mem.write() > 0 => by_memory!(OTHER),
        Class::Gpr if !native.vex => by_memory!(GPR),
        Class::Sse => by_memory!(SSE),
        Class::Avx => by_memory!(AVX),
        _ => by_memory!(OTHER),
    }
}

fn run<const CLASS: u8, const MEMORY: u8>(c: &mut Cpu, op: &Op) -> Exec {
    let native = op.rare().native.as_ref().expect("chosen by `handler`");
    if CLASS == OTHER && MEMORY == WRITE {
        return run_floating_point_store(c, op, native);
    }
    match CLASS {
        GPR => {}
        SSE => c.check_sse()?,
        AVX => c.check_avx()?,
        _ => c.check_class(native.class, native.vex, op)?,
    }
    if native.waits_x87 && c.native.x87_exception_pending() {
        return c.raise(Exception::plain(Vector::MathFault));
    }
    let len = (native.mem.read() + native.mem.write()) as u64;
    let mut linear = 0;
    if MEMORY != NONE {
        let access = if MEMORY == READ {
            Access::Read
        } else {
            Access::Write
        };
        let place = c.operand(op, len, access);
        if let Some(align) = native.align {
            // Goes before the segment's limit.
            let linear =
                place.unwrap_or_else(|_| c.offset(op).wrapping_add(c.bases[(op.seg & 7) as usize]));
            if linear & u64::from(align - 1) != 0 {
                return c.gp0();
            }
        }
        linear = place?;
        if MEMORY == READ {
            c.stage(linear, op.seg, len as usize)?;
        } else {
            c.prepare_write(linear, op.seg, len)?;
        }
    }
    if CLASS == OTHER {
        c.native.x87_ip = c.rip().wrapping_sub(u64::from(op.len));
        c.native.x87_dp = if MEMORY == NONE { 0 } else { c.offset(op) };
    }
    // What is not written is an x87 store.
    c.run_native(native)?;
    if MEMORY == WRITE {
        c.unstage(linear, op.seg, len as usize)?;
    }
    Ok(())
}

/// A store that changes registers as well, such as FSTP. It is undone if memory cannot be written; but a floating-point exception
/// goes first, and then memory is not accessed at all.
#[inline(never)]
fn run_floating_point_store(c: &mut Cpu, op: &Op, native: &Native) -> Exec {
    c.check_class(native.class, native.vex, op)?;
    if native.waits_x87 && c.native.x87_exception_pending() {
        return c.raise(Exception::plain(Vector::MathFault));
    }
    let len = native.mem.write() as u64;
    let place = c.operand(op, len, Access::Write);
    let place = place.and_then(|linear| c.prepare_write(linear, op.seg, len).map(|()| linear));
    let certain = place.is_ok_and(|linear| c.is_writable_at_once(linear, len));
    let before = (!certain).then(|| c.native.clone());
    c.native.x87_ip = c.rip().wrapping_sub(u64::from(op.len));
    c.native.x87_dp = c.offset(op);
    let stored = match c.run_native(native)? {
        Stored::No => return Ok(()),
        Stored::Yes => place.and_then(|linear| c.unstage(linear, op.seg, len as usize)),
    };
    if let (Err(_), Some(before)) = (stored, before) {
        *c.native = before;
    }
    stored
}

/// Whether a memory operand is to be written.
#[derive(PartialEq, Eq)]
enum Stored {
    Yes,
    No,
}

/// Gathers and masked moves.
pub fn run_masked(c: &mut Cpu, op: &Op) -> Exec {
    let masked = op.rare().masked.expect("chosen by the decoder");
    c.check_class(masked.class, masked.class == Class::Avx, op)?;
    if masked.waits_x87 && c.native.x87_exception_pending() {
        return c.raise(Exception::plain(Vector::MathFault));
    }
    let instruction = &op.rare().instruction;
    let moved = if instruction.is_ip_rel_memory_operand() {
        c.rip().wrapping_sub(instruction.next_ip())
    } else {
        0
    };
    let explicit = instruction.op_kinds().any(|k| k == OpKind::Memory);
    let mut elements = Elements {
        segment: if explicit {
            op.seg
        } else {
            masked.segment.number() as u8
        },
        gather: masked.is_gather(),
        moved,
        mask: u64::MAX >> op.address_shift,
        writes: [(0, [0; 8], 0); 16],
        count: 0,
        c,
    };
    masked.exec(&mut elements)?;
    elements.write_all()
}

/// The guest as a masked instruction sees it.
struct Elements<'a> {
    c: &'a mut Cpu,
    segment: u8,
    gather: bool,
    /// How far from where it was decoded an RIP-relative instruction is executed.
    moved: u64,
    /// Ones in the bits that an offset has.
    mask: u64,
    /// Linear address, bytes and their number of what is to be written when all of it has been found writable.
    writes: [(u64, [u8; 8], usize); 16],
    count: usize,
}

impl Elements<'_> {
    fn linear(&mut self, offset: u64, len: usize, access: Access) -> Exec<u64> {
        let offset = offset.wrapping_add(self.moved) & self.mask;
        self.c.linear(self.segment, offset, len as u64, access)
    }

    fn write_all(self) -> Exec {
        for (linear, bytes, len) in &self.writes[..self.count] {
            self.c.write_bytes(*linear, self.segment, &bytes[..*len])?;
        }
        Ok(())
    }
}

impl Guest for Elements<'_> {
    type Fault = Stop;

    fn state(&mut self) -> &mut NativeState {
        &mut self.c.native
    }

    fn gprs(&self) -> &[u64; 16] {
        self.c.regs.first_chunk().expect("16 of 32")
    }

    fn read(&mut self, address: u64, bytes: &mut [u8]) -> Exec {
        let linear = self.linear(address, bytes.len(), Access::Read)?;
        self.c.read_bytes(linear, self.segment, bytes)?;
        if self.gather {
            // The element is done and will not be read again.
            self.c.io.clear();
        }
        Ok(())
    }

    fn write(&mut self, address: u64, bytes: &[u8]) -> Exec {
        let linear = self.linear(address, bytes.len(), Access::Write)?;
        self.c
            .check_write(linear, bytes.len() as u64, self.segment)?;
        let (to, value, len) = &mut self.writes[self.count];
        (*to, *len) = (linear, bytes.len());
        value[..bytes.len()].copy_from_slice(bytes);
        self.count += 1;
        Ok(())
    }
}

impl Cpu {
    #[inline(always)]
    fn check_sse(&mut self) -> Exec {
        match self.sse_usable() {
            true => Ok(()),
            false => self.refuse_sse(),
        }
    }

    #[cold]
    fn refuse_sse(&mut self) -> Exec {
        let off = self.cr0 & cr0::EM != 0 || self.cr4 & cr4::OSFXSR == 0;
        self.raise(if off { Exception::UD } else { Exception::NM })
    }

    #[inline(always)]
    fn check_avx(&mut self) -> Exec {
        if self.avx_usable() {
            return Ok(());
        }
        const STATE: u64 = xcr0::SSE | xcr0::AVX;
        let enabled = self.cr4 & cr4::OSXSAVE != 0 && self.xcr0 & STATE == STATE;
        let usable = enabled && self.cr0 & cr0::PE != 0 && !self.v86();
        self.raise(if usable { Exception::NM } else { Exception::UD })
    }

    fn check_class(&mut self, class: Class, vex: bool, op: &Op) -> Exec {
        use iced_x86::Mnemonic;
        let set = |bits| self.cr0 & bits != 0;
        match class {
            Class::Gpr if vex && (self.real_mode() || self.v86()) => self.ud(),
            Class::Gpr => Ok(()),
            Class::Sse => self.check_sse(),
            Class::Avx => self.check_avx(),
            Class::Mmx if set(cr0::EM) => self.ud(),
            Class::Mmx if set(cr0::TS) => self.raise(Exception::NM),
            Class::X87 if op.rare().instruction.mnemonic() == Mnemonic::Wait => {
                let both = self.cr0 & (cr0::MP | cr0::TS) == cr0::MP | cr0::TS;
                if both {
                    self.raise(Exception::NM)
                } else {
                    Ok(())
                }
            }
            Class::X87 if set(cr0::EM | cr0::TS) => self.raise(Exception::NM),
            Class::Mmx | Class::X87 => Ok(()),
        }
    }

    /// Executes the instruction between the staging area and the registers.
    #[inline(always)]
    fn run_native(&mut self, native: &Native) -> Exec<Stored> {
        let mut flags = self.flags as u32;
        let gprs = self.regs.first_chunk_mut().expect("16 of 32");
        // SAFETY: stubs are cleared only together with all blocks, and this instruction's block is being executed.
        let outcome = unsafe { native.exec(&mut self.native, gprs, &mut flags) };
        match outcome {
            Outcome::Done => {}
            Outcome::NotStored => return Ok(Stored::No),
            Outcome::SimdException => {
                let reported = self.cr4 & cr4::OSXMMEXCPT != 0;
                return self.raise(if reported {
                    Exception::plain(Vector::SimdException)
                } else {
                    Exception::UD
                });
            }
            Outcome::X87Exception => return self.raise(Exception::plain(Vector::MathFault)),
        }
        if native.uses_flags {
            self.set_status(u64::from(flags) & STATUS_FLAGS);
        }
        Ok(Stored::Yes)
    }

    /// A TLB entry permits a write of the whole operand.
    #[inline(always)]
    fn is_writable_at_once(&self, linear: u64, len: u64) -> bool {
        let entry = self.tlb.entry(self.mmu, Direction::Write, linear);
        entry.host(linear, len).is_some()
    }

    /// Reads a memory operand into the staging area.
    #[inline(always)]
    fn stage(&mut self, linear: u64, segment: u8, len: usize) -> Exec {
        let entry = self.tlb.entry(self.mmu, Direction::Read, linear);
        if let Some(host) = entry.host(linear, len as u64)
            && len >= 8
            && len.is_multiple_of(8)
        {
            for at in (0..len).step_by(8) {
                // SAFETY: the operand lies within the page that the TLB entry covers.
                let word = unsafe { u64::load(host.add(at)) };
                self.native.staging[at..at + 8].copy_from_slice(&word.to_le_bytes());
            }
            return Ok(());
        }
        let mut bytes = [0; 128];
        self.read_bytes(linear, segment, &mut bytes[..len])?;
        self.native.staging[..len].copy_from_slice(&bytes[..len]);
        Ok(())
    }

    /// Faults unless the operand can be written.
    #[inline(always)]
    fn prepare_write(&mut self, linear: u64, segment: u8, len: u64) -> Exec {
        if self.is_writable_at_once(linear, len) {
            return Ok(());
        }
        self.check_write(linear, len, segment)
    }

    /// Writes the staging area to a memory operand.
    #[inline(always)]
    fn unstage(&mut self, linear: u64, segment: u8, len: usize) -> Exec {
        let entry = self.tlb.entry(self.mmu, Direction::Write, linear);
        if let Some(host) = entry.host(linear, len as u64)
            && len >= 8
            && len.is_multiple_of(8)
        {
            for at in (0..len).step_by(8) {
                let word = self.native.staging[at..at + 8].try_into().expect("8 bytes");
                // SAFETY: the operand lies within the page that the TLB entry covers.
                unsafe { u64::store(host.add(at), u64::from_le_bytes(word)) };
            }
            return Ok(());
        }
        let bytes = self.native.staging;
        self.write_bytes(linear, segment, &bytes[..len])
    }
}
