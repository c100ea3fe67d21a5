//! Gathers and masked moves: several memory elements, each accessed only if its mask bit says so.
//!
//! Written by hand against the trait [`Guest`], so that a masked-off element never faults and a gather that faults keeps what
//! it has done: elements already loaded stay loaded and their mask bits stay clear, and the instruction can be restarted
//! (SDM volume 2, VPGATHERDD, VMASKMOV, MASKMOVDQU).

use crate::form::{Class, supported};
use crate::state::NativeState;
use iced_x86::{CpuidFeature, EncodingKind, Instruction, Mnemonic, OpKind, Register};

/// The guest, as a masked access needs it.
pub trait Guest {
    /// A fault that ends the instruction.
    type Fault;
    /// Vector and x87 registers.
    fn state(&mut self) -> &mut NativeState;
    /// General-purpose registers, RAX to R15 in encoding order.
    fn gprs(&self) -> &[u64; 16];
    /// Reads at an effective address in [`Masked::segment`].
    fn read(&mut self, address: u64, bytes: &mut [u8]) -> Result<(), Self::Fault>;
    /// Writes at an effective address in [`Masked::segment`].
    fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), Self::Fault>;
}

/// A decoded gather or masked move.
#[derive(Clone, Copy, Debug)]
pub struct Masked {
    operation: Operation,
    address: Address,
    /// The segment register that addresses are relative to.
    pub segment: Register,
    /// Which control registers decide whether the guest may execute it.
    pub class: Class,
    /// Raises #MF before anything else if [`NativeState::x87_exception_pending`].
    pub waits_x87: bool,
}

/// Register fields are numbers; sizes are in bytes.
#[derive(Clone, Copy, Debug)]
enum Operation {
    Gather(Gather),
    Load {
        target: usize,
        mask: usize,
        len: usize,
        element: usize,
    },
    Store {
        source: usize,
        mask: usize,
        len: usize,
        element: usize,
    },
    /// MASKMOVDQU.
    StoreBytes {
        source: usize,
        mask: usize,
    },
    /// MASKMOVQ.
    StoreMmxBytes {
        source: usize,
        mask: usize,
    },
}

#[derive(Clone, Copy, Debug)]
struct Gather {
    target: usize,
    index: usize,
    mask: usize,
    /// Elements.
    count: usize,
    element: usize,
    index_element: usize,
}

/// base + index * scale + displacement, in an address size.
#[derive(Clone, Copy, Debug)]
struct Address {
    base: Option<usize>,
    /// General-purpose index register; a gather's vector index is not here.
    index: Option<usize>,
    scale: u64,
    displacement: u64,
    /// Ones in the bits that the address size has.
    size_mask: u64,
}

impl Masked {
    /// `None` if it is another instruction, or the host lacks its feature (the set of features then stays the same as for
    /// [`StubCache::prepare`](crate::StubCache::prepare)), or a gather names a register twice (#UD).
    pub fn decode(instruction: &Instruction) -> Option<Self> {
        use Mnemonic as M;
        let code = instruction.code();
        let operation = match instruction.mnemonic() {
            M::Vgatherdps | M::Vpgatherdd => gather(instruction, 4, 4)?,
            M::Vgatherdpd | M::Vpgatherdq => gather(instruction, 8, 4)?,
            M::Vgatherqps | M::Vpgatherqd => gather(instruction, 4, 8)?,
            M::Vgatherqpd | M::Vpgatherqq => gather(instruction, 8, 8)?,
            M::Vmaskmovps | M::Vpmaskmovd => masked_move(instruction, 4),
            M::Vmaskmovpd | M::Vpmaskmovq => masked_move(instruction, 8),
            M::Maskmovdqu | M::Vmaskmovdqu => Operation::StoreBytes {
                source: instruction.op1_register().number(),
                mask: instruction.op2_register().number(),
            },
            M::Maskmovq => Operation::StoreMmxBytes {
                source: instruction.op1_register().number(),
                mask: instruction.op2_register().number(),
            },
            _ => return None,
        };
        let features: &[CpuidFeature] = code.cpuid_features();
        let vex = match code.encoding() {
            EncodingKind::Legacy => false,
            EncodingKind::VEX => true,
            _ => return None,
        };
        if !features.iter().all(|&feature| supported(feature)) {
            return None;
        }
        let mmx = matches!(operation, Operation::StoreMmxBytes { .. });
        Some(Self {
            operation,
            address: Address::new(instruction),
            segment: instruction.memory_segment(),
            class: match (vex, mmx) {
                (true, _) => Class::Avx,
                (false, true) => Class::Mmx,
                (false, false) => Class::Sse,
            },
            waits_x87: mmx,
        })
    }

    /// Whether a fault leaves the elements before it done, so that a repetition goes on with the one that faulted; otherwise a
    /// repetition starts again with the first.
    pub fn is_gather(&self) -> bool {
        matches!(self.operation, Operation::Gather(_))
    }

    /// Executes the instruction. After a fault it may be executed again, or abandoned.
    pub fn exec<G: Guest>(&self, guest: &mut G) -> Result<(), G::Fault> {
        match self.operation {
            Operation::Gather(gather) => self.gather(gather, guest),
            Operation::Load {
                target,
                mask,
                len,
                element,
            } => {
                let mask = guest.state().ymm[mask];
                let address = self.address.of(guest.gprs(), 0);
                let mut value = [0; 32];
                for at in (0..len)
                    .step_by(element)
                    .filter(|&at| selected(&mask, at, element))
                {
                    guest.read(self.address.add(address, at), &mut value[at..at + element])?;
                }
                guest.state().ymm[target] = value;
                Ok(())
            }
            Operation::Store {
                source,
                mask,
                len,
                element,
            } => {
                let (value, mask) = (guest.state().ymm[source], guest.state().ymm[mask]);
                self.store(guest, &value[..len], &mask, element)
            }
            Operation::StoreBytes { source, mask } => {
                let (value, mask) = (guest.state().ymm[source], guest.state().ymm[mask]);
                self.store(guest, &value[..16], &mask, 1)
            }
            Operation::StoreMmxBytes { source, mask } => {
                let (value, mask) = (guest.state().mmx(source), guest.state().mmx(mask));
                self.store(guest, &value, &mask, 1)?;
                guest.state().enter_mmx();
                Ok(())
            }
        }
    }

