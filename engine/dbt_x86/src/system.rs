//! What kernels do often, inline: SYSCALL, SYSRET, STAC, CLAC, the bases of FS and GS, and bits in memory by number.
//!
//! Transfers write the segment registers and RFLAGS. What the interpreter derives from these ([`lodger_interp::Cpu::update_mode`]) is brought up to date
//! when code is left, by [`crate::run`]. What is unusual is the interpreter's. The definition of each is in the interpreter.

use iced_x86::{Code, Instruction, MemoryOperand, Register as R};
use lodger_interp::seg;
use lodger_softmmu::MmuIndex;
use lodger_x86::bits::{RFlags, STATUS_FLAGS, efer};

use crate::check::Address;
use crate::emit::{Mem, Op, RAX, RCX, S, T, abs, at, cc};
use crate::exits::Rare;
use crate::insn::{Insn, is_stolen};
use crate::special::low;
use crate::translate::{Block, Site, Unencodable};

/// Attributes of flat 64-bit code and flat stack segments of ring 0.
const CODE: u32 = 0xa09b;
const STACK: u32 = 0xc093;

const IF: u32 = RFlags::IF.bits() as u32;
const AC: u32 = RFlags::AC.bits() as u32;
const FIXED: i32 = RFlags::FIXED.bits() as i32;

/// Where a value is.
#[derive(Clone, Copy)]
enum Place {
    Register(R),
    Memory(MemoryOperand),
}

