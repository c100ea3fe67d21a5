//! The host processor as an oracle: runs code in user mode, 64-bit or with 32- or 16-bit segments, with every register
//! loaded before and stored after it, and catches its faults.
//!
//! Code and data lie at the same linear addresses as in a [`machine`](crate::machine). The 16-bit segments are in this
//! process's LDT. The host must have AVX, FSGSBASE and 32-bit emulation, and permit modify_ldt.

use std::arch::asm;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard};

use iced_x86::code_asm::*;
use libc::{
    REG_CR2, REG_CSGSFS, REG_EFL, REG_ERR, REG_R8, REG_R9, REG_R10, REG_R11, REG_R12, REG_R13,
    REG_R14, REG_R15, REG_RAX, REG_RBP, REG_RBX, REG_RCX, REG_RDI, REG_RDX, REG_RIP, REG_RSI,
    REG_RSP, REG_TRAPNO,
};

use crate::machine::{CODE, DATA, DATA_PAGES, End, Mode};

const PAGE: usize = 4096;
/// Bytes of executable program memory.
pub const CODE_SIZE: usize = 2 * PAGE;

/// Registers before or after a program.
#[derive(Clone, PartialEq)]
#[repr(C, align(64))]
pub struct Registers {
    pub ymm: [[u8; 32]; 16],
    /// FXSAVE64 image.
    pub fx: [u8; 512],
    pub gpr: [u64; 16],
    pub rip: u64,
    pub rflags: u64,
    pub gs_base: u64,
}

impl Registers {
    pub fn zero() -> Registers {
        let mut fx = [0; 512];
        fx[..2].copy_from_slice(&0x37f_u16.to_le_bytes());
        fx[24..28].copy_from_slice(&0x1f80_u32.to_le_bytes());
        Registers {
            ymm: [[0; 32]; 16],
            fx,
            gpr: [0; 16],
            rip: 0,
            rflags: 0x202,
            gs_base: 0,
        }
    }
}

/// How a program ended on the host.
pub struct HostOutcome {
    pub end: End,
    pub registers: Registers,
    /// The address of a page fault.
    pub cr2: u64,
}

/// What the stubs share with Rust, below 2 GiB so that they can address it absolutely.
#[repr(C, align(64))]
struct Arena {
    before: Registers,
    after: Registers,
    host_rsp: u64,
    /// Offset and selector for the far jump into the program.
    target: u64,
    selector: u64,
    data_selector: u64,
    host_mxcsr: u32,
    /// Where a signal handler resumes.
    resume: u64,
    faulted: bool,
    trap: u64,
    error: u64,
    cr2: u64,
}

const ARENA_SIZE: usize = 4 * PAGE;
const STUBS_AT: usize = 2 * PAGE;

static ARENA: AtomicPtr<Arena> = AtomicPtr::new(ptr::null_mut());
/// The thread whose faults are a program's.
static RUNNING: AtomicU64 = AtomicU64::new(0);
/// Signals are caught, from the first [`Host`] on.
static CAUGHT: AtomicBool = AtomicBool::new(false);
/// The handlers that were there before, by signal.
static BEFORE: [AtomicUsize; 16] = [const { AtomicUsize::new(0) }; 16];
static LOCK: Mutex<()> = Mutex::new(());

/// The oracle. There is one at a time, because the addresses and signal handlers are the process's.
pub struct Host {
    arena: *mut Arena,
    signal_stack: Vec<u8>,
    stack_before: libc::stack_t,
    /// By bitness 64, then others.
    enter: [u64; 2],
    /// The address programs jump to at their end.
    leave: u64,
    _lock: MutexGuard<'static, ()>,
}

/// A mapping of `len` bytes at exactly `address`, or anywhere below 2 GiB if that is 0.
fn map(address: u64, len: usize, protection: i32) -> *mut u8 {
    let fixed = if address == 0 {
        libc::MAP_32BIT
    } else {
        libc::MAP_FIXED_NOREPLACE
    };
    // SAFETY: a fresh mapping, which replaces nothing.
    let mapped = unsafe {
        libc::mmap(
            address as *mut libc::c_void,
            len,
            protection,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | fixed,
            -1,
            0,
        )
    };
    assert_ne!(
        mapped,
        libc::MAP_FAILED,
        "{address:#x}: {}",
        std::io::Error::last_os_error()
    );
    mapped.cast()
}

