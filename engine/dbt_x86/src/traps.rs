//! Host traps in translated code (a division by zero, a misaligned vector, an unmasked SIMD exception): a signal handler leaves the
//! code at the instruction, which the interpreter then executes.
//!
//! While a vCPU's thread is in translated code RSP is the guest's, so every signal that could arrive there must be handled on
//! an alternate stack: asynchronous signals are blocked in vCPU threads. Specification: POSIX.1-2017, sigaction; signal-safety(7).

use std::cell::Cell;
use std::io;
use std::ptr;
use std::sync::OnceLock;

/// What the handler must know of the code that the thread is executing.
#[derive(Debug, Clone, Copy)]
pub struct Executing {
    /// Addresses of the code.
    pub start: usize,
    pub end: usize,
    /// Where to continue.
    pub trap: usize,
    /// Where to note the place.
    pub place: *mut u64,
}

thread_local! {
    static EXECUTING: Cell<Option<Executing>> = const { Cell::new(None) };
    static READY: Cell<bool> = const { Cell::new(false) };
}

const SIGNALS: [libc::c_int; 4] = [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL];

/// The handlers that were installed before.
static BEFORE: OnceLock<[libc::sigaction; 4]> = OnceLock::new();

/// The signal by which a timer reaches a vCPU's thread.
pub fn timer_signal() -> libc::c_int {
    libc::SIGRTMIN() + 5
}

/// Prepares this thread for translated code: `f` runs with `executing` known to the handler.
pub fn with<R>(executing: Executing, f: impl FnOnce() -> R) -> io::Result<R> {
    prepare()?;
    EXECUTING.set(Some(executing));
    let result = f();
    EXECUTING.set(None);
    Ok(result)
}

/// Prepares this thread for signals.
pub fn prepare() -> io::Result<()> {
    if !READY.get() {
        install()?;
        prepare_thread()?;
        READY.set(true);
    }
    Ok(())
}

fn install() -> io::Result<()> {
    if BEFORE.get().is_some() {
        return Ok(());
    }
    // SAFETY: zero is a valid `sigaction`.
    let mut before: [libc::sigaction; 4] = unsafe { std::mem::zeroed() };
    for (signal, before) in SIGNALS.into_iter().zip(&mut before) {
        // SAFETY: asks for the current action only.
        unsafe { libc::sigaction(signal, ptr::null(), before) };
    }
    let _ = BEFORE.set(before);
    let handlers = [
        (handle as *const () as usize, &SIGNALS[..]),
        (note_timer as *const () as usize, &[timer_signal()][..]),
    ];
    for (handler, signals) in handlers {
        for &signal in signals {
            // SAFETY: zero is a valid `sigaction`; the handlers have the right type and are async-signal-safe.
            let failed = unsafe {
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = handler;
                action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
                libc::sigfillset(&mut action.sa_mask);
                libc::sigaction(signal, &action, ptr::null_mut()) < 0
            };
            if failed {
                return Err(io::Error::last_os_error());
            }
        }
    }
    Ok(())
}

/// Gives the thread a signal stack if it has none, and blocks asynchronous signals.
fn prepare_thread() -> io::Result<()> {
    const STACK: usize = 64 << 10;
    // SAFETY: plain calls with valid arguments; the stack is never freed.
    unsafe {
        let mut old: libc::stack_t = std::mem::zeroed();
        libc::sigaltstack(ptr::null(), &mut old);
        if old.ss_flags & libc::SS_DISABLE != 0 {
            let memory = Box::leak(vec![0u8; STACK].into_boxed_slice());
            let new = libc::stack_t {
                ss_sp: memory.as_mut_ptr().cast(),
                ss_flags: 0,
                ss_size: STACK,
            };
            if libc::sigaltstack(&new, ptr::null_mut()) < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        let mut blocked: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&mut blocked);
        for signal in SIGNALS {
            libc::sigdelset(&mut blocked, signal);
        }
        libc::sigdelset(&mut blocked, libc::SIGTRAP);
        libc::sigdelset(&mut blocked, libc::SIGABRT);
        libc::sigdelset(&mut blocked, libc::SIGPROF);
        libc::sigdelset(&mut blocked, timer_signal());
        libc::pthread_sigmask(libc::SIG_BLOCK, &blocked, ptr::null_mut());
    }
    Ok(())
}

/// A timer's signal: sets the request bits to which its value points.
extern "C" fn note_timer(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    crate::timer::expired(info);
}

extern "C" fn handle(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let context: *mut libc::ucontext_t = context.cast();
    // SAFETY: the kernel gives a valid context, which is this handler's to change.
    let registers = unsafe { &mut (*context).uc_mcontext.gregs };
    let pc = registers[libc::REG_RIP as usize] as usize;
    if let Some(executing) = EXECUTING.get()
        && (executing.start..executing.end).contains(&pc)
    {
        // SAFETY: the address of a field that lives as long as the code.
        unsafe { executing.place.write(pc as u64) };
        registers[libc::REG_RIP as usize] = executing.trap as i64;
        return;
    }
    // Not ours: as before.
    let index = SIGNALS.iter().position(|s| *s == signal).unwrap_or(0);
    // SAFETY: calls the handler that was installed before, or lets the default action happen when the instruction is executed again.
    unsafe {
        match BEFORE.get() {
            Some(before) if before[index].sa_sigaction > 1 => {
                type Handler = extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);
                let handler: Handler = std::mem::transmute(before[index].sa_sigaction);
                handler(signal, info, context.cast());
            }
            _ => {
                libc::signal(signal, libc::SIG_DFL);
            }
        }
    }
}
