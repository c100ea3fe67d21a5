//! How a block is entered and left: through a jump table, by a direct jump, or back to Rust.
//!
//! Through a table every block is entered with saved flags. A direct jump leads to the block's body, which wants those flags that it
//! needs in the register: if they are saved it goes through code that restores them, unless the other block is known to need none.

use crate::check::Lookup;
use lodger_interp::canonical;
use lodger_softmmu::MmuIndex;

use crate::emit::{Jump, Mem, Op, RCX, S, T, abs, at, cc};
use crate::env::{jump_slot, jump_slots};
use crate::flags::Flags;
use crate::insn::Kind;
use crate::translate::{Block, Site};

/// Code at the end of the block for what is rare.
pub struct Stub {
    jump: Jump,
    what: Rare,
    site: u32,
    /// Where the flags are there.
    flags: Flags,
}

#[derive(Clone, Copy)]
pub enum Rare {
    /// A site, nothing else to do.
    Leave,
    /// A lookup: the tag was subtracted from the address, and is at this place; the flags that the instruction and those behind it need.
    Lookup(Mem, Lookup, u32),
    /// A direct jump to where `live` flags are needed.
    Direct { live: u32 },
    /// A jump to another page.
    Far(u64),
}

impl Block<'_> {
    /// Counts all instructions of the block that are not the interpreter's, or leaves before the first if they are too many.
    pub fn charge(&mut self) {
        let counted = self.insns.iter().filter(|i| i.kind != Kind::Interpret);
        self.total = counted.count() as u8;
        self.rest = self.total;
        if self.total == 0 {
            return;
        }
        let left = abs(self.layout.ticks_left());
        let sign = self.layout.sign_mask();
        let c = &mut *self.code;
        c.mov(T, RCX);
        c.op(Op::Mov, RCX, left);
        c.op(Op::Lea, RCX, at(RCX, -i32::from(self.total)));
        c.op(Op::Store, RCX, left);
        c.pext(RCX, RCX, sign);
        let enough = c.jrcxz();
        c.mov(RCX, T);
        let jump = c.jmp_forward();
        c.land(enough);
        c.mov(RCX, T);
        let site = Site::Limit {
            rip: self.source.linear,
            total: self.total,
        };
        self.stub(jump, Rare::Leave, site);
    }

    /// Takes back the count of instructions that are not executed.
    pub fn refund(&mut self, count: u8) {
        if count > 0 {
            let left = abs(self.layout.ticks_left());
            self.code.op(Op::Mov, T, left);
            self.code.op(Op::Lea, T, at(T, count.into()));
            self.code.op(Op::Store, T, left);
        }
    }

    /// The entry for jumps through a table: S must be this block's address, and requests are looked at.
    pub fn prologue(&mut self, live: u32) {
        let linear = self.source.linear;
        self.flags = Flags::Saved;
        match i32::try_from(linear as i64) {
            Ok(value) => self.code.cmp_imm(S, value),
            Err(_) => {
                self.code.mov_imm(T, linear);
                self.code.cmp(S, T);
            }
        }
        self.code.jcc(cc::NE, self.routines.miss);
        self.look_at_requests(linear, live);
        if live != 0 {
            self.restore_flags();
        }
        self.flags = Flags::Register;
    }

    /// Leaves if there are requests; the next instruction is at `rip`, where `live` flags are needed.
    fn look_at_requests(&mut self, rip: u64, live: u32) {
        let requests = abs(self.layout.requests);
        let jump = if live == 0 || self.flags == Flags::Saved {
            self.code.cmp_zero32(requests);
            self.code.jcc_forward(cc::NE)
        } else {
            let c = &mut *self.code;
            c.mov(T, RCX);
            c.op32(Op::Mov, RCX, requests);
            let none = c.jrcxz();
            c.mov(RCX, T);
            let jump = c.jmp_forward();
            c.land(none);
            c.mov(RCX, T);
            jump
        };
        self.stub(jump, Rare::Leave, Site::Requests { rip });
    }

    fn site(&mut self, site: Site) -> u32 {
        self.sites.push(site);
        self.sites.len() as u32 - 1
    }

    pub fn stub(&mut self, jump: Jump, what: Rare, site: Site) {
        let (site, flags) = (self.site(site), self.flags);
        self.stubs.push(Stub {
            jump,
            what,
            site,
            flags,
        });
    }

    pub fn leave_at(&mut self, site: Site) {
        let site = self.site(site);
        self.leave_with(site);
    }

    pub fn leave_with(&mut self, site: u32) {
        self.code.mov_imm(T, site.into());
        self.code.jmp(match self.flags {
            Flags::Register => self.routines.leave,
            Flags::Saved => self.routines.leave_saved,
        });
    }

    pub fn emit_stubs(&mut self) {
        while !self.stubs.is_empty() {
            for stub in std::mem::take(&mut self.stubs) {
                self.emit_stub(stub);
            }
        }
    }

    fn emit_stub(&mut self, stub: Stub) {
        self.code.land(stub.jump);
        self.flags = stub.flags;
        match stub.what {
            Rare::Leave => self.leave_with(stub.site),
            Rare::Lookup(tag, lookup, live) => self.missed(stub.site, tag, lookup, live),
            Rare::Far(target) => self.far(target),
            Rare::Direct { live } => {
                let here = self.code.here() as u32;
                self.leave_with(stub.site);
                let restores = live != 0 && self.flags == Flags::Saved;
                let detour = restores.then(|| {
                    let start = self.code.here() as u32;
                    self.restore_flags();
                    let leave = self.routines.leave;
                    (start, self.code.jmp(leave) as u32)
                });
                if let Site::Direct {
                    stub, restoring, ..
                } = &mut self.sites[stub.site as usize]
                {
                    *stub = here;
                    *restoring = detour;
                }
            }
        }
    }

    /// Whether a jump to `target` can be direct.
    fn is_near(&self, target: u64) -> bool {
        self.source.global || (target ^ self.source.linear) >> 12 == 0
    }

    /// Through the jump table.
    pub fn far(&mut self, target: u64) {
        self.far_to(self.source.mode.mmu, target);
    }

    /// Through the jump table of a privilege.
    pub fn far_to(&mut self, index: MmuIndex, target: u64) {
        if !canonical(target) {
            // Behind the last address there is.
            return self.leave_at(Site::Requests { rip: target });
        }
        self.save_flags();
        self.code.mov_imm(S, target);
        let slot = jump_slot(index, target);
        self.code.jmp_mem(abs(self.layout.jump(slot)));
    }

    /// To the address in S; the flags must be saved.
    pub fn indirect(&mut self, rip: u64, undo: i64) {
        debug_assert_eq!(self.flags, Flags::Saved);
        let site = self.site(Site::Indirect { rip, undo });
        self.code.store_imm32(abs(self.layout.indirect()), site);
        self.jump_to(self.source.mode.mmu);
    }

    /// Through the jump table of a privilege, to the canonical address in S; the flags must be saved.
    pub fn jump_to(&mut self, index: MmuIndex) {
        match jump_slots(index) - 1 {
            0xffff => self.code.movzx16(T, S),
            mask => {
                self.code.mov32(T, S);
                self.code.and32(T, mask as u32);
            }
        }
        self.code.jmp_mem(Mem {
            base: None,
            index: Some(T),
            scale: 3,
            disp: self.layout.jump(jump_slot(index, 0)) as i32,
        });
    }

    /// Goes on at `target` from the instruction at `from`.
    pub fn go(&mut self, target: u64, from: u64, live: u32) {
        if target < from {
            self.look_at_requests(target, live);
        }
        if !self.is_near(target) {
            return self.far(target);
        }
        let patch = self.code.here() + 1;
        let jump = self.code.jmp_forward();
        self.direct(jump, target, patch, live, false);
    }

    /// To the instruction at `target` in code that looks up each access alone.
    pub fn go_alone(&mut self, target: u64, live: u32) {
        let patch = self.code.here() + 1;
        let jump = self.code.jmp_forward();
        self.direct(jump, target, patch, live, true);
    }

    fn direct(&mut self, jump: Jump, target: u64, patch: usize, live: u32, alone: bool) {
        let site = Site::Direct {
            target,
            patch: patch as u32,
            stub: 0,
            restoring: None,
            leaves_page: (target ^ self.source.linear) >> 12 != 0,
            alone,
        };
        self.stub(jump, Rare::Direct { live }, site);
    }

    /// A conditional jump with `condition`.
    pub fn branch(&mut self, condition: u8, target: u64, from: u64) {
        let live = self.ahead(target, 2);
        let rest = self.rest.saturating_sub(1);
        if target <= from || rest > 0 {
            let over = self.code.jcc_forward(condition ^ 1);
            self.refund(rest);
            self.aside(|block| block.go(target, from.wrapping_add(1), live));
            self.code.land(over);
        } else if self.is_near(target) {
            let patch = self.code.here() + 2;
            let jump = self.code.jcc_forward(condition);
            self.direct(jump, target, patch, live, false);
        } else {
            let jump = self.code.jcc_forward(condition);
            self.stubs.push(Stub {
                jump,
                what: Rare::Far(target),
                site: 0,
                flags: self.flags,
            });
        }
    }

    /// Emits code that is not executed if what follows it is.
    pub fn aside(&mut self, emit: impl FnOnce(&mut Self)) {
        let flags = self.flags;
        emit(self);
        self.flags = flags;
    }
}