/// Enters a 16-bit segment of 64 KiB into the LDT.
fn set_ldt(entry: u32, base: u64, code: bool) {
    // struct user_desc: entry_number, base_addr, limit, flags.
    let flags: u32 = if code { 2 << 1 } else { 0 } | 1 << 6;
    let descriptor = [entry, base as u32, 0xffff, flags];
    // SAFETY: writes an LDT entry that nothing else in this process uses.
    let result = unsafe { libc::syscall(libc::SYS_modify_ldt, 0x11, descriptor.as_ptr(), 16) };
    assert_eq!(result, 0, "modify_ldt: {}", std::io::Error::last_os_error());
}

impl Host {
    pub fn new() -> Host {
        let lock = LOCK.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if ARENA.load(Ordering::SeqCst).is_null() {
            let all = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
            map(CODE, CODE_SIZE, all);
            for (page, _) in DATA_PAGES {
                map(
                    DATA + page * PAGE as u64,
                    PAGE,
                    libc::PROT_READ | libc::PROT_WRITE,
                );
            }
            set_ldt(0, CODE, true);
            set_ldt(1, DATA, false);
            ARENA.store(map(0, ARENA_SIZE, all).cast(), Ordering::SeqCst);
        }
        let arena = ARENA.load(Ordering::SeqCst);
        assert!(size_of::<Arena>() <= STUBS_AT);
        let mut host = Host {
            arena,
            signal_stack: vec![0; 128 << 10],
            stack_before: libc::stack_t {
                ss_sp: ptr::null_mut(),
                ss_flags: libc::SS_DISABLE,
                ss_size: 0,
            },
            enter: [0; 2],
            leave: 0,
            _lock: lock,
        };
        host.catch_signals();
        host.make_stubs().expect("fixed code");
        host
    }

    fn catch_signals(&mut self) {
        // SAFETY: the alternate stack outlives its use (see `drop`); the handler has the right signature.
        unsafe {
            let stack = libc::stack_t {
                ss_sp: self.signal_stack.as_mut_ptr().cast(),
                ss_flags: 0,
                ss_size: self.signal_stack.len(),
            };
            assert_eq!(libc::sigaltstack(&stack, &mut self.stack_before), 0);
            if CAUGHT.swap(true, Ordering::SeqCst) {
                return;
            }
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_signal as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            for signal in [
                libc::SIGSEGV,
                libc::SIGBUS,
                libc::SIGFPE,
                libc::SIGILL,
                libc::SIGTRAP,
            ] {
                let mut before = std::mem::zeroed();
                assert_eq!(libc::sigaction(signal, &action, &mut before), 0);
                BEFORE[signal as usize].store(before.sa_sigaction, Ordering::SeqCst);
            }
        }
    }

    fn make_stubs(&mut self) -> Result<(), iced_x86::IcedError> {
        use std::mem::offset_of;
        let field = |offset: usize| self.arena as u64 + offset as u64;
        let before = |offset: usize| field(offset_of!(Arena, before) + offset);
        let after = |offset: usize| field(offset_of!(Arena, after) + offset);
        let (gpr, fx, ymm) = (
            offset_of!(Registers, gpr),
            offset_of!(Registers, fx),
            offset_of!(Registers, ymm),
        );
        let flags = offset_of!(Registers, rflags);
        let host_rsp = field(offset_of!(Arena, host_rsp));
        let registers = [
            rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15,
        ];
        let vectors: Vec<AsmRegisterYmm> = (0..16)
            .map(|n| get_ymm(iced_x86::Register::YMM0 + n).expect("of 16"))
            .collect();
        let at = |address: u64| ptr_at(address);
        let mut base = self.arena as u64 + STUBS_AT as u64;
        let mut place = |mut a: CodeAssembler| -> Result<u64, iced_x86::IcedError> {
            let here = base;
            let code = a.assemble(here)?;
            // SAFETY: the arena has room for a few hundred bytes of code in each of the stubs.
            unsafe { ptr::copy_nonoverlapping(code.as_ptr(), here as *mut u8, code.len()) };
            base += (code.len() as u64 + 63) & !63;
            assert!(base < self.arena as u64 + ARENA_SIZE as u64);
            Ok(here)
        };

        for (slot, far) in [(0, false), (1, true)] {
            let mut a = CodeAssembler::new(64)?;
            for register in [rbx, rbp, r12, r13, r14, r15] {
                a.push(register)?;
            }
            a.mov(qword_ptr(at(host_rsp)), rsp)?;
            a.fxrstor64(ptr(at(before(fx))))?;
            for (n, vector) in vectors.iter().enumerate() {
                a.vmovups(*vector, ymmword_ptr(at(before(ymm + 32 * n))))?;
            }
            a.push(qword_ptr(at(before(flags))))?;
            if far {
                a.mov(rax, qword_ptr(at(field(offset_of!(Arena, data_selector)))))?;
                for segment in [ds, es, gs] {
                    a.mov(segment, eax)?;
                }
                a.popfq()?;
                a.mov(ss, eax)?;
            } else {
                a.mov(rax, qword_ptr(at(before(offset_of!(Registers, gs_base)))))?;
                a.wrgsbase(rax)?;
                a.popfq()?;
            }
            for (n, register) in registers.iter().enumerate() {
                a.mov(*register, qword_ptr(at(before(gpr + 8 * n))))?;
            }
            let target = at(field(offset_of!(Arena, target)));
            if far {
                a.jmp(fword_ptr(target))?;
            } else {
                a.jmp(qword_ptr(target))?;
            }
            self.enter[slot] = place(a)?;
        }

        // The end of a program; `resume` is that part of it which comes after a signal as well.
        let mut a = CodeAssembler::new(64)?;
        for (n, register) in registers.iter().enumerate() {
            a.mov(qword_ptr(at(after(gpr + 8 * n))), *register)?;
        }
        a.mov(eax, 0x2b)?;
        a.mov(ss, eax)?;
        a.mov(rsp, qword_ptr(at(host_rsp)))?;
        a.pushfq()?;
        a.pop(qword_ptr(at(after(flags))))?;
        for (n, vector) in vectors.iter().enumerate() {
            a.vmovups(ymmword_ptr(at(after(ymm + 32 * n))), *vector)?;
        }
        a.fxsave64(ptr(at(after(fx))))?;
        let mut resume = CodeAssembler::new(64)?;
        resume.push(2)?;
        resume.popfq()?;
        resume.fninit()?;
        resume.vzeroupper()?;
        resume.ldmxcsr(dword_ptr(at(field(offset_of!(Arena, host_mxcsr)))))?;
        resume.xor(eax, eax)?;
        for segment in [ds, es, gs] {
            resume.mov(segment, eax)?;
        }
        for register in [r15, r14, r13, r12, rbp, rbx] {
            resume.pop(register)?;
        }
        resume.ret()?;
        let resume = place(resume)?;
        a.jmp(resume)?;
        self.leave = place(a)?;
        // SAFETY: the arena is mapped, and nobody else uses it.
        unsafe { (*self.arena).resume = resume };
        Ok(())
    }

