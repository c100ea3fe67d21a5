//! Gathers and masked moves, which are written by hand, against the processor.

use crate::direct::{Direct, End, MEMORY, Machine};
use crate::inputs::Random;
use crate::{difference, state_of, through_bytes};
use iced_x86::{Code, Instruction, OpKind, Register};
use lodger_native::{Guest, Masked, NativeState};

/// A guest with [`MEMORY`] bytes at one address.
struct Window<'a> {
    state: NativeState,
    gprs: [u64; 16],
    memory: &'a mut [u8; MEMORY],
    address: u64,
}

impl Window<'_> {
    fn at(&mut self, address: u64, len: usize) -> Result<&mut [u8], u64> {
        let start = usize::try_from(address.wrapping_sub(self.address)).map_err(|_| address)?;
        let end = start.checked_add(len).ok_or(address)?;
        self.memory.get_mut(start..end).ok_or(address)
    }
}

impl Guest for Window<'_> {
    type Fault = u64;

    fn state(&mut self) -> &mut NativeState {
        &mut self.state
    }

    fn gprs(&self) -> &[u64; 16] {
        &self.gprs
    }

    fn read(&mut self, address: u64, bytes: &mut [u8]) -> Result<(), u64> {
        bytes.copy_from_slice(self.at(address, bytes.len())?);
        Ok(())
    }

    fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), u64> {
        self.at(address, bytes.len())?.copy_from_slice(bytes);
        Ok(())
    }
}

/// MASKMOVDQU and MASKMOVQ, whose address is in RDI.
fn implied_address(random: &mut Random, code: Code) -> Option<Instruction> {
    let (first, count) = match code {
        Code::Maskmovdqu_rDI_xmm_xmm | Code::VEX_Vmaskmovdqu_rDI_xmm_xmm => (Register::XMM0, 16),
        Code::Maskmovq_rDI_mm_mm => (Register::MM0, 8),
        _ => return None,
    };
    let mut instruction = Instruction::new();
    instruction.set_code(code);
    instruction.set_op0_kind(OpKind::MemorySegRDI);
    for operand in [1, 2] {
        instruction.set_op_kind(operand, OpKind::Register);
        instruction.set_op_register(operand, first + random.below(count) as u32);
    }
    Some(instruction)
}

/// Makes all addresses that the instruction forms lie in the window.
fn aim(instruction: &mut Instruction, machine: &mut Machine, address: u64) {
    machine.gprs[Register::RDI.number()] = address;
    if instruction.op0_kind() == OpKind::MemorySegRDI {
        return;
    }
    machine.gprs[Register::RBX.number()] = address + 64;
    machine.gprs[Register::RSI.number()] = 0;
    instruction.set_memory_displacement64(0);
    let index = instruction.memory_index();
    if index.is_vector_register() {
        // From -8 to 7, so that times 8 they stay inside.
        let wide = instruction
            .code()
            .op_code()
            .op_kinds()
            .iter()
            .any(|kind| format!("{kind:?}").contains("vsib64"));
        for element in machine.ymm[index.number()].chunks_mut(if wide { 8 } else { 4 }) {
            let small = i64::from(element[0] % 16) - 8;
            let len = element.len();
            element.copy_from_slice(&small.to_le_bytes()[..len]);
        }
    }
}

#[test]
fn masked_accesses_do_what_the_processor_does() {
    let mut random = Random::new(0x9a7e);
    let mut direct = Direct::new();
    let mut forms = 0;
    for code in Code::values() {
        let built = |random: &mut Random| {
            implied_address(random, code).or_else(|| random.instruction(code, true))
        };
        for _ in 0..60 {
            let Some(mut instruction) = built(&mut random) else {
                break;
            };
            let mut before = random.machine();
            before.fxsave[2] = 0;
            aim(&mut instruction, &mut before, direct.memory_address());
            // A gather that names a register twice does not survive this.
            let Some(instruction) = through_bytes(&instruction) else {
                continue;
            };
            let Some(masked) = Masked::decode(&instruction) else {
                break;
            };
            forms += 1;
            let mut wanted = before.clone();
            let prepared = direct.prepare_as_is(&instruction);
            assert_eq!(
                direct.run(&prepared, &mut wanted),
                End::Done,
                "{instruction}"
            );

            let mut got = before.clone();
            let state = state_of(&got, &mut random);
            let mut guest = Window {
                state,
                gprs: got.gprs,
                memory: &mut got.memory,
                address: direct.memory_address(),
            };
            assert_eq!(masked.exec(&mut guest), Ok(()), "{instruction}");
            got.ymm = guest.state.ymm;
            let image = guest.state.x87();
            got.fxsave[..24].copy_from_slice(&image[..24]);
            got.fxsave[32..160].copy_from_slice(&image[32..]);
            assert_eq!(difference(&got, &wanted), "", "{instruction}");
        }
    }
    assert!(forms > 100, "{forms} instances");
}
