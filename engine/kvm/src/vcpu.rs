//! One vCPU: the loop around KVM_RUN.

use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::time::Duration;

use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_RUNNABLE, KVM_VCPUEVENT_VALID_SHADOW, kvm_mp_state,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use lodger_vcpu::{EngineError, Entry, Exit, Kick, Vcpu};
use lodger_x86::{Activity, CpuState};

use crate::doorbell::Doorbell;
use crate::failure::{self, host};
use crate::state::{self, Offers, Time};
use crate::vm::Vm;

/// How long a vCPU that is to stop may go on so that an event on its way is delivered first, and how often at most.
const SETTLE: Duration = Duration::from_micros(100);
const SETTLE_TRIES: u32 = 100;

pub(crate) struct KvmVcpu {
    fd: VcpuFd,
    index: u32,
    /// The TSC's real frequency.
    tsc_khz: u32,
    offers: Offers,
    vm: Arc<Vm>,
    bell: Arc<Doorbell>,
    pending: Pending,
    /// Whether KVM would take an interrupt of the 8259 now; `None`: ask. `Some(false)` is for a vCPU that is not halted, or cannot
    /// become ready while it is: KVM then tells by the interrupt window.
    ready: Option<bool>,
    shutdown: bool,
}

/// What KVM waits for.
enum Pending {
    Nothing,
    /// Items of a port access, of which the first `done` are.
    Port(PortAccess),
    /// A read from memory that is no RAM: `size` bytes.
    MmioRead {
        size: u8,
    },
    /// All data is there; KVM finishes the instruction at the next KVM_RUN.
    Finish,
}

/// One IN, OUT, INS or OUTS: KVM asks for all items of a string instruction's batch at once.
struct PortAccess {
    port: u16,
    size: u8,
    write: bool,
    items: usize,
    done: usize,
    /// Where in the shared page the items are.
    data: NonNull<u8>,
}

// SAFETY: `data` points into the page of the `VcpuFd` beside it, and is used by whoever has that exclusively.
unsafe impl Send for PortAccess {}

impl PortAccess {
    /// The address of the current item.
    fn item(&self) -> *mut u8 {
        debug_assert!(self.done < self.items);
        // SAFETY: KVM's slice has `items * size` bytes, and `done` is less than `items`.
        unsafe { self.data.as_ptr().add(self.done * usize::from(self.size)) }
    }

    /// The next exit: asks for, or tells, the current item.
    fn exit(&self) -> Exit {
        let (port, size) = (self.port, self.size);
        if !self.write {
            return Exit::PortRead { port, size };
        }
        let mut bytes = [0; 4];
        // SAFETY: the item has `size` bytes, at most 4, in the mapped page, which the kernel writes only in KVM_RUN.
        unsafe { ptr::copy_nonoverlapping(self.item(), bytes.as_mut_ptr(), size.into()) };
        let value = u32::from_le_bytes(bytes);
        Exit::PortWrite { port, size, value }
    }

    /// Answers for the current item.
    fn answer(&self, value: u64) {
        if !self.write {
            let bytes = value.to_le_bytes();
            // SAFETY: as in `exit`; an IN's slice is writable.
            unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), self.item(), self.size.into()) };
        }
    }
}

