//! A guest block to host code.
//!
//! Guest registers are in the host registers of the same name, but R10 and R11, which are in memory: their host registers are scratch, T and
//! S here. RSP is the guest's too, so nothing is ever pushed. Flags are in the flags register or, from the first lookup that destroys it
//! on, in memory. Every memory operand is looked up in the TLB first.
//!
//! An instruction changes nothing before all of its lookups have hit, so it can be interpreted instead at any miss.

use std::collections::HashSet;
use std::ops::Range;

use iced_x86::{
    Code, Decoder, DecoderError, DecoderOptions, Encoder, Instruction, InstructionInfoFactory,
    Mnemonic, OpKind, Register,
};
use lodger_softmmu::MmuIndex;

use crate::check::Address;
use crate::emit::{Code as HostCode, Mem, Op, RBP, RSP, Reg, S, T, abs, at};
use crate::env::Layout;
use crate::exits::Stub;
use crate::flags::Flags;
use crate::group::{Group, Kept};
use crate::insn::{FLAGS, Insn, Kind, Simd, is_stolen};
use crate::routines::Routines;

/// Instructions of a block, at most.
const MAX_INSNS: usize = 48;
/// Rounds of a loop in a block, at most.
const ROUNDS: usize = 4;
/// Instructions that are looked at to find out which flags are needed.
const AHEAD: usize = 10;

/// What to do when the code is left at a place.
#[derive(Debug, Clone, Copy)]
pub enum Site {
    /// Go on at `target`; the jump at `patch` may lead there directly.
    Direct {
        target: u64,
        /// Host address of the jump's distance, and of the stub that it leads to now.
        patch: u32,
        stub: u32,
        /// Host addresses of code that restores the flags first, and of the distance of the jump behind it.
        restoring: Option<(u32, u32)>,
        /// It leaves the page.
        leaves_page: bool,
        /// To code that looks up each access alone.
        alone: bool,
    },
    /// Interpret the instruction at `rip`.
    Interpret {
        rip: u64,
        code: Code,
        /// It uses vector registers.
        vector: bool,
        rest: u8,
    },
    /// There are requests in the midst of the repeated string instruction at `rip`.
    Repeat { rip: u64, rest: u8 },
    /// The access of the instruction at `rip` missed the TLB; the address of the range that was looked up is in S. Try again at `retry` when that is better.
    Access {
        rip: u64,
        retry: u32,
        /// Host address of the code behind the lookup.
        resume: u32,
        size: u8,
        write: bool,
        /// Address of its own entry.
        entry: Option<u32>,
        range: Span,
        /// Instructions of the block from this one on, if ticks are counted.
        rest: u8,
    },
    /// RDTSC, and with `aux` RDTSCP, at `rip`; the code behind it is at `resume`.
    Time { rip: u64, resume: u32, aux: bool },
    /// There are requests; go on at `rip`.
    Requests { rip: u64 },
    /// An indirect jump of the instruction at `rip`; to undo it, `undo` is to be added to RSP.
    Indirect { rip: u64, undo: i64 },
    /// The tick limit is nearer than the end of the block at `rip`, which has so many instructions.
    Limit { rip: u64, total: u8 },
}

/// What is looked up for an access.
#[derive(Debug, Clone, Copy)]
pub struct Span {
    /// Bytes of it before the access.
    pub skip: u16,
    /// Its bytes.
    pub len: u16,
    /// For writing, too.
    pub write: bool,
    /// In the stack's entry.
    pub stack: bool,
    /// A read may be from a copy.
    pub copied: bool,
}

/// The kind of code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Width {
    /// 64-bit mode.
    Bits64,
    /// 32-bit code with flat CS, SS, DS and ES; whether FS and GS, too, have no limit.
    Bits32 { fs: bool, gs: bool },
}

/// What the translation depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mode {
    pub width: Width,
    pub mmu: MmuIndex,
    pub simd: Simd,
    /// Ticks are counted.
    pub counted: bool,
    /// STAC and CLAC change what ring 0 may access.
    pub smap: bool,
    /// There are instructions for the bases of FS and GS.
    pub bases: bool,
    /// Each access is looked up alone: for where those that are looked up together are in different pages.
    pub alone: bool,
}

