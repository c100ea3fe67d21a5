//! The lookup of a memory operand in the TLB: from a guest effective address to the host address of the access.

use iced_x86::{Instruction, Register};
use lodger_softmmu::{ENTRIES, TlbEntry};

use crate::emit::{Mem, Op, Reg, S, T, abs, at, cc};
use crate::exits::Rare;
use crate::translate::{Block, Site};

const TAG: i32 = TlbEntry::LAYOUT.0 as i32;
const PAGE: i32 = TlbEntry::LAYOUT.1 as i32;

/// An effective address.
#[derive(Clone, Copy)]
pub enum Address<'a> {
    Operand(&'a Instruction),
    /// A register and a displacement.
    Register(Reg, i32),
}

impl Block<'_> {
    /// Puts an effective address into S; the address if it is a constant. T and the flags are destroyed.
    fn address(&mut self, address: Address) -> Option<u64> {
        let i = match address {
            Address::Register(base, disp) => {
                self.code.op(Op::Lea, S, at(base, disp));
                return None;
            }
            Address::Operand(i) => i,
        };
        let base_of = match i.memory_segment() {
            Register::FS => Some(4),
            Register::GS => Some(5),
            _ => None,
        };
        let (base, index) = (i.memory_base(), i.memory_index());
        let constant = if i.is_ip_rel_memory_operand() {
            Some(i.ip_rel_memory_address())
        } else if base == Register::None && index == Register::None {
            Some(i.memory_displacement64())
        } else {
            None
        };
        match constant {
            Some(value) => {
                self.code.mov_imm(S, value);
                if base_of.is_none() {
                    return Some(value);
                }
            }
            None => {
                let short = i.memory_base().is_gpr32() || i.memory_index().is_gpr32();
                let base = (base != Register::None).then(|| self.get(base, S));
                let index = (index != Register::None).then(|| self.get(index, T));
                let mem = Mem {
                    base,
                    index,
                    scale: i.memory_index_scale().trailing_zeros() as u8,
                    disp: i.memory_displacement64() as i32,
                };
                match short {
                    true => self.code.op32(Op::Lea, S, mem),
                    false => self.code.op(Op::Lea, S, mem),
                }
            }
        }
        if let Some(segment) = base_of {
            let place = abs(self.layout.bases + 8 * segment);
            self.code.op(Op::Add, S, place);
        }
        None
    }

    /// Looks up an access of the instruction at `rip`: S becomes its host address. T is destroyed; the flags, too, so they are
    /// saved first if any are `live`.
    pub fn check(&mut self, address: Address, size: u8, write: bool, live: u32, rip: u64) {
        if live != 0 {
            self.save_flags();
        }
        let retry = self.code.here() as u32;
        let site = Site::Access {
            rip,
            retry,
            size,
            write,
            rest: self.rest,
        };
        let constant = self.address(address);
        let table = self.layout.tables[self.source.mode.mmu as usize][usize::from(write)];
        let entry = match constant {
            Some(linear) => {
                let slot = (linear >> 12) as usize % ENTRIES;
                abs(table + (slot * size_of::<TlbEntry>()) as u32)
            }
            None => {
                self.code.rorx(T, S, 8);
                self.code.and32(T, (ENTRIES as u32 - 1) << 4);
                at(T, table as i32)
            }
        };
        let plus = |mem: Mem, by: i32| Mem {
            disp: mem.disp + by,
            ..mem
        };
        let tag = plus(entry, TAG);
        self.code.op(Op::Sub, S, tag);
        self.code.cmp_imm(S, 4096 - i32::from(size));
        let jump = self.code.jcc_forward(cc::A);
        self.stub(jump, Rare::Tagged(tag), site);
        self.code.op(Op::Add, S, plus(entry, PAGE));
    }
}
