//! The oracle: runs one instruction on the host processor with *all* registers loaded and stored around it.
//!
//! Shares nothing with the stub generator: registers keep their own names (RSP too), the memory operand is an absolute
//! address below 2 GiB, and faults of the instruction are caught as signals.

use iced_x86::code_asm::*;
use iced_x86::{CpuidFeature, Instruction, OpKind, Register};
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::{Mutex, MutexGuard};

/// Bytes of memory around an operand.
pub const MEMORY: usize = 192;
/// Where in them an aligned operand is.
pub const OPERAND: usize = 64;
const ARENA: usize = 1 << 16;
const CODE_AT: usize = 1 << 13;

/// Every register that an instruction may touch, and the memory around its operand.
#[derive(Clone)]
#[repr(C, align(64))]
pub struct Machine {
    pub ymm: [[u8; 32]; 16],
    pub fxsave: [u8; 512],
    pub memory: [u8; MEMORY],
    pub gprs: [u64; 16],
    pub flags: u64,
    pub mxcsr: u32,
}

/// How the instruction ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Done,
    Fault { signal: i32, mxcsr: u32 },
}

/// Memory below 2 GiB, so that code can address it absolutely.
#[repr(C, align(64))]
struct Arena {
    machine: Machine,
    host_rsp: u64,
    resume: u64,
    signal: i32,
    fault_mxcsr: u32,
    host_mxcsr: u32,
}

static ARENA_ADDRESS: AtomicPtr<Arena> = AtomicPtr::new(ptr::null_mut());
static LOCK: Mutex<()> = Mutex::new(());

/// The runner; there is one at a time, because signal handlers are global.
pub struct Direct {
    arena: *mut Arena,
    signal_stack: Vec<u8>,
    _lock: MutexGuard<'static, ()>,
}

/// An instruction made ready to run.
pub struct Prepared {
    entry: extern "sysv64" fn(),
    resume: u64,
}

impl Direct {
    pub fn new() -> Self {
        let lock = LOCK.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        // SAFETY: a fresh private mapping; signal handlers and the alternate stack outlive their use.
        unsafe {
            let arena = libc::mmap(
                ptr::null_mut(),
                ARENA,
                libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_32BIT,
                -1,
                0,
            );
            assert_ne!(arena, libc::MAP_FAILED);
            let arena: *mut Arena = arena.cast();
            assert!(size_of::<Arena>() < CODE_AT);
            (*arena).host_mxcsr = 0x1f80;
            ARENA_ADDRESS.store(arena, Ordering::SeqCst);
            let mut signal_stack = vec![0; 1 << 16];
            let stack = libc::stack_t {
                ss_sp: signal_stack.as_mut_ptr().cast(),
                ss_flags: 0,
                ss_size: signal_stack.len(),
            };
            assert_eq!(libc::sigaltstack(&stack, ptr::null_mut()), 0);
            for signal in [libc::SIGFPE, libc::SIGSEGV, libc::SIGBUS, libc::SIGILL] {
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = on_fault as *const () as usize;
                action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
                assert_eq!(libc::sigaction(signal, &action, ptr::null_mut()), 0);
            }
            Self {
                arena,
                signal_stack,
                _lock: lock,
            }
        }
    }

    /// The address of [`Machine::memory`] while an instruction runs.
    pub fn memory_address(&self) -> u64 {
        // SAFETY: only an address is computed.
        unsafe { &raw const (*self.arena).machine.memory as u64 }
    }

    /// Generates code for `instruction`, its memory operand `offset` bytes into [`Machine::memory`].
    pub fn prepare(&mut self, instruction: &Instruction, offset: usize) -> Prepared {
        let mut instruction = *instruction;
        if (0..instruction.op_count()).any(|i| instruction.op_kind(i) == OpKind::Memory) {
            instruction.set_memory_base(Register::None);
            instruction.set_memory_index(Register::None);
            instruction.set_memory_index_scale(1);
            instruction.set_memory_displ_size(8);
            instruction.set_memory_displacement64(self.memory_address() + offset as u64);
            instruction.set_segment_prefix(Register::None);
        }
        self.prepare_as_is(&instruction)
    }

    /// Generates code for `instruction` with its own addressing.
    pub fn prepare_as_is(&mut self, instruction: &Instruction) -> Prepared {
        let code_at = self.arena as u64 + CODE_AT as u64;
        let (code, resume) =
            generate(instruction, self.arena, code_at).expect("the instruction can be encoded");
        // SAFETY: the code fits behind the arena's data, and nothing runs there now.
        unsafe {
            let target = (self.arena as *mut u8).add(CODE_AT);
            assert!(code.len() < ARENA - CODE_AT);
            ptr::copy_nonoverlapping(code.as_ptr(), target, code.len());
            Prepared {
                entry: std::mem::transmute::<*mut u8, extern "sysv64" fn()>(target),
                resume,
            }
        }
    }

    /// Runs the last prepared instruction.
    pub fn run(&mut self, prepared: &Prepared, machine: &mut Machine) -> End {
        // SAFETY: the arena is ours; the code restores every register that the calling convention asks for.
        unsafe {
            (*self.arena).machine = machine.clone();
            (*self.arena).resume = prepared.resume;
            (*self.arena).signal = 0;
            (prepared.entry)();
            match (*self.arena).signal {
                0 => {
                    *machine = (*self.arena).machine.clone();
                    End::Done
                }
                signal => End::Fault {
                    signal,
                    mxcsr: (*self.arena).fault_mxcsr,
                },
            }
        }
    }
}