impl Mode {
    pub fn is_ring0(self) -> bool {
        self.mmu != MmuIndex::User
    }

    pub fn is_32(self) -> bool {
        self.width != Width::Bits64
    }

    /// Bytes that PUSH, POP, CALL and RET move.
    pub fn word(self) -> u8 {
        if self.is_32() { 4 } else { 8 }
    }

    pub fn bitness(self) -> u32 {
        u32::from(self.word()) * 8
    }
}

/// A block to be translated.
pub struct Source<'a> {
    /// Linear address.
    pub linear: u64,
    /// The whole page, and for an instruction that crosses its end some bytes of the next one.
    pub page: &'a [u8],
    /// The page is mapped in all address spaces.
    pub global: bool,
    pub mode: Mode,
    /// If the block is a loop, a pass is to hold several rounds.
    pub unroll: bool,
    /// Instructions whose accesses change pages often.
    pub wanderers: &'a HashSet<u64>,
}

/// A translated block.
pub struct Translated {
    /// Where other code jumps to.
    pub body: usize,
    /// Flags that must be in the register there.
    pub needs: u32,
    pub traps: Vec<Trap>,
    /// Offsets in the page of the code that the translation depends on: the block's own, and what tells which flags are needed.
    pub seen: Range<usize>,
    /// Bytes of guest code.
    pub len: usize,
    pub insns: usize,
}

/// An instruction on which the host may trap.
#[derive(Debug, Clone, Copy)]
pub struct Trap {
    /// Host address.
    pub place: u32,
    /// Its offset from the block's start.
    pub offset: u16,
    /// Instructions of the block from this one on, if ticks are counted.
    pub rest: u8,
    /// The flags are saved there.
    pub saved: bool,
}

/// What is kept between blocks.
pub struct Tools {
    encoder: Encoder,
    info: InstructionInfoFactory,
    insns: Vec<Insn>,
    exact_flags: bool,
}

impl Tools {
    pub fn new(exact_flags: bool) -> Tools {
        Tools {
            encoder: Encoder::new(64),
            info: InstructionInfoFactory::new(),
            insns: Vec::new(),
            exact_flags,
        }
    }
}

pub struct Block<'a> {
    tools: &'a mut Tools,
    pub layout: &'a Layout,
    pub source: &'a Source<'a>,
    pub routines: Routines,
    pub code: &'a mut HostCode,
    pub sites: &'a mut Vec<Site>,
    /// Entries of sites that are taken.
    pub entries: &'a mut usize,
    pub stubs: Vec<Stub>,
    traps: Vec<Trap>,
    pub flags: Flags,
    /// The block's instructions, and which is current.
    pub insns: Vec<Insn>,
    pub index: usize,
    /// What S holds.
    pub group: Option<Group>,
    pub kept: Kept,
    /// Instructions of the block, and of these not yet executed before the current one; zero if ticks are not counted.
    pub total: u8,
    pub rest: u8,
    seen: Range<usize>,
    /// The next instruction crosses the page's end.
    crossing_follows: bool,
}

/// The instruction cannot be encoded.
pub struct Unencodable;

