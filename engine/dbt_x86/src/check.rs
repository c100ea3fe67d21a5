//! The lookup of a memory operand in the TLB: from a guest effective address to the host address of the access.

use iced_x86::{Code, Instruction, Register};
use lodger_softmmu::{ENTRIES, MmuIndex, TlbEntry};

use crate::emit::{Mem, Op, Reg, S, T, abs, at, cc};
use crate::env::{BOUNCE, SITE_ENTRIES};
use crate::exits::Rare;
use crate::group::{Base, Group, constant};
use crate::refill::Reason;
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

/// Where a lookup looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lookup {
    /// In the TLB.
    Tlb,
    /// In the stack's entry.
    Stack,
    /// In the access's own entry, at this address.
    Site(u32),
}

impl Block<'_> {
    /// Puts an effective address into S; the address if it is a constant. T and the flags are destroyed.
    pub fn address(&mut self, address: Address) -> Option<u64> {
        let narrow = self.source.mode.is_32();
        let i = match address {
            Address::Register(base, disp) => {
                self.lea(at(base, disp), narrow);
                return None;
            }
            Address::Group(group) if group.base == Base::CONSTANT => {
                return self.constant(group.start as u64);
            }
            Address::Group(group) => {
                self.lea(group.base.at(group.start), narrow);
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
        match constant(i) {
            Some(value) => {
                let value = self.constant(value);
                if base_of.is_none() {
                    return value;
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
                self.lea(mem, short);
            }
        }
        if let Some(segment) = base_of {
            let place = abs(self.layout.bases + 8 * segment);
            self.code.op(Op::Add, S, place);
            if narrow {
                self.code.mov32(S, S);
            }
        }
        None
    }

    fn constant(&mut self, value: u64) -> Option<u64> {
        self.code.mov_imm(S, value);
        Some(value)
    }

    /// Puts an address of 32 or 64 bits into S.
    fn lea(&mut self, mem: Mem, narrow: bool) {
        match narrow {
            true => self.code.op32(Op::Lea, S, mem),
            false => self.code.op(Op::Lea, S, mem),
        }
    }

    /// Looks up an access of the current instruction: the operand in host memory. S and T are destroyed; the flags, too, so they are saved
    /// first if any are `live`.
    pub fn check(&mut self, address: Address, size: u8, write: bool, live: u32) -> Mem {
        let Some(place) = address.place(self.source.mode.word()) else {
            self.group = None;
            self.look_up(address, size, write, true, live);
            return at(S, 0);
        };
        if let Some(operand) = self.known(place, size, write) {
            return operand;
        }
        let (group, keep) = self.new_group(place, size, write);
        let skip = (place.disp - group.start) as u16;
        let range = Span {
            skip,
            len: group.span as u16,
            write: group.write,
            // That entry is for pages that may be written.
            stack: place.base == Base::STACK && !self.source.mode.alone,
            copied: !keep,
        };
        let alone = !keep && group.span == i64::from(size) && !range.stack;
        if alone && !write && self.follows_pointer() {
            // The next such access waits for this one: the way from its base to the data must be short.
            let range = Span {
                copied: false,
                ..range
            };
            self.look_up_range(Address::Group(group), range, size, write, live, true);
            self.group = None;
            return Mem {
                index: Some(S),
                ..place.base.at(place.disp)
            };
        }
        self.look_up_range(Address::Group(group), range, size, write, live, false);
        if keep {
            self.keep(group);
        }
        self.group = Some(group);
        at(S, skip.into())
    }

    /// The same without regard to other accesses: S becomes the host address, that of a copy only if it may be `copied`.
    pub fn look_up(&mut self, address: Address, size: u8, write: bool, copied: bool, live: u32) {
        let range = Span {
            skip: 0,
            len: size.into(),
            write,
            stack: false,
            copied,
        };
        self.look_up_range(address, range, size, write, live, false);
    }

    /// Whether the current instruction replaces a pointer by what it points to.
    fn follows_pointer(&self) -> bool {
        let insn = &self.insns[self.index];
        let i = &insn.instruction;
        i.code() == Code::Mov_r64_rm64
            && i.op0_register() == i.memory_base()
            && i.memory_index() == Register::None
    }

    /// Looks up a range. S becomes its host address or, with `distance`, what is to be added to a guest address in it.
    fn look_up_range(
        &mut self,
        address: Address,
        range: Span,
        size: u8,
        write: bool,
        live: u32,
        distance: bool,
    ) {
        if live != 0 {
            self.save_flags();
        }
        let mut site = Site::Access {
            rip: self.insns[self.index].instruction.ip(),
            retry: self.code.here() as u32,
            resume: 0,
            size,
            write,
            range,
            entry: None,
            rest: self.rest,
        };
        let constant = self.address(address);
        let mmu = self.source.mode.mmu;
        let table = self.layout.tables[mmu as usize][usize::from(range.write)];
        let lookup = match constant {
            _ if range.stack => Lookup::Stack,
            Some(_) => Lookup::Tlb,
            None => self.own_entry().map_or(Lookup::Tlb, Lookup::Site),
        };
        let place = match (lookup, constant) {
            (Lookup::Stack, _) => abs(self.layout.stack(mmu)),
            (Lookup::Site(entry), _) => abs(entry),
            (Lookup::Tlb, Some(linear)) => {
                let slot = (linear >> 12) as usize % ENTRIES;
                abs(table + (slot * size_of::<TlbEntry>()) as u32)
            }
            (Lookup::Tlb, None) => {
                let bare = match address {
                    Address::Group(group) if group.start == 0 && !self.source.mode.is_32() => {
                        group.base.base.filter(|_| group.base.index.is_none())
                    }
                    _ => None,
                };
                self.code.rorx(T, bare.unwrap_or(S), 8);
                self.code.and32(T, (ENTRIES as u32 - 1) << 4);
                at(T, table as i32)
            }
        };
        let plus = |mem: Mem, by: i32| Mem {
            disp: mem.disp + by,
            ..mem
        };
        let tag = plus(place, TAG);
        self.code.op(Op::Sub, S, tag);
        self.code.cmp_imm(S, 4096 - i32::from(range.len));
        let jump = self.code.jcc_forward(cc::A);
        if distance {
            self.code.op(Op::Mov, S, plus(place, PAGE));
            self.code.op(Op::Sub, S, tag);
        } else {
            self.code.op(Op::Add, S, plus(place, PAGE));
        }
        if let Site::Access { resume, entry, .. } = &mut site {
            *resume = self.code.here() as u32;
            if let Lookup::Site(address) = lookup {
                *entry = Some(address);
            }
        }
        self.stub(jump, Rare::Lookup(tag, lookup, live), site);
    }

    /// Address of an entry for the current access alone, if it is to have one: in user code, unless it was seen to change pages often.
    fn own_entry(&mut self) -> Option<u32> {
        let rip = self.insns[self.index].instruction.ip();
        let own = self.source.mode.mmu == MmuIndex::User
            && *self.entries < SITE_ENTRIES
            && !self.source.wanderers.contains(&rip);
        own.then(|| {
            *self.entries += 1;
            self.layout.site_entry(*self.entries - 1)
        })
    }

    /// The code for a lookup that missed.
    pub fn missed(&mut self, number: u32, tag: Mem, lookup: Lookup, live: u32) {
        let Site::Access {
            rip,
            retry,
            resume,
            size,
            write,
            range,
            rest,
            ..
        } = self.sites[number as usize]
        else {
            unreachable!("made by a lookup")
        };
        self.code.op(Op::Add, S, tag);
        let single = range.copied && range.len == u16::from(size) && !range.write && !write;
        let together = range.len > u16::from(size) && range.len < 4096;
        let reason = if together {
            let write = range.write || range.stack;
            Reason::Together { write }
        } else if single && (2..=BOUNCE).contains(&i32::from(size)) {
            Reason::Read(size)
        } else {
            Reason::Other
        };
        if lookup == Lookup::Tlb && matches!(reason, Reason::Other) {
            return self.leave_with(number);
        }
        let refills = self.routines.refills[self.source.mode.mmu as usize];
        let go_on = match reason {
            Reason::Read(_) => {
                self.code.store_imm32(abs(self.layout.resume()), resume);
                None
            }
            Reason::Together { .. } => {
                let alone = self.code.lea_forward(T);
                self.code.op(Op::Store, T, abs(self.layout.resume()));
                Some(alone)
            }
            Reason::Other => None,
        };
        if lookup != Lookup::Tlb {
            self.code.store_imm32(abs(self.layout.retry()), retry);
        }
        if let Lookup::Site(entry) = lookup {
            self.code.store_imm32(abs(self.layout.entry()), entry);
        }
        self.code.mov_imm(T, reason.with(number).into());
        self.code.jmp(match lookup {
            Lookup::Tlb => refills.none,
            Lookup::Stack => refills.stack,
            Lookup::Site(_) => refills.site[usize::from(range.write)],
        });
        if let Some(place) = go_on {
            self.code.land(place);
            self.refund(rest);
            self.go_alone(rip, live);
        }
    }
}