impl Block<'_> {
    /// Leaves the instruction to the interpreter if `condition`.
    fn unusual(&mut self, condition: u8, site: Site) {
        let jump = self.code.jcc_forward(condition);
        self.stub(jump, Rare::Leave, site);
    }

    /// Unless SYSCALL and SYSRET are enabled, and the jump tables of the other privilege hold 64-bit code.
    fn check_enabled(&mut self, site: Site) {
        let to_user = self.source.mode.is_ring0();
        self.code.cmp_zero32(abs(self.layout.narrow(to_user)));
        self.unusual(cc::NE, site);
        let efer = low(self.layout.efer());
        let enabled = efer::SCE as u32;
        self.asm([Instruction::with2(Code::Test_rm32_imm32, efer, enabled)]);
        self.unusual(cc::E, site);
    }

    /// Unless the address in `register` is canonical. T is destroyed.
    fn check_canonical(&mut self, register: R, site: Site) {
        self.asm([
            Instruction::with2(Code::Mov_r64_rm64, R::R10, register),
            Instruction::with2(Code::Shl_rm64_imm8, R::R10, 16_u32),
            Instruction::with2(Code::Sar_rm64_imm8, R::R10, 16_u32),
            Instruction::with2(Code::Cmp_r64_rm64, R::R10, register),
        ]);
        self.unusual(cc::NE, site);
    }

    /// CS and SS become flat segments of privilege `level`: CS with the selector in EAX, SS with one that is `distance` away.
    fn flat_segments(&mut self, level: u32, distance: i32) {
        for (number, attributes) in [(seg::CS, CODE), (seg::SS, STACK)] {
            let (layout, number) = (self.layout, usize::from(number));
            let attributes = attributes | level << 5;
            self.asm([
                Instruction::with2(Code::And_rm32_imm8, R::EAX, !3_i32),
                Instruction::with2(Code::Or_rm32_imm8, R::EAX, level as i32),
                Instruction::with2(Code::Mov_rm16_r16, low(layout.selector(number)), R::AX),
                Instruction::with2(
                    Code::Mov_rm16_imm16,
                    low(layout.segment_attributes(number)),
                    attributes,
                ),
                Instruction::with2(
                    Code::Mov_rm32_imm32,
                    low(layout.segment_limit(number)),
                    u32::MAX,
                ),
                Instruction::with2(
                    Code::Mov_rm64_imm32,
                    low(layout.segment_base(number)),
                    0_i32,
                ),
            ]);
            if number == usize::from(seg::CS) {
                self.asm([Instruction::with2(Code::Add_rm32_imm8, R::EAX, distance)]);
            }
        }
    }

    /// RFLAGS becomes T, of which the status flags are saved. RAX is destroyed.
    fn store_rflags(&mut self) {
        self.asm([
            Instruction::with2(Code::Or_rm64_imm8, R::R10, FIXED),
            Instruction::with2(Code::Mov_rm64_r64, low(self.layout.rflags()), R::R10),
            Instruction::with2(Code::Mov_r32_rm32, R::EAX, R::R10D),
            Instruction::with2(Code::Shl_rm32_imm8, R::EAX, 8_u32),
            Instruction::with2(Code::Bt_rm32_imm8, R::R10D, 11_u32),
            Instruction::with1(Code::Setb_rm8, R::AL),
            Instruction::with2(Code::Mov_rm16_r16, low(self.layout.flags()), R::AX),
        ]);
    }

    /// SYSCALL in user code.
    pub fn system_call(&mut self, i: &Instruction, site: Site) {
        let layout = self.layout;
        let value = abs(layout.value());
        self.save_flags();
        self.check_enabled(site);
        // Ring 0 with AC set has other rights.
        let flags = low(layout.rflags());
        self.asm([Instruction::with2(Code::Test_rm32_imm32, flags, AC)]);
        self.unusual(cc::NE, site);
        self.code.op(Op::Mov, S, abs(layout.lstar()));
        self.check_canonical(R::R11, site);
        self.code.op(Op::Store, RAX, value);
        self.assemble_rflags(!(STATUS_FLAGS | RFlags::RF.bits()) as u32);
        self.code.op(Op::Store, RAX, abs(layout.register(11)));
        self.asm([
            Instruction::with2(Code::Mov_r32_rm32, R::R10D, low(layout.sfmask())),
            Instruction::with1(Code::Not_rm32, R::R10D),
            Instruction::with2(Code::And_r32_rm32, R::R10D, R::EAX),
        ]);
        self.store_rflags();
        self.asm([Instruction::with2(
            Code::Mov_r32_rm32,
            R::EAX,
            low(layout.star() + 4),
        )]);
        self.flat_segments(0, 8);
        self.code.op(Op::Mov, RAX, value);
        self.code.mov_imm(RCX, i.next_ip());
        self.jump_to(MmuIndex::Kernel);
    }

    /// SYSRET to 64-bit code in ring 0.
    pub fn system_return(&mut self, site: Site) {
        let layout = self.layout;
        let value = abs(layout.value());
        let plain = (RFlags::IF | RFlags::DF | RFlags::ID | RFlags::FIXED).bits() | STATUS_FLAGS;
        self.save_flags();
        self.check_enabled(site);
        self.check_canonical(R::RCX, site);
        self.code.op(Op::Mov, T, abs(layout.register(11)));
        self.asm([Instruction::with2(
            Code::Test_rm64_imm32,
            R::R10,
            !plain as i32,
        )]);
        self.unusual(cc::NE, site);
        // An interrupt that waits for IF comes first.
        self.asm([Instruction::with2(Code::Test_rm32_imm32, R::R10D, IF)]);
        let off = self.code.jcc_forward(cc::E);
        self.code.cmp_zero32(abs(layout.waiting()));
        self.unusual(cc::NE, site);
        self.code.land(off);
        self.code.op(Op::Store, RAX, value);
        self.store_rflags();
        self.asm([
            Instruction::with2(Code::Movzx_r32_rm16, R::EAX, low(layout.star() + 6)),
            Instruction::with2(Code::Add_rm32_imm8, R::EAX, 16_i32),
        ]);
        self.flat_segments(3, -8);
        self.code.op(Op::Mov, RAX, value);
        let behind = self.code.lea_forward(S);
        self.code.jmp(self.routines.load_vectors);
        self.code.land(behind);
        self.code.mov(S, RCX);
        self.jump_to(MmuIndex::User);
    }

    /// CLD.
    pub fn clear_direction(&mut self) {
        let flags = abs(self.layout.rflags());
        self.code.op(Op::Mov, T, flags);
        self.clear_bits(self.layout.no_df_mask());
        self.code.op(Op::Store, T, flags);
    }

    /// MOV from CR0, CR2, CR3, CR4 in ring 0.
    pub fn read_control(&mut self, i: &Instruction, number: usize) {
        let register = i.op0_register();
        let place = low(self.layout.control(number));
        let host = self.scratch_for(register);
        self.asm([Instruction::with2(Code::Mov_r64_rm64, host, place)]);
        self.store_for(register);
    }

    /// RDTSC and RDTSCP: time is not ours to look at.
    pub fn read_time(&mut self, i: &Instruction, aux: bool) {
        let number = self.sites.len();
        self.leave_at(Site::Time {
            rip: i.ip(),
            resume: 0,
            aux,
        });
        let here = self.code.here() as u32;
        if let Site::Time { resume, .. } = &mut self.sites[number] {
            *resume = here;
        }
    }

    /// STAC and CLAC in ring 0.
    pub fn set_access(&mut self, i: &Instruction, on: bool) {
        let flags = abs(self.layout.rflags());
        self.code.op(Op::Mov, T, flags);
        self.clear_bits(self.layout.no_ac_mask());
        if on {
            self.code.op(Op::Lea, T, at(T, AC as i32));
        }
        self.code.op(Op::Store, T, flags);
        let index = match on && self.source.mode.smap {
            true => MmuIndex::KernelAc,
            false => MmuIndex::Kernel,
        };
        self.far_to(index, i.next_ip());
    }

    /// BT and its like on the bit of memory that a register numbers, counted from the operand's address on.
    pub fn bit(&mut self, insn: &Insn, size: u8, write: bool) -> Result<(), Unencodable> {
        let i = &insn.instruction;
        let number = i.op1_register();
        let log = size.ilog2() as u8;
        self.group = None;
        if insn.live != 0 {
            self.save_flags();
        }
        self.address(Address::Operand(i));
        // The element: the number is signed.
        let place = match is_stolen(number) {
            true => Place::Memory(low(self.layout.register(number.full_register().number()))),
            false => Place::Register(number),
        };
        self.code.mov_imm(T, u64::from(log) + 3);
        let (code, t) = match size {
            8 => (Code::VEX_Sarx_r64_rm64_r64, R::R10),
            _ => (Code::VEX_Sarx_r32_rm32_r32, R::R10D),
        };
        self.asm([match place {
            Place::Register(number) => Instruction::with3(code, t, number, t),
            Place::Memory(number) => Instruction::with3(code, t, number, t),
        }]);
        if size == 4 {
            self.asm([Instruction::with2(Code::Movsxd_r64_rm32, R::R10, R::R10D)]);
        }
        let element = Mem {
            base: Some(S),
            index: Some(T),
            scale: log,
            disp: 0,
        };
        self.code.op(Op::Lea, S, element);
        self.look_up(Address::Register(S, 0), size, write, true, insn.live);
        self.before_operation(insn);
        // The bit's number in it.
        let number = self.get(number, T);
        self.code.pext(T, number, self.layout.bit_mask(size));
        let mut host = *i;
        host.set_memory_base(R::R11);
        host.set_memory_index(R::None);
        host.set_memory_index_scale(1);
        host.set_memory_displacement64(0);
        host.set_memory_displ_size(0);
        host.set_segment_prefix(R::None);
        host.set_op1_register(t);
        self.note_trap(i);
        self.encode(&host)?;
        self.after_operation(insn);
        Ok(())
    }

    /// RDFSBASE and RDGSBASE.
    pub fn read_base(&mut self, i: &Instruction, segment: usize) {
        let register = i.op0_register();
        let base = low(self.layout.segment_base(segment));
        let code = match register.size() {
            8 => Code::Mov_r64_rm64,
            _ => Code::Mov_r32_rm32,
        };
        let host = self.scratch_for(register);
        self.asm([Instruction::with2(code, host, base)]);
        self.store_for(register);
    }

    /// WRFSBASE and WRGSBASE of an address in the lower half.
    pub fn write_base(&mut self, i: &Instruction, segment: usize, site: Site) {
        let register = i.op0_register();
        let value = self.get(register, S);
        match register.size() {
            8 => self.code.mov(S, value),
            _ => self.code.mov32(S, value),
        }
        let c = &mut *self.code;
        c.mov(T, RCX);
        c.pext(RCX, S, self.layout.upper_mask());
        let lower = c.jrcxz();
        c.mov(RCX, T);
        let jump = c.jmp_forward();
        c.land(lower);
        c.mov(RCX, T);
        self.stub(jump, Rare::Leave, site);
        let base = self.layout.segment_base(segment);
        self.code.op(Op::Store, S, abs(base));
        let base = self.layout.bases + 8 * segment as u32;
        self.code.op(Op::Store, S, abs(base));
    }
}
