//! Accesses off the same base share one lookup: the first of them looks up a range that holds those that follow, and leaves the
//! range's host address in S. It is good for the rest of the block as long as the base changes by known amounts only; if S is needed in
//! between for something else, the address is kept in memory. Constant addresses share the lookup of their page.
//!
//! An address must not outlive the TLB entry that it is from. Entries go when another vCPU or the guest asks for it, both between blocks
//! only, or when a lookup in the block misses: then the vCPU's loop sees to it that the block is not gone on with.

use iced_x86::{Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register};

use lodger_interp::canonical;

use crate::check::Address;
use crate::emit::{Mem, Op, RBP, RSP, Reg, S, abs, at};
use crate::insn::{Insn, Kind, is_stolen};
use crate::translate::Block;

/// Bytes that a group covers, at most. Ranges that cross a page's end are looked up in vain.
const SPAN: i64 = 256;
/// Instructions that are looked at for members of a group.
const AHEAD: usize = 32;

/// The registers of an address; none: it is constant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Base {
    pub base: Option<Reg>,
    /// The index register and its scale's logarithm.
    pub index: Option<(Reg, u8)>,
}

impl Base {
    pub const STACK: Base = Base::register(RSP);
    pub const CONSTANT: Base = Base {
        base: None,
        index: None,
    };

    const fn register(base: Reg) -> Base {
        Base {
            base: Some(base),
            index: None,
        }
    }

    /// The operand at a displacement from it.
    pub fn at(self, disp: i64) -> Mem {
        Mem {
            base: self.base,
            index: self.index.map(|(index, _)| index),
            scale: self.index.map_or(0, |(_, scale)| scale),
            disp: disp as i32,
        }
    }

    /// Whether a range of displacements may be looked up as a whole.
    fn holds(self, low: i64, high: i64) -> bool {
        match self == Base::CONSTANT {
            true => (low ^ (high - 1)) >> 12 == 0,
            false => high - low <= SPAN && i32::try_from(low).is_ok(),
        }
    }
}

/// An address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    pub base: Base,
    /// 32 bits of it count if there is a register.
    pub disp: i64,
}

/// A range whose host address is known. Displacements are from the base's present value.
#[derive(Debug, Clone, Copy)]
pub struct Group {
    pub base: Base,
    /// What its host address is that of.
    pub start: i64,
    /// Bytes from there.
    pub span: i64,
    /// It was looked up for writing, too.
    pub write: bool,
}

impl Group {
    /// Where in the range an access is.
    fn offset(&self, place: Place, size: u8, write: bool) -> Option<i32> {
        let offset = place.disp - self.start;
        let inside = offset >= 0 && offset + i64::from(size) <= self.span;
        let found = self.base == place.base && inside && (self.write || !write);
        found.then_some(offset as i32)
    }

    /// The same range after `insn`.
    fn after(self, insn: &Insn) -> Option<Group> {
        match insn.effect_on(self.base) {
            Effect::Adds(by) => Some(Group {
                start: self.start - i64::from(by),
                ..self
            }),
            Effect::Unknown => None,
        }
    }
}

/// Host addresses that are kept in memory, at most.
pub const KEPT: usize = 8;

/// A range whose host address is in memory.
pub type Kept = [Option<Group>; KEPT];

/// What an instruction does to a register, or to the sum of several.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Effect {
    Adds(i32),
    Unknown,
}

/// An access to memory off a base register.
#[derive(Debug, Clone, Copy)]
pub struct Member {
    place: Place,
    size: u8,
    write: bool,
}

impl Address<'_> {
    /// The address as base and displacement, if it is as simple as that, in code that pushes words of so many bytes.
    pub fn place(&self, word: u8) -> Option<Place> {
        match self {
            Address::Register(base, disp) => Some(Place {
                base: Base::register(*base),
                disp: (*disp).into(),
            }),
            Address::Group(group) => Some(Place {
                base: group.base,
                disp: group.start,
            }),
            Address::Operand(i) => {
                let (base, index) = (i.memory_base(), i.memory_index());
                let own = |register: Register| {
                    let wide = register.is_gpr() && register.size() == usize::from(word);
                    wide && !is_stolen(register)
                };
                if matches!(i.memory_segment(), Register::FS | Register::GS) {
                    return None;
                }
                if let Some(linear) = constant(i) {
                    return canonical(linear).then_some(Place {
                        base: Base::CONSTANT,
                        disp: linear as i64,
                    });
                }
                let simple = own(base) && (index == Register::None || own(index));
                let scale = i.memory_index_scale().trailing_zeros() as u8;
                simple.then(|| Place {
                    base: Base {
                        base: Some(Reg(base.number() as u8)),
                        index: (index != Register::None)
                            .then(|| (Reg(index.number() as u8), scale)),
                    },
                    disp: i64::from(i.memory_displacement64() as i32),
                })
            }
        }
    }
}