    fn store<G: Guest>(
        &self,
        guest: &mut G,
        value: &[u8],
        mask: &[u8],
        element: usize,
    ) -> Result<(), G::Fault> {
        let address = self.address.of(guest.gprs(), 0);
        for at in (0..value.len())
            .step_by(element)
            .filter(|&at| selected(mask, at, element))
        {
            guest.write(self.address.add(address, at), &value[at..at + element])?;
        }
        Ok(())
    }

    fn gather<G: Guest>(&self, gather: Gather, guest: &mut G) -> Result<(), G::Fault> {
        let Gather {
            target,
            index,
            mask,
            count,
            element,
            index_element,
        } = gather;
        let indices = guest.state().ymm[index];
        let state = guest.state();
        for at in (0..count * element).step_by(element) {
            let value = if selected(&state.ymm[mask], at, element) {
                0xff
            } else {
                0
            };
            state.ymm[mask][at..at + element].fill(value);
        }
        state.ymm[mask][count * element..].fill(0);
        for number in 0..count {
            let at = number * element;
            if selected(&guest.state().ymm[mask], at, element) {
                let index = signed(&indices[number * index_element..][..index_element]);
                let address = self.address.of(guest.gprs(), index);
                let mut value = [0; 8];
                guest.read(address, &mut value[..element])?;
                let target = &mut guest.state().ymm[target];
                target[at..at + element].copy_from_slice(&value[..element]);
                target[count * element..].fill(0);
            }
            guest.state().ymm[mask][at..at + element].fill(0);
        }
        guest.state().ymm[target][count * element..].fill(0);
        Ok(())
    }
}

fn gather(instruction: &Instruction, element: usize, index_element: usize) -> Option<Operation> {
    let (target, mask) = (instruction.op0_register(), instruction.op2_register());
    let index = instruction.memory_index();
    let (t, i, m) = (target.number(), index.number(), mask.number());
    if t == i || t == m || i == m {
        return None;
    }
    let count = (target.size() / element).min(index.size() / index_element);
    Some(Operation::Gather(Gather {
        target: t,
        index: i,
        mask: m,
        count,
        element,
        index_element,
    }))
}

fn masked_move(instruction: &Instruction, element: usize) -> Operation {
    let mask = instruction.op1_register().number();
    if instruction.op0_kind() == OpKind::Memory {
        let source = instruction.op2_register();
        Operation::Store {
            source: source.number(),
            mask,
            len: source.size(),
            element,
        }
    } else {
        let target = instruction.op0_register();
        Operation::Load {
            target: target.number(),
            mask,
            len: target.size(),
            element,
        }
    }
}

/// Whether the sign bit of the mask element at a byte offset is set.
fn selected(mask: &[u8], at: usize, element: usize) -> bool {
    mask[at + element - 1] & 0x80 != 0
}

fn signed(little_endian: &[u8]) -> u64 {
    match *little_endian {
        [a, b, c, d] => i64::from(i32::from_le_bytes([a, b, c, d])) as u64,
        _ => u64::from_le_bytes(little_endian.try_into().expect("4 or 8 bytes")),
    }
}

impl Address {
    fn new(instruction: &Instruction) -> Self {
        let implied = |register: Register| Self {
            base: Some(register.number()),
            index: None,
            scale: 0,
            displacement: 0,
            size_mask: size_mask(register),
        };
        match instruction.op0_kind() {
            OpKind::MemorySegDI => implied(Register::DI),
            OpKind::MemorySegEDI => implied(Register::EDI),
            OpKind::MemorySegRDI => implied(Register::RDI),
            _ => {
                let (base, index) = (instruction.memory_base(), instruction.memory_index());
                // An instruction-pointer base is already in the displacement.
                let number = |register: Register| register.is_gpr().then(|| register.number());
                let widest = [base, index].into_iter().find(|r| r.is_gpr() || r.is_ip());
                Self {
                    base: number(base),
                    index: number(index),
                    scale: u64::from(instruction.memory_index_scale()),
                    displacement: instruction.memory_displacement64(),
                    size_mask: match widest {
                        Some(register) => size_mask(register),
                        None => ones(instruction.memory_displ_size() as usize),
                    },
                }
            }
        }
    }

    /// The effective address with a vector index (for other instructions zero).
    fn of(&self, gprs: &[u64; 16], vector_index: u64) -> u64 {
        let base = self.base.map_or(0, |n| gprs[n]);
        let index = self.index.map_or(vector_index, |n| gprs[n]);
        base.wrapping_add(index.wrapping_mul(self.scale))
            .wrapping_add(self.displacement)
            & self.size_mask
    }

    /// The effective address so many bytes further on.
    fn add(&self, address: u64, bytes: usize) -> u64 {
        address.wrapping_add(bytes as u64) & self.size_mask
    }
}

fn size_mask(register: Register) -> u64 {
    ones(register.size())
}

fn ones(bytes: usize) -> u64 {
    match bytes {
        2 => 0xffff,
        4 => 0xffff_ffff,
        _ => u64::MAX,
    }
}