impl Drop for Direct {
    fn drop(&mut self) {
        ARENA_ADDRESS.store(ptr::null_mut(), Ordering::SeqCst);
        // SAFETY: the mapping is ours and unused from here on; the alternate stack is taken out of use before it goes.
        unsafe {
            let none = libc::stack_t {
                ss_sp: ptr::null_mut(),
                ss_flags: libc::SS_DISABLE,
                ss_size: 0,
            };
            libc::sigaltstack(&none, ptr::null_mut());
            libc::munmap(self.arena.cast(), ARENA);
        }
        self.signal_stack.clear();
    }
}

/// Notes the fault and continues behind the instruction, where the host's registers are restored.
extern "C" fn on_fault(signal: i32, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let arena = ARENA_ADDRESS.load(Ordering::SeqCst);
    if arena.is_null() {
        std::process::abort();
    }
    // SAFETY: the kernel passes a ucontext_t, and the arena is mapped.
    unsafe {
        let context = &mut *context.cast::<libc::ucontext_t>();
        let arena = &mut *arena;
        let rip = &mut context.uc_mcontext.gregs[libc::REG_RIP as usize];
        let code = arena as *mut Arena as i64 + CODE_AT as i64;
        if !(code..code + (ARENA - CODE_AT) as i64).contains(rip) {
            std::process::abort();
        }
        arena.signal = signal;
        arena.fault_mxcsr = (*context.uc_mcontext.fpregs).mxcsr;
        *rip = arena.resume as i64;
    }
}

fn generate(
    instruction: &Instruction,
    arena: *mut Arena,
    ip: u64,
) -> Result<(Vec<u8>, u64), iced_x86::IcedError> {
    const GPRS: [AsmRegister64; 16] = [
        rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15,
    ];
    const SAVED: [AsmRegister64; 6] = [rbx, rbp, r12, r13, r14, r15];
    let at = |field: usize| arena as u64 + field as u64;
    let machine = std::mem::offset_of!(Arena, machine);
    let field = |offset: usize| at(machine + offset);
    let gpr = |n: usize| field(std::mem::offset_of!(Machine, gprs) + 8 * n);
    let vector = |n: usize| field(std::mem::offset_of!(Machine, ymm) + 32 * n);
    let flags = field(std::mem::offset_of!(Machine, flags));
    let mxcsr = field(std::mem::offset_of!(Machine, mxcsr));
    let fxsave = field(std::mem::offset_of!(Machine, fxsave));
    let host_rsp = at(std::mem::offset_of!(Arena, host_rsp));
    let host_mxcsr = at(std::mem::offset_of!(Arena, host_mxcsr));
    let avx = lodger_native::supported(CpuidFeature::AVX);
    let xmm = |n: usize| registers::get_xmm(Register::XMM0 + n as u32).unwrap();
    let ymm = |n: usize| registers::get_ymm(Register::YMM0 + n as u32).unwrap();

    let a = &mut CodeAssembler::new(64)?;
    for register in SAVED {
        a.push(register)?;
    }
    a.mov(qword_ptr(host_rsp), rsp)?;
    a.fxrstor64(ptr(fxsave))?;
    for n in 0..16 {
        if avx {
            a.vmovdqu(ymm(n), ymmword_ptr(vector(n)))?;
        } else {
            a.movdqu(xmm(n), xmmword_ptr(vector(n)))?;
        }
    }
    a.ldmxcsr(dword_ptr(mxcsr))?;
    a.push(qword_ptr(flags))?;
    a.popfq()?;
    for (n, register) in GPRS.into_iter().enumerate() {
        a.mov(register, qword_ptr(gpr(n)))?;
    }
    a.add_instruction(*instruction)?;
    for (n, register) in GPRS.into_iter().enumerate() {
        a.mov(qword_ptr(gpr(n)), register)?;
    }
    a.mov(rsp, qword_ptr(host_rsp))?;
    a.pushfq()?;
    a.pop(qword_ptr(flags))?;
    a.stmxcsr(dword_ptr(mxcsr))?;
    for n in 0..16 {
        if avx {
            a.vmovdqu(ymmword_ptr(vector(n)), ymm(n))?;
        } else {
            a.movdqu(xmmword_ptr(vector(n)), xmm(n))?;
        }
    }
    a.fxsave64(ptr(fxsave))?;
    let mut resume = a.create_label();
    a.set_label(&mut resume)?;
    a.mov(rsp, qword_ptr(host_rsp))?;
    a.fninit()?;
    a.ldmxcsr(dword_ptr(host_mxcsr))?;
    if avx {
        a.vzeroupper()?;
    }
    for register in SAVED.into_iter().rev() {
        a.pop(register)?;
    }
    a.ret()?;
    let options = iced_x86::BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS;
    let result = a.assemble_options(ip, options)?;
    let resume = result.label_ip(&resume)?;
    Ok((result.inner.code_buffer, resume))
}