/// The effective address of a memory operand that has no registers, but for a segment's base.
pub fn constant(i: &Instruction) -> Option<u64> {
    if i.is_ip_rel_memory_operand() {
        return Some(i.ip_rel_memory_address());
    }
    let none = i.memory_base() == Register::None && i.memory_index() == Register::None;
    none.then(|| i.memory_displacement64())
}

/// Bits of the general registers that an instruction writes.
pub fn written(insn: &Insn, info: &mut InstructionInfoFactory) -> u16 {
    let writes = |access| {
        !matches!(
            access,
            OpAccess::None | OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess
        )
    };
    info.info(&insn.instruction)
        .used_registers()
        .iter()
        .filter(|used| used.register().is_gpr() && writes(used.access()))
        .fold(0, |bits, used| {
            bits | 1 << used.register().full_register().number()
        })
}

impl Insn {
    /// The access that is its first, if a group may hold it.
    pub fn member(&self) -> Option<Member> {
        let word = i64::from(self.word);
        let stack = |disp, write| {
            Some(Member {
                place: Place {
                    base: Base::STACK,
                    disp,
                },
                size: self.word,
                write,
            })
        };
        match self.kind {
            Kind::Memory { size, write } => Some(Member {
                place: Address::Operand(&self.instruction).place(self.word)?,
                size,
                write,
            }),
            Kind::Push(_) | Kind::PushImmediate(_) | Kind::Call(_) | Kind::CallRegister(_) => {
                stack(-word, true)
            }
            Kind::Pop(_) | Kind::Return(_) => stack(0, false),
            Kind::Leave => Some(Member {
                place: Address::Register(RBP, 0).place(self.word)?,
                size: self.word,
                write: false,
            }),
            _ => None,
        }
    }

    /// What it does to an address.
    fn effect_on(&self, base: Base) -> Effect {
        let registers = base.base.map(|base| (base, 0)).into_iter();
        let mut sum = 0_i32;
        for (register, scale) in registers.chain(base.index) {
            let by = match self.effect(register) {
                Effect::Adds(by) => by
                    .checked_mul(1 << scale)
                    .and_then(|by| sum.checked_add(by)),
                Effect::Unknown => None,
            };
            match by {
                Some(by) => sum = by,
                None => return Effect::Unknown,
            }
        }
        Effect::Adds(sum)
    }

    /// What it does to a register.
    fn effect(&self, base: Reg) -> Effect {
        let i = &self.instruction;
        let written = self.written >> base.0 & 1 != 0;
        let word = i32::from(self.word);
        match self.kind {
            Kind::Push(_) | Kind::PushImmediate(_) if base == RSP => Effect::Adds(-word),
            Kind::Pop(register) if register.number() == base.0 as usize => Effect::Unknown,
            Kind::Pop(_) if base == RSP => Effect::Adds(word),
            Kind::Push(_) | Kind::PushImmediate(_) | Kind::Pop(_) => Effect::Adds(0),
            Kind::Nothing | Kind::Branch(_) => Effect::Adds(0),
            Kind::Constant(_) | Kind::Memory { .. } | Kind::Registers if !written => {
                Effect::Adds(0)
            }
            Kind::Registers if i.op0_register().size() == usize::from(self.word) => {
                let immediate = (i.op_count() == 2)
                    .then(|| match i.op1_kind() {
                        OpKind::Immediate8to64 => i32::try_from(i.immediate8to64()).ok(),
                        OpKind::Immediate32to64 => i32::try_from(i.immediate32to64()).ok(),
                        OpKind::Immediate8to32 => Some(i.immediate8to32()),
                        OpKind::Immediate32 => Some(i.immediate32() as i32),
                        _ => None,
                    })
                    .flatten();
                let by = match i.mnemonic() {
                    Mnemonic::Add => immediate,
                    Mnemonic::Sub => immediate.and_then(i32::checked_neg),
                    Mnemonic::Inc => Some(1),
                    Mnemonic::Dec => Some(-1),
                    Mnemonic::Lea
                        if i.memory_base() == i.op0_register()
                            && i.memory_index() == Register::None =>
                    {
                        match self.word {
                            4 => Some(i.memory_displacement32() as i32),
                            _ => i32::try_from(i.memory_displacement64() as i64).ok(),
                        }
                    }
                    _ => None,
                };
                by.map_or(Effect::Unknown, Effect::Adds)
            }
            _ => Effect::Unknown,
        }
    }