impl<'a> Block<'a> {
    /// For code that will be at the end of `code`.
    pub fn new(
        tools: &'a mut Tools,
        layout: &'a Layout,
        source: &'a Source<'a>,
        routines: Routines,
        code: &'a mut HostCode,
        (sites, entries): (&'a mut Vec<Site>, &'a mut usize),
    ) -> Block<'a> {
        Block {
            tools,
            layout,
            source,
            routines,
            code,
            sites,
            entries,
            stubs: Vec::new(),
            traps: Vec::new(),
            flags: Flags::Register,
            insns: Vec::new(),
            index: 0,
            group: None,
            kept: Kept::default(),
            total: 0,
            rest: 0,
            seen: (source.linear & 0xfff) as usize..(source.linear & 0xfff) as usize,
            crossing_follows: false,
        }
    }

    /// Translates the block. `None`: not even its first instruction can be decoded within the page.
    pub fn translate(mut self) -> Option<Translated> {
        let mut insns = std::mem::take(&mut self.tools.insns);
        self.decode(&mut insns);
        let mut needs = 0;
        if !insns.is_empty() {
            self.find_live(&mut insns);
            needs = insns[0].live;
        }
        self.insns = insns;
        let translated = (!self.insns.is_empty()).then(|| self.emit());
        self.tools.insns = std::mem::take(&mut self.insns);
        let (body, len, count) = translated?;
        Some(Translated {
            body,
            needs,
            traps: self.traps,
            seen: self.seen,
            len,
            insns: count,
        })
    }

    fn decode(&mut self, insns: &mut Vec<Insn>) {
        insns.clear();
        let start = (self.source.linear & 0xfff) as usize;
        let bytes = &self.source.page[start..];
        let mut decoder = Decoder::with_ip(
            self.source.mode.bitness(),
            bytes,
            self.source.linear,
            DecoderOptions::NONE,
        );
        let mut instruction = Instruction::default();
        let most = match self.source.page.len() {
            4096 => MAX_INSNS,
            _ => 1,
        };
        while insns.len() < most && decoder.can_decode() {
            decoder.decode_out(&mut instruction);
            if decoder.last_error() == DecoderError::NoMoreBytes {
                self.crossing_follows = true;
                break;
            }
            self.saw(&instruction);
            let insn = Insn::new(&instruction, &mut self.tools.info, self.source.mode);
            insns.push(insn);
            if insn.ends_block() {
                break;
            }
        }
        // The instruction behind STI must come before any interrupt, so it must be executed right after it.
        for n in 0..insns.len() {
            let next = insns.get(n + 1).map(|next| next.kind);
            if insns[n].kind == Kind::SetInterrupts
                && matches!(
                    next,
                    None | Some(
                        Kind::Interpret
                            | Kind::Repeat { .. }
                            | Kind::SetInterrupts
                            | Kind::SystemReturn
                    )
                )
            {
                insns[n].kind = Kind::Interpret;
                insns.truncate(n + 1);
                break;
            }
        }
        if self.source.unroll {
            self.unroll(insns);
        }
    }

    /// If the block begins with a whole loop, and groups may profit: makes it several rounds of that.
    fn unroll(&self, insns: &mut Vec<Insn>) {
        let loops = |insn: &Insn| insn.kind == Kind::Branch(self.source.linear);
        let Some(last) = insns.iter().position(loops) else {
            return;
        };
        let round = last + 1;
        let rounds = (MAX_INSNS / round).min(ROUNDS);
        let simple = insns[..round].iter().all(Insn::keeps_groups);
        let accesses = insns[..round].iter().any(|insn| insn.member().is_some());
        if rounds > 1 && simple && accesses {
            insns.truncate(round);
            insns[last].goes_on = true;
            for _ in 1..rounds {
                insns.extend_from_within(..round);
            }
            insns.last_mut().expect("not empty").goes_on = false;
        }
    }

    /// The translation depends on this instruction.
    fn saw(&mut self, instruction: &Instruction) {
        let start = (instruction.ip() & 0xfff) as usize;
        self.seen.start = self.seen.start.min(start);
        self.seen.end = self.seen.end.max(start + instruction.len());
    }

    /// Flags that code at `target` needs, as far as it is known.
    pub fn ahead(&mut self, target: u64, depth: u32) -> u32 {
        if self.tools.exact_flags || (target ^ self.source.linear) >> 12 != 0 {
            return FLAGS;
        }
        let bytes = &self.source.page[(target & 0xfff) as usize..];
        let mut decoder = Decoder::with_ip(
            self.source.mode.bitness(),
            bytes,
            target,
            DecoderOptions::NONE,
        );
        let mut needed = 0;
        let mut open = FLAGS;
        for _ in 0..AHEAD {
            if !decoder.can_decode() {
                break;
            }
            let instruction = decoder.decode();
            if decoder.last_error() == DecoderError::NoMoreBytes {
                break;
            }
            self.saw(&instruction);
            let insn = Insn::new(&instruction, &mut self.tools.info, self.source.mode);
            needed |= insn.live_before(0) & open;
            if insn.kind == Kind::Interpret {
                return needed;
            }
            open &= insn.live_before(FLAGS);
            if open & !needed == 0 {
                return needed;
            }
            match insn.kind {
                Kind::Jump(to) | Kind::Call(to) if depth > 0 => {
                    return needed | open & self.ahead(to, depth - 1);
                }
                Kind::Branch(to) | Kind::ShortBranch(to) if depth > 0 => {
                    needed |= open & self.ahead(to, depth - 1);
                }
                Kind::Branch(_) | Kind::ShortBranch(_) => return needed | open,
                _ if insn.ends_block() => return needed | open,
                _ => {}
            }
        }
        needed | open
    }

    /// Which flags are needed before each instruction.
    fn find_live(&mut self, insns: &mut [Insn]) {
        let last = insns.last().expect("not empty");
        let mut live = match last.kind {
            Kind::Jump(to) | Kind::Call(to) => self.ahead(to, 2),
            _ if last.ends_block() => FLAGS,
            _ => self.ahead(last.instruction.next_ip(), 2),
        };
        for insn in insns.iter_mut().rev() {
            if let Kind::Branch(to) | Kind::ShortBranch(to) = insn.kind {
                let other = match insn.goes_on {
                    true => insn.instruction.next_ip(),
                    false => to,
                };
                live |= self.ahead(other, 2);
            }
            insn.live_after = live;
            live = if self.tools.exact_flags {
                FLAGS
            } else {
                insn.live_before(live)
            };
            insn.live = live;
        }
    }

    /// Emits everything; the body's address, and the bytes and number of guest instructions.
    fn emit(&mut self) -> (usize, usize, usize) {
        let start = self.source.linear;
        self.prologue(self.insns[0].live);
        let body = self.code.here();
        if self.source.mode.counted {
            self.charge();
        }
        let mut ended = false;
        let mut end = start;
        let mut count = 0;
        for index in 0..self.insns.len() {
            self.index = index;
            let insn = &self.insns[index].clone();
            let (length, stubs, flags) = (self.code.bytes.len(), self.stubs.len(), self.flags);
            end = insn.instruction.next_ip();
            count += 1;
            if self.insn(insn).is_err() {
                self.code.bytes.truncate(length);
                self.stubs.truncate(stubs);
                self.flags = flags;
                self.group = None;
                self.leave_at(self.interpret(insn));
                ended = true;
                break;
            }
            ended = insn.ends_block();
            self.keep_groups(insn);
            self.rest = self.rest.saturating_sub(1);
        }
        if !ended {
            if self.crossing_follows && !self.source.global {
                // What follows depends on the mapping of two pages.
                self.far(end);
            } else {
                let live = self.ahead(end, 1);
                self.go(end, end, live);
            }
        }
        self.emit_stubs();
        (body, end.wrapping_sub(start) as usize, count)
    }

    /// Loads guest register `number` (10 or 11) into T or S.
    fn load(&mut self, to: Reg, number: usize) {
        self.code.op(Op::Mov, to, abs(self.layout.register(number)));
    }

    fn store(&mut self, number: usize, from: Reg) {
        self.code
            .op(Op::Store, from, abs(self.layout.register(number)));
    }

    /// The host register that holds 64-bit guest `register`, which is loaded into `scratch` if need be.
    pub fn get(&mut self, register: Register, scratch: Reg) -> Reg {
        let number = register.full_register().number();
        if is_stolen(register) {
            self.load(scratch, number);
            return scratch;
        }
        Reg(number as u8)
    }

    /// The guest's own bytes.
    fn copy(&mut self, i: &Instruction) {
        let start = (i.ip() & 0xfff) as usize;
        let page = self.source.page;
        self.code.raw(&page[start..start + i.len()]);
    }

    /// The host may trap on the instruction that comes next.
    pub fn note_trap(&mut self, i: &Instruction) {
        self.traps.push(Trap {
            place: self.code.here() as u32,
            offset: i.ip().wrapping_sub(self.source.linear) as u16,
            rest: self.rest,
            saved: self.flags == Flags::Saved,
        });
    }

    fn insn(&mut self, insn: &Insn) -> Result<(), Unencodable> {
        let i = &insn.instruction;
        let (live, rip) = (insn.live, i.ip());
        let size = self.source.mode.word();
        let word = i32::from(size);
        match insn.kind {
            Kind::Nothing => {}
            Kind::Interpret => self.leave_at(Site::Interpret {
                rip,
                code: i.code(),
                vector: insn.vector,
                rest: 0,
            }),
            Kind::Registers => self.registers(insn)?,
            Kind::Constant(value) if is_stolen(i.op0_register()) => {
                self.code.mov_imm(S, value);
                self.store(i.op0_register().number(), S);
            }
            Kind::Constant(value) => self
                .code
                .mov_imm(Reg(i.op0_register().number() as u8), value),
            Kind::Memory { size, write } => self.memory(insn, size, write)?,
            Kind::Push(register) => {
                let place = self.check(Address::Register(RSP, -word), size, true, live);
                let value = self.get(register, T);
                self.note_trap(i);
                self.word(Op::Store, value, place);
                self.word(Op::Lea, RSP, at(RSP, -word));
            }
            Kind::PushImmediate(value) => {
                let place = self.check(Address::Register(RSP, -word), size, true, live);
                self.note_trap(i);
                self.store_word(place, value);
                self.word(Op::Lea, RSP, at(RSP, -word));
            }
            Kind::PushMemory => {
                self.read_value(i, live);
                let place = self.check(Address::Register(RSP, -word), size, true, live);
                self.code.op(Op::Mov, T, abs(self.layout.value()));
                self.note_trap(i);
                self.word(Op::Store, T, place);
                self.word(Op::Lea, RSP, at(RSP, -word));
            }
            Kind::Pop(register) => {
                let place = self.check(Address::Register(RSP, 0), size, false, live);
                let number = register.number();
                self.note_trap(i);
                if is_stolen(register) {
                    self.code.op(Op::Mov, T, place);
                    self.store(number, T);
                } else {
                    self.word(Op::Mov, Reg(number as u8), place);
                }
                if register.full_register() != Register::RSP {
                    self.word(Op::Lea, RSP, at(RSP, word));
                }
            }
            Kind::Leave => {
                let place = self.check(Address::Register(RBP, 0), size, false, live);
                self.word(Op::Lea, RSP, at(RBP, word));
                self.word(Op::Mov, RBP, place);
            }
            Kind::MoveSegment(number) => self.move_segment(i.op0_register(), number),
            Kind::PushFlags => self.push_flags(i),
            Kind::PopFlags => self.pop_flags(i, self.interpret(insn), live),
            Kind::ClearInterrupts => self.clear_interrupts(),
            Kind::SetInterrupts => self.set_interrupts(self.interpret(insn)),
            Kind::SwapGs => self.swap_gs(),
            Kind::SystemCall => self.system_call(i, self.interpret(insn)),
            Kind::SystemReturn => self.system_return(self.interpret(insn)),
            Kind::ClearDirection => self.clear_direction(),
            Kind::ReadControl(number) => self.read_control(i, number),
            Kind::ReadTime { aux } => self.read_time(i, aux),
            Kind::SetAccess(on) => self.set_access(i, on),
            Kind::BitMemory { size, write } => self.bit(insn, size, write)?,
            Kind::ReadBase(segment) => self.read_base(i, segment),
            Kind::WriteBase(segment) => self.write_base(i, segment, self.interpret(insn)),
            Kind::Repeat { log, moves } => {
                if live != 0 {
                    self.save_flags();
                }
                self.repeat(i, log, moves, self.interpret(insn));
            }
            Kind::Branch(target) => {
                self.before_operation(insn);
                let condition = i.condition_code() as u8 - 1;
                match insn.goes_on {
                    true => self.branch(condition ^ 1, i.next_ip(), rip),
                    false => self.branch(condition, target, rip),
                }
            }
            Kind::ShortBranch(target) => {
                self.before_operation(insn);
                let live = self.ahead(target, 2);
                let start = (rip & 0xfff) as usize;
                let page = self.source.page;
                if self.source.mode.is_32() {
                    // By ECX.
                    self.code.raw(&[0x67]);
                }
                self.code.raw(&page[start..start + i.len() - 1]);
                self.code.raw(&[0]);
                let taken = self.code.short();
                let over = self.code.jmp_forward();
                self.code.land(taken);
                self.refund(self.rest.saturating_sub(1));
                self.aside(|block| block.go(target, rip.wrapping_add(1), live));
                self.code.land(over);
            }
            Kind::Jump(target) => {
                let live = self.ahead(target, 2);
                self.go(target, rip.wrapping_add(1), live);
            }
            Kind::Call(target) => {
                let place = self.check(Address::Register(RSP, -word), size, true, live);
                self.push_return(i, place);
                let live = self.ahead(target, 2);
                self.go(target, rip, live);
            }
            Kind::JumpRegister(register) => {
                self.save_flags();
                let number = register.number();
                match is_stolen(register) {
                    true => self.load(S, number),
                    false if self.source.mode.is_32() => self.code.mov32(S, Reg(number as u8)),
                    false => self.code.mov(S, Reg(number as u8)),
                }
                self.indirect(rip, 0);
            }
            Kind::JumpMemory => {
                self.save_flags();
                let place = self.check(Address::Operand(i), size, false, live);
                self.note_trap(i);
                self.word(Op::Mov, S, place);
                self.indirect(rip, 0);
            }
            Kind::CallRegister(register) => {
                self.save_flags();
                // The target may be RSP or a register that is in memory.
                let mut target = self.get(register, T);
                if self.source.mode.is_32() {
                    self.code.mov32(T, target);
                    target = T;
                }
                self.code.op(Op::Store, target, abs(self.layout.value()));
                self.call_value(i, live, rip);
            }
            Kind::CallMemory => {
                self.save_flags();
                self.read_value(i, live);
                self.call_value(i, live, rip);
            }
            Kind::Return(release) => {
                self.save_flags();
                let place = self.check(Address::Register(RSP, 0), size, false, live);
                let by = word + i32::from(release);
                self.note_trap(i);
                self.word(Op::Mov, S, place);
                self.word(Op::Lea, RSP, at(RSP, by));
                self.indirect(rip, -i64::from(by));
            }
        }
        Ok(())
    }

    /// The site that leaves an instruction to the interpreter after all.
    fn interpret(&self, insn: &Insn) -> Site {
        Site::Interpret {
            rip: insn.instruction.ip(),
            code: insn.instruction.code(),
            vector: insn.vector,
            rest: self.rest,
        }
    }

    /// An operation on what PUSH and POP move.
    fn word(&mut self, op: Op, register: Reg, place: Mem) {
        match self.source.mode.is_32() {
            true => self.code.op32(op, register, place),
            false => self.code.op(op, register, place),
        }
    }

    fn store_word(&mut self, place: Mem, value: i32) {
        match self.source.mode.is_32() {
            true => self.code.store_imm32(place, value as u32),
            false => self.code.store_imm(place, value),
        }
    }

    /// Reads the memory operand, a code or stack word, into `Env::value`.
    fn read_value(&mut self, i: &Instruction, live: u32) {
        let place = self.check(Address::Operand(i), self.source.mode.word(), false, live);
        self.note_trap(i);
        self.word(Op::Mov, T, place);
        self.code.op(Op::Store, T, abs(self.layout.value()));
    }

    fn call_value(&mut self, i: &Instruction, live: u32, rip: u64) {
        let size = self.source.mode.word();
        let place = self.check(Address::Register(RSP, -i32::from(size)), size, true, live);
        // What the return address replaces, in case that the target is found to be not canonical.
        self.note_trap(i);
        self.word(Op::Mov, T, place);
        self.code.op(Op::Store, T, abs(self.layout.replaced()));
        self.push_return(i, place);
        self.code.op(Op::Mov, S, abs(self.layout.value()));
        self.indirect(rip, size.into());
    }

    /// Pushes the return address of a call to `place`.
    fn push_return(&mut self, call: &Instruction, place: Mem) {
        let address = call.next_ip();
        let value = match self.source.mode.is_32() {
            true => Ok(address as i32),
            false => i32::try_from(address as i64),
        };
        match value {
            Ok(value) => {
                self.note_trap(call);
                self.store_word(place, value);
            }
            Err(_) => {
                self.code.mov_imm(T, address);
                self.note_trap(call);
                self.code.op(Op::Store, T, place);
            }
        }
        let word = i32::from(self.source.mode.word());
        self.word(Op::Lea, RSP, at(RSP, -word));
    }

    /// An instruction without memory.
    fn registers(&mut self, insn: &Insn) -> Result<(), Unencodable> {
        let i = &insn.instruction;
        let operands = |n| {
            (0..i.op_count())
                .any(|o| i.op_kind(o) == OpKind::Register && i.op_register(o).full_register() == n)
        };
        let address = |n: Register| {
            i.mnemonic() == Mnemonic::Lea
                && (i.memory_base().full_register() == n || i.memory_index().full_register() == n)
        };
        let stolen = [(Register::R10, T, 10), (Register::R11, S, 11)];
        self.before_operation(insn);
        for (register, scratch, number) in stolen {
            if operands(register) || address(register) {
                self.load(scratch, number);
            }
        }
        if insn.traps {
            self.note_trap(i);
        }
        match self.source.mode.is_32() {
            // Some encodings are others in 64-bit mode.
            true => self.encode(i)?,
            false => self.copy(i),
        }
        self.after_operation(insn);
        for (register, scratch, number) in stolen {
            if operands(register) {
                self.store(number, scratch);
            }
        }
        Ok(())
    }

    /// Emits an instruction.
    pub fn encode(&mut self, instruction: &Instruction) -> Result<(), Unencodable> {
        let address = self.code.here() as u64;
        let result = self.tools.encoder.encode(instruction, address);
        let mut bytes = self.tools.encoder.take_buffer();
        if result.is_ok() {
            self.code.raw(&bytes);
        }
        bytes.clear();
        self.tools.encoder.set_buffer(bytes);
        result.map(|_| ()).map_err(|_| Unencodable)
    }

    /// The host register of guest `register`: a scratch register if that is in memory.
    pub fn scratch_for(&self, register: Register) -> Register {
        if register.full_register() != Register::R11 {
            return register;
        }
        match register.size() {
            8 => Register::R10,
            4 => Register::R10D,
            2 => Register::R10W,
            _ => Register::R10L,
        }
    }

    /// Loads it if need be.
    pub fn load_for(&mut self, register: Register) {
        if is_stolen(register) {
            self.load(T, register.full_register().number());
        }
    }

    /// Stores it if need be.
    pub fn store_for(&mut self, register: Register) {
        if is_stolen(register) {
            self.store(register.full_register().number(), T);
        }
    }

    /// An instruction with a memory operand.
    fn memory(&mut self, insn: &Insn, size: u8, write: bool) -> Result<(), Unencodable> {
        let i = &insn.instruction;
        let place = self.check(Address::Operand(i), size, write, insn.live);
        let mut host = *i;
        let register = |reg: Reg| Register::RAX + u32::from(reg.0);
        host.set_memory_base(place.base.map_or(Register::None, register));
        host.set_memory_index(place.index.map_or(Register::None, register));
        host.set_memory_index_scale(1 << place.scale);
        host.set_memory_displacement64(place.disp as u64);
        host.set_memory_displ_size(u32::from(place.disp != 0));
        host.set_segment_prefix(Register::None);
        let mut data = None;
        for n in 0..i.op_count() {
            if i.op_kind(n) != OpKind::Register || !is_stolen(i.op_register(n)) {
                continue;
            }
            let register = i.op_register(n);
            data = Some(register.full_register().number());
            host.set_op_register(n, self.scratch_for(register));
        }
        self.before_operation(insn);
        if let Some(number) = data {
            self.load(T, number);
        }
        if insn.traps {
            self.note_trap(i);
        }
        self.encode(&host)?;
        self.after_operation(insn);
        let writes = i.op0_kind() == OpKind::Register
            || matches!(i.mnemonic(), Mnemonic::Xchg | Mnemonic::Xadd);
        if let Some(number) = data
            && writes
        {
            self.store(number, T);
        }
        Ok(())
    }
}
