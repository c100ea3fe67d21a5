//! Accesses off the same base share one lookup: the first of them looks up a range that holds those that follow, and leaves the
//! range's host address in S for as long as nothing else needs S and the base changes by known amounts only.

use iced_x86::{InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register};

use crate::check::Address;
use crate::emit::{Mem, RBP, RSP, Reg, S, at};
use crate::insn::{Insn, Kind, is_stolen};
use crate::translate::Block;

/// Bytes that a group covers, at most. Ranges that cross a page's end are looked up in vain.
const SPAN: i32 = 256;

/// The registers of an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Base {
    pub base: Reg,
    /// The index register and its scale's logarithm.
    pub index: Option<(Reg, u8)>,
}

impl Base {
    pub const STACK: Base = Base {
        base: RSP,
        index: None,
    };

    /// The operand at a displacement from it.
    pub fn at(self, disp: i32) -> Mem {
        Mem {
            base: Some(self.base),
            index: self.index.map(|(index, _)| index),
            scale: self.index.map_or(0, |(_, scale)| scale),
            disp,
        }
    }
}

/// An address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    pub base: Base,
    pub disp: i32,
}

/// A range whose host address is in S. Displacements are from the base's present value.
#[derive(Debug, Clone, Copy)]
pub struct Group {
    pub base: Base,
    /// What S points to.
    pub start: i32,
    /// Bytes from there.
    pub span: i32,
    /// It was looked up for writing, too.
    pub write: bool,
}

impl Group {
    /// The operand of an access in the range.
    fn operand(&self, place: Place, size: u8, write: bool) -> Option<Mem> {
        let offset = place.disp.checked_sub(self.start)?;
        let inside = offset >= 0 && offset + i32::from(size) <= self.span;
        let found = self.base == place.base && inside && (self.write || !write);
        found.then(|| at(S, offset))
    }
}

/// What an instruction does to a register, or to the sum of several.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Effect {
    Adds(i32),
    Unknown,
}

/// An access to memory off a base register.
#[derive(Debug, Clone, Copy)]
struct Member {
    place: Place,
    size: u8,
    write: bool,
}

impl Address<'_> {
    /// The address as base and displacement, if it is as simple as that, in code that pushes words of so many bytes.
    pub fn place(&self, word: u8) -> Option<Place> {
        match self {
            Address::Register(base, disp) => Some(Place {
                base: Base {
                    base: *base,
                    index: None,
                },
                disp: *disp,
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
                let simple = own(base)
                    && (index == Register::None || own(index))
                    && !matches!(i.memory_segment(), Register::FS | Register::GS);
                let scale = i.memory_index_scale().trailing_zeros() as u8;
                simple.then(|| Place {
                    base: Base {
                        base: Reg(base.number() as u8),
                        index: (index != Register::None)
                            .then(|| (Reg(index.number() as u8), scale)),
                    },
                    disp: i.memory_displacement64() as i32,
                })
            }
        }
    }
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
    fn member(&self) -> Option<Member> {
        let word = i32::from(self.word);
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
        let sum = |index: i32, scale: u8, by: i32| {
            index
                .checked_mul(1 << scale)
                .and_then(|index| index.checked_add(by))
        };
        match (self.effect(base.base), base.index) {
            (effect, None) => effect,
            (Effect::Unknown, _) => Effect::Unknown,
            (Effect::Adds(by), Some((index, scale))) => match self.effect(index) {
                Effect::Unknown => Effect::Unknown,
                Effect::Adds(index) => sum(index, scale, by).map_or(Effect::Unknown, Effect::Adds),
            },
        }
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
    /// The operand, if what is in S holds it.
    pub fn grouped(&self, place: Place, size: u8, write: bool) -> Option<Mem> {
        self.group?.operand(place, size, write)
    }

    /// A group that begins with an access of the current instruction and holds what it may of those that follow.
    pub fn new_group(&self, place: Place, size: u8, write: bool) -> Group {
        let base = place.base;
        let (mut low, mut high) = (place.disp, place.disp.saturating_add(size.into()));
        let group = |low, high, write| Group {
            base,
            start: low,
            span: high - low,
            write,
        };
        let mut best = group(low, high, write);
        if !self.grouping {
            return best;
        }
        let current = &self.insns[self.index];
        let (mut moved, mut write, mut behind_branch) = (0_i32, write, false);
        let mut insn = current;
        for next in &self.insns[self.index + 1..] {
            let Effect::Adds(by) = insn.effect_on(base) else {
                break;
            };
            let Some(sum) = moved.checked_add(by) else {
                break;
            };
            moved = sum;
            if !insn.keeps_s() {
                break;
            }
            behind_branch |= matches!(insn.kind, Kind::Branch(_));
            insn = next;
            match next.member() {
                Some(member) if member.place.base == base => {
                    let Some(disp) = member.place.disp.checked_add(moved) else {
                        break;
                    };
                    if member.write && !write && behind_branch {
                        break;
                    }
                    let (new_low, new_high) = (
                        low.min(disp),
                        high.max(disp.saturating_add(member.size.into())),
                    );
                    if i64::from(new_high) - i64::from(new_low) > SPAN.into() {
                        break;
                    }
                    (low, high) = (new_low, new_high);
                    write |= member.write;
                    best = group(low, high, write);
                }
                None if !matches!(next.kind, Kind::Memory { .. }) => {}
                _ => break,
            }
        }
        best
    }

    /// The current instruction has been executed: what S holds now.
    pub fn keep_group(&mut self, insn: &Insn) {
        self.group = match self.group {
            Some(group) if insn.keeps_s() => match insn.effect_on(group.base) {
                Effect::Adds(by) => group
                    .start
                    .checked_sub(by)
                    .map(|start| Group { start, ..group }),
                Effect::Unknown => None,
            },
            _ => None,
        };
    }
}