    /// The code that ends a program of this bitness on the host.
    pub fn end_of_program(&self, bitness: u32) -> Vec<u8> {
        let address = (self.leave as u32).to_le_bytes();
        match bitness {
            // JMP [RIP+0]
            64 => [&[0xff, 0x25, 0, 0, 0, 0][..], &address, &[0; 4]].concat(),
            // JMP FAR 33:address
            32 => [&[0xea][..], &address, &[0x33, 0]].concat(),
            _ => [&[0x66, 0xea][..], &address, &[0x33, 0]].concat(),
        }
    }

    /// Fills program memory.
    pub fn write_code(&mut self, code: &[u8]) {
        assert!(code.len() <= CODE_SIZE);
        let at = CODE as *mut u8;
        // SAFETY: the code region is mapped; it is writable while it is filled.
        unsafe {
            libc::mprotect(at.cast(), CODE_SIZE, libc::PROT_READ | libc::PROT_WRITE);
            ptr::copy_nonoverlapping(code.as_ptr(), at, code.len());
            libc::mprotect(at.cast(), CODE_SIZE, libc::PROT_READ | libc::PROT_EXEC);
        }
    }

    /// Fills the data pages, in the order of [`DATA_PAGES`].
    pub fn write_data(&mut self, data: &[u8]) {
        for ((page, writable), bytes) in DATA_PAGES.iter().zip(data.chunks_exact(PAGE)) {
            let at = (DATA as usize + *page as usize * PAGE) as *mut u8;
            // SAFETY: the page is mapped; it is writable while it is filled.
            unsafe {
                if !writable {
                    libc::mprotect(at.cast(), PAGE, libc::PROT_READ | libc::PROT_WRITE);
                }
                ptr::copy_nonoverlapping(bytes.as_ptr(), at, PAGE);
                if !writable {
                    libc::mprotect(at.cast(), PAGE, libc::PROT_READ);
                }
            }
        }
    }

    /// What the data pages hold.
    pub fn data(&self) -> Vec<u8> {
        let mut data = Vec::with_capacity(DATA_PAGES.len() * PAGE);
        for (page, _) in DATA_PAGES {
            let at = (DATA as usize + page as usize * PAGE) as *const u8;
            // SAFETY: the page is mapped.
            data.extend_from_slice(unsafe { std::slice::from_raw_parts(at, PAGE) });
        }
        data
    }

