//! The lookup of a memory operand in the TLB: from a guest effective address to the host address of the access.

use iced_x86::{Instruction, Register};
use lodger_softmmu::{ENTRIES, TlbEntry};

use crate::emit::{Mem, Op, Reg, S, T, abs, at, cc};
use crate::exits::Rare;
use crate::group::{Base, Group};
use crate::translate::{Block, Site, Span};

const TAG: i32 = TlbEntry::LAYOUT.0 as i32;
const PAGE: i32 = TlbEntry::LAYOUT.1 as i32;

/// An effective address.
#[derive(Clone, Copy)]
pub enum Address<'a> {
    Operand(&'a Instruction),
    /// A register and a displacement.
    Register(Reg, i32),
    /// The start of a group.
    Group(Group),
}

impl Block<'_> {
    /// Puts an effective address into S; the address if it is a constant. T and the flags are destroyed.
    fn address(&mut self, address: Address) -> Option<u64> {
        let i = match address {
            Address::Register(base, disp) => {
                self.code.op(Op::Lea, S, at(base, disp));
                return None;
            }
            Address::Group(group) => {
                self.code.op(Op::Lea, S, group.base.at(group.start));
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

    /// Looks up an access of the current instruction: the operand in host memory. S and T are destroyed; the flags, too, so they are saved
    /// first if any are `live`.
    pub fn check(&mut self, address: Address, size: u8, write: bool, live: u32) -> Mem {
        let Some(place) = address.place() else {
            self.group = None;
            self.look_up(address, size, write, live);
            return at(S, 0);
        };
        if let Some(operand) = self.grouped(place, size, write) {
            return operand;
        }
        let group = self.new_group(place, size, write);
        let skip = (place.disp - group.start) as u16;
        let range = Span {
            skip,
            len: group.span as u16,
            write: group.write,
            stack: place.base == Base::STACK,
        };
        self.look_up_range(Address::Group(group), range, size, write, live);
        self.group = Some(group);
        at(S, skip.into())
    }

    /// The same without regard to other accesses: S becomes the host address.
    pub fn look_up(&mut self, address: Address, size: u8, write: bool, live: u32) {
        let range = Span {
            skip: 0,
            len: size.into(),
            write,
            stack: false,
        };
        self.look_up_range(address, range, size, write, live);
    }

    fn look_up_range(&mut self, address: Address, range: Span, size: u8, write: bool, live: u32) {
        if live != 0 {
            self.save_flags();
        }
        let site = Site::Access {
            rip: self.insns[self.index].instruction.ip(),
            retry: self.code.here() as u32,
            size,
            write,
            range,
            rest: self.rest,
        };
        let constant = self.address(address);
        let mmu = self.source.mode.mmu;
        let table = self.layout.tables[mmu as usize][usize::from(range.write)];
        let entry = match constant {
            _ if range.stack => abs(self.layout.stack(mmu)),
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
        self.code.cmp_imm(S, 4096 - i32::from(range.len));
        let jump = self.code.jcc_forward(cc::A);
        let rare = match range.stack {
            true => Rare::Stack(tag),
            false => Rare::Tagged(tag),
        };
        self.stub(jump, rare, site);
        self.code.op(Op::Add, S, plus(entry, PAGE));
    }
}