fn little_endian(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .rev()
        .fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// What KVM_RUN came back with, free of borrows.
enum Outcome {
    Exit(Exit),
    Again,
    Failed(EngineError),
    InternalError,
}

impl KvmVcpu {
    pub fn new(mut fd: VcpuFd, index: u32, tsc_khz: u32, offers: Offers, vm: Arc<Vm>) -> KvmVcpu {
        let bell = Arc::clone(vm.bell(index));
        let byte = NonNull::from(&mut fd.get_kvm_run().immediate_exit);
        // SAFETY: the page is mapped as long as `fd` lives, and `drop` disconnects before.
        unsafe { bell.connect(byte) };
        KvmVcpu {
            fd,
            index,
            tsc_khz,
            offers,
            vm,
            bell,
            pending: Pending::Nothing,
            ready: None,
            shutdown: false,
        }
    }

    fn time(&self) -> Time {
        Time {
            now: self.vm.now(),
            tsc_khz: self.tsc_khz,
        }
    }

    /// Takes what the machine brings; an exit if the same instruction wants more.
    fn complete(&mut self, entry: Entry) -> Result<Option<Exit>, EngineError> {
        match (&mut self.pending, entry) {
            (Pending::Port(access), Entry::Data(_) | Entry::Written) => {
                if let Entry::Data(value) = entry {
                    access.answer(value);
                }
                access.done += 1;
                if access.done < access.items {
                    return Ok(Some(access.exit()));
                }
                self.pending = Pending::Finish;
            }
            (Pending::MmioRead { size }, Entry::Data(value)) => {
                let size = usize::from(*size);
                let run = self.fd.get_kvm_run();
                // SAFETY: the exit was KVM_EXIT_MMIO, for which this member is the valid one.
                let data = unsafe { &mut run.__bindgen_anon_1.mmio.data };
                data[..size].copy_from_slice(&value.to_le_bytes()[..size]);
                self.pending = Pending::Finish;
            }
            (_, Entry::Interrupt(Some(vector))) => self.inject(vector)?,
            // It may still be halted, where KVM does not tell when it is ready.
            (_, Entry::Interrupt(None)) => self.ready = None,
            _ => {}
        }
        Ok(None)
    }

    /// Gives the vCPU, which is ready for it, an interrupt of the 8259.
    ///
    /// Not by KVM_INTERRUPT: an interrupt that waits there shows nowhere, so that a state stored meanwhile would lack it.
    fn inject(&mut self, vector: u8) -> Result<(), EngineError> {
        let failed = || host("KVM does not take an interrupt of the 8259");
        let mut events = self.fd.get_vcpu_events().map_err(failed())?;
        events.flags = KVM_VCPUEVENT_VALID_SHADOW;
        events.interrupt.injected = 1;
        events.interrupt.nr = vector;
        events.interrupt.soft = 0;
        self.fd.set_vcpu_events(&events).map_err(failed())?;
        if self.fd.get_mp_state().map_err(failed())?.mp_state == KVM_MP_STATE_HALTED {
            let mp_state = KVM_MP_STATE_RUNNABLE;
            self.fd
                .set_mp_state(kvm_mp_state { mp_state })
                .map_err(failed())?;
        }
        self.ready = Some(false);
        Ok(())
    }

    /// Whether no event is half delivered, so that the state is that of an instruction boundary.
    fn is_settled(&self) -> Result<bool, EngineError> {
        let events = self
            .fd
            .get_vcpu_events()
            .map_err(host("KVM does not tell the pending events"))?;
        Ok(events.exception.injected | events.exception.pending == 0
            && events.interrupt.injected == 0
            && events.nmi.injected == 0)
    }

    fn run_until_exit(&mut self) -> Result<Exit, EngineError> {
        let mut tries = 0;
        loop {
            self.bell.set_immediate_exit(false);
            let between = matches!(self.pending, Pending::Nothing);
            if self.bell.kicked() {
                if !between {
                    // The instruction is finished first, and no other begun.
                    self.bell.set_immediate_exit(true);
                } else if tries == SETTLE_TRIES || self.is_settled()? {
                    self.bell.answer();
                    return Ok(Exit::Kicked);
                } else {
                    tries += 1;
                    self.bell.ring_later(SETTLE);
                }
            }
            let intr = self.bell.intr();
            if intr && between {
                match self.ready {
                    Some(true) => {
                        self.ready = Some(false);
                        if self.is_settled()? {
                            return Ok(Exit::InterruptAcknowledge);
                        }
                    }
                    Some(false) => {}
                    // Just to see whether it is ready, which it may be while it is halted.
                    None => self.bell.set_immediate_exit(true),
                }
            }
            self.fd.get_kvm_run().request_interrupt_window = u8::from(intr);
            match self.enter() {
                Outcome::Exit(exit) => return Ok(exit),
                Outcome::Again => {
                    let run = self.fd.get_kvm_run();
                    self.ready = Some(run.ready_for_interrupt_injection != 0);
                }
                Outcome::Failed(error) => return Err(error),
                Outcome::InternalError => return Err(self.internal_error()),
            }
        }
    }

    /// One KVM_RUN.
    fn enter(&mut self) -> Outcome {
        self.pending = Pending::Nothing;
        self.ready = None;
        let exit = match self.fd.run() {
            Ok(VcpuExit::IoIn(port, data)) => {
                let data = NonNull::from(data);
                return self.port_exit(port, data, false);
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                let data = NonNull::from(data);
                return self.port_exit(port, data, true);
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                let size = data.len() as u8;
                self.pending = Pending::MmioRead { size };
                Exit::MmioRead { address, size }
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                let (size, value) = (data.len() as u8, little_endian(data));
                self.pending = Pending::Finish;
                Exit::MmioWrite {
                    address,
                    size,
                    value,
                }
            }
            Ok(VcpuExit::IoapicEoi(vector)) => Exit::Eoi(vector),
            Ok(VcpuExit::Shutdown) => {
                self.shutdown = true;
                Exit::Shutdown
            }
            Ok(VcpuExit::IrqWindowOpen | VcpuExit::Intr | VcpuExit::Hlt) => return Outcome::Again,
            Ok(VcpuExit::InternalError) => return Outcome::InternalError,
            Ok(VcpuExit::FailEntry(reason, _)) => {
                return Outcome::Failed(EngineError::Internal(format!(
                    "the processor refuses to enter the guest (reason {reason:#x}): its state is invalid, or this \
                     host lacks what the state needs"
                )));
            }
            Ok(VcpuExit::MemoryFault { gpa, size, .. }) => {
                return Outcome::Failed(EngineError::Internal(format!(
                    "KVM cannot access guest memory at {gpa:#x}..{:#x}",
                    gpa.saturating_add(size)
                )));
            }
            Ok(other) => {
                let text =
                    format!("KVM left the guest for a reason that is not expected: {other:?}");
                return Outcome::Failed(EngineError::Internal(text));
            }
            // EAGAIN: an application processor was started, or woken while it waits to be.
            Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => return Outcome::Again,
            Err(e) => return Outcome::Failed(host("KVM does not run the vCPU")(e)),
        };
        Outcome::Exit(exit)
    }

    fn port_exit(&mut self, port: u16, data: NonNull<[u8]>, write: bool) -> Outcome {
        let run = self.fd.get_kvm_run();
        // SAFETY: the exit was KVM_EXIT_IO, for which this member is the valid one.
        let size = unsafe { run.__bindgen_anon_1.io.size };
        let access = PortAccess {
            port,
            size,
            write,
            items: data.len() / usize::from(size.max(1)),
            done: 0,
            data: data.cast(),
        };
        let exit = access.exit();
        self.pending = Pending::Port(access);
        Outcome::Exit(exit)
    }

    /// Says what KVM could not do.
    fn internal_error(&mut self) -> EngineError {
        let (regs, sregs) = match (self.fd.get_regs(), self.fd.get_sregs()) {
            (Ok(regs), Ok(sregs)) => (regs, sregs),
            (Err(e), _) | (_, Err(e)) => return host("KVM does not tell the registers")(e),
        };
        let linear = sregs.cs.base.wrapping_add(regs.rip);
        let bytes = match self.fd.translate_gva(linear) {
            Ok(t) if t.valid != 0 => {
                failure::instruction_bytes(self.vm.memory(), t.physical_address)
            }
            _ => Vec::new(),
        };
        let mode_bits = match (sregs.cs.l, sregs.cs.db) {
            (1, _) => 64,
            (_, 1) => 32,
            _ => 16,
        };
        failure::internal(self.fd.get_kvm_run(), regs.rip, mode_bits, &bytes)
    }
}

impl Vcpu for KvmVcpu {
    fn run(&mut self, entry: Entry) -> Result<Exit, EngineError> {
        if self.shutdown {
            return Ok(Exit::Shutdown);
        }
        if let Some(exit) = self.complete(entry)? {
            return Ok(exit);
        }
        self.bell.listen();
        let result = self.run_until_exit();
        self.bell.leave();
        self.vm.count_exit();
        result
    }

    fn load(&mut self, state: &CpuState) -> Result<(), EngineError> {
        let time = self.time();
        if self.index == 0 {
            self.vm.set_guest_time(time.now)?;
        }
        state::load(&self.fd, state, time, self.offers)?;
        self.pending = Pending::Nothing;
        self.ready = None;
        self.shutdown = state.activity == Activity::Shutdown;
        Ok(())
    }

    fn store(&mut self) -> Result<CpuState, EngineError> {
        state::store(&self.fd, self.index, self.time(), self.shutdown)
    }

    fn ticks(&self) -> u64 {
        0
    }

    fn set_tick_limit(&mut self, _limit: Option<u64>) {}

    fn kicker(&self) -> Arc<dyn Kick> {
        Arc::clone(&self.bell) as Arc<dyn Kick>
    }
}

impl Drop for KvmVcpu {
    fn drop(&mut self) {
        self.bell.disconnect();
    }
}