    /// Runs the program at `before.rip` (relative to the code segment) in `mode`.
    pub fn run(&mut self, mode: Mode, before: &Registers) -> HostOutcome {
        let (slot, selector, data_selector) = match mode.bitness() {
            64 => (0, 0, 0),
            32 => (1, 0x23, 0x2b),
            _ => (1, 0x07, 0x0f),
        };
        // SAFETY: the arena is this oracle's, and the stubs preserve what the ABI asks for; the program is the caller's.
        unsafe {
            let arena = &mut *self.arena;
            arena.before = before.clone();
            arena.after = Registers::zero();
            arena.target = before.rip | selector << 32;
            arena.selector = selector;
            arena.data_selector = data_selector;
            arena.host_mxcsr = 0x1f80;
            arena.faulted = false;
            if slot == 0 {
                arena.target = before.rip;
            }
            RUNNING.store(libc::gettid() as u64, Ordering::SeqCst);
            let enter = self.enter[slot];
            asm!("call {enter}", enter = in(reg) enter, clobber_abi("sysv64"));
            RUNNING.store(0, Ordering::SeqCst);
            let arena = &*self.arena;
            let mut registers = arena.after.clone();
            let end = if arena.faulted {
                End::Exception {
                    vector: arena.trap as u8,
                    error: arena.error as u32,
                }
            } else {
                End::Done
            };
            if end == End::Done {
                registers.rip = 0;
            }
            HostOutcome {
                end,
                registers,
                cr2: arena.cr2,
            }
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // SAFETY: takes back the stack that `catch_signals` installed. The handlers stay: the engine under test may know them.
        unsafe {
            libc::sigaltstack(&self.stack_before, ptr::null_mut());
        }
    }
}

/// Whether there is memory at `address` in this process, which a program would not find in the guest.
pub fn is_mapped(address: u64) -> bool {
    let mut resident = 0;
    let page = (address & !0xfff) as *mut libc::c_void;
    // SAFETY: asks about one page, which need not exist.
    unsafe { libc::mincore(page, 4096, &mut resident) == 0 }
}

/// An absolute address as an operand.
fn ptr_at(address: u64) -> AsmMemoryOperand {
    ptr(address)
}

extern "C" fn on_signal(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: called by the kernel with a valid context; the arena is mapped while a program runs.
    unsafe {
        if RUNNING.load(Ordering::SeqCst) != libc::gettid() as u64 {
            let before = BEFORE[signal as usize].load(Ordering::SeqCst);
            if before > libc::SIG_IGN {
                // The engine under test may use signals as well.
                type Handler = extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void);
                let handler: Handler = std::mem::transmute(before);
                return handler(signal, info, context);
            }
            libc::signal(signal, libc::SIG_DFL);
            return;
        }
        let context = &mut *context.cast::<libc::ucontext_t>();
        let arena = &mut *ARENA.load(Ordering::SeqCst);
        let g = &mut context.uc_mcontext.gregs;
        let get = |g: &[i64], n: i32| g[n as usize] as u64;
        let order = [
            REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI, REG_R8, REG_R9,
            REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15,
        ];
        for (to, from) in arena.after.gpr.iter_mut().zip(order) {
            *to = get(g, from);
        }
        arena.after.rip = get(g, REG_RIP);
        arena.after.rflags = get(g, REG_EFL);
        arena.trap = get(g, REG_TRAPNO);
        arena.error = get(g, REG_ERR);
        arena.cr2 = get(g, REG_CR2);
        arena.faulted = true;
        // The XSAVE area of the frame, in its standard format: legacy image, header, upper halves of the YMM registers.
        let area = context.uc_mcontext.fpregs.cast::<u8>();
        ptr::copy_nonoverlapping(area, arena.after.fx.as_mut_ptr(), 512);
        let present = area.add(512).cast::<u64>().read_unaligned();
        for n in 0..16 {
            let low = area.add(160 + 16 * n);
            ptr::copy_nonoverlapping(low, arena.after.ymm[n].as_mut_ptr(), 16);
            let high = if present & 4 != 0 {
                area.add(576 + 16 * n)
            } else {
                ptr::null_mut()
            };
            let to = arena.after.ymm[n].as_mut_ptr().add(16);
            if high.is_null() {
                ptr::write_bytes(to, 0, 16);
            } else {
                ptr::copy_nonoverlapping(high, to, 16);
            }
        }
        g[REG_RIP as usize] = arena.resume as i64;
        g[REG_RSP as usize] = arena.host_rsp as i64;
        g[REG_EFL as usize] = 0x202;
        // SS, FS, GS, CS.
        let kept = g[REG_CSGSFS as usize] as u64 & 0x0000_ffff_ffff_0000;
        g[REG_CSGSFS as usize] = (kept | 0x33 | 0x2b << 48) as i64;
    }
}