    /// Whether what is in memory may still be used behind it.
    pub fn keeps_groups(&self) -> bool {
        matches!(
            self.kind,
            Kind::Nothing
                | Kind::Constant(_)
                | Kind::Registers
                | Kind::Memory { .. }
                | Kind::Push(_)
                | Kind::PushImmediate(_)
                | Kind::Pop(_)
                | Kind::Branch(_)
        )
    }

    /// Whether S keeps its value, once its operand, if it has one, is found.
    fn keeps_s(&self) -> bool {
        let i = &self.instruction;
        let in_s = |n| i.op_kind(n) == OpKind::Register && is_stolen(i.op_register(n));
        match self.kind {
            Kind::Registers | Kind::Constant(_) => {
                !(0..i.op_count()).any(in_s)
                    && !is_stolen(i.memory_base())
                    && !is_stolen(i.memory_index())
            }
            Kind::Nothing
            | Kind::Memory { .. }
            | Kind::Push(_)
            | Kind::PushImmediate(_)
            | Kind::Pop(_)
            | Kind::Branch(_) => true,
            _ => false,
        }
    }
}

impl Block<'_> {
    /// The operand, if it is in a range whose host address is known. S may be destroyed, the flags are not.
    pub fn known(&mut self, place: Place, size: u8, write: bool) -> Option<Mem> {
        let offset = |group: &Option<Group>| group.as_ref()?.offset(place, size, write);
        if let Some(offset) = offset(&self.group) {
            return Some(at(S, offset));
        }
        let (number, offset) = self
            .kept
            .iter()
            .enumerate()
            .find_map(|(number, group)| Some((number, offset(group)?)))?;
        self.code.op(Op::Mov, S, abs(self.layout.kept(number)));
        self.group = self.kept[number];
        Some(at(S, offset))
    }

    /// A group that begins with an access of the current instruction and holds what it may of those that follow, and whether its address
    /// is to be kept in memory.
    pub fn new_group(&self, place: Place, size: u8, write: bool) -> (Group, bool) {
        let base = place.base;
        let (mut low, mut high) = (place.disp, place.disp + i64::from(size));
        let (mut moved, mut write, mut behind_branch) = (0_i64, write, false);
        let (mut in_s, mut keep) = (true, false);
        let rest = match self.source.mode.alone {
            false => &self.insns[self.index..],
            true => &[],
        };
        for pair in rest.windows(2).take(AHEAD) {
            let [insn, next] = pair else { unreachable!() };
            let Effect::Adds(by) = insn.effect_on(base) else {
                break;
            };
            if !insn.keeps_groups() {
                break;
            }
            moved += i64::from(by);
            in_s &= insn.keeps_s();
            behind_branch |= matches!(insn.kind, Kind::Branch(_));
            let Some(member) = next.member() else {
                in_s &= !matches!(next.kind, Kind::Memory { .. });
                continue;
            };
            let disp = member.place.disp + moved;
            let (new_low, new_high) = (low.min(disp), high.max(disp + i64::from(member.size)));
            let fits = member.place.base == base
                && base.holds(new_low, new_high)
                && (write || !member.write || !behind_branch);
            if fits {
                (low, high) = (new_low, new_high);
                write |= member.write;
                keep |= !in_s;
            } else {
                in_s = false;
            }
        }
        if base == Base::CONSTANT && base.holds(low, high) {
            low &= !0xfff;
            high = low + 0x1000;
        }
        let group = Group {
            base,
            start: low,
            span: high - low,
            write,
        };
        (group, keep)
    }

    /// Keeps the host address of the group that is in S.
    pub fn keep(&mut self, group: Group) {
        let number = self.kept.iter().position(Option::is_none);
        let number = number.unwrap_or(self.index % KEPT);
        self.kept[number] = Some(group);
        self.code.op(Op::Store, S, abs(self.layout.kept(number)));
    }

    /// The current instruction has been executed: what is known now.
    pub fn keep_groups(&mut self, insn: &Insn) {
        self.group = self.group.filter(|_| insn.keeps_s());
        for group in self.kept.iter_mut().chain([&mut self.group]) {
            *group = group
                .filter(|_| insn.keeps_groups())
                .and_then(|group| group.after(insn));
        }
    }
}
