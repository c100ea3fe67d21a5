//! The engine, and what the vCPUs of one VM share: RAM, the clock, mailboxes, and the means to stop each other.
//!
//! A vCPU is *executing* while it may touch guest memory through its TLB. Requests to other vCPUs are bits in a word
//! that each looks at before every block. Two of them are waited for:
//! * `PROTECT`: a page has become code; drop the right to write to it without reporting. The sender goes on when the
//!   receiver has done so or is not executing; a vCPU that starts executing serves its requests first.
//! * `PARK`: stop executing until the sender has finished something that must look atomic (a locked access
//!   across pages).
//!
//! Both sides order "set my flag, then look at the other's" with sequential consistency, so one of them sees the other.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use lodger_clock::{Entropy, SharedClock};
use lodger_guest_memory::PAGE_SIZE;
use lodger_host_sys::low::LowBox;
use lodger_lapic::{Address, Ipi, IpiMode};
use lodger_softmmu::Ram;
use lodger_vcpu::{Capabilities, Engine, EngineError, EngineVm, Kick, Vcpu, VmConfig};
use lodger_x86::{CpuModel, CpuidContext};

use crate::cpu::Cpu;
use crate::run::InterpVcpu;
use crate::translator::{Absent, Translator};

/// Request bits of a vCPU.
pub mod request {
    /// Leave `run`.
    pub const KICK: u32 = 1;
    /// The mailbox holds interrupt messages.
    pub const MAIL: u32 = 2;
    /// Pages are to be write-protected.
    pub const PROTECT: u32 = 4;
    /// Wait until the world may go on.
    pub const PARK: u32 = 8;
    /// An interrupt line changed.
    pub const LOOK: u32 = 16;
    /// Code was written.
    pub const CODE: u32 = 32;
    /// A translator's timer has expired.
    pub const TIMER: u32 = 64;
}

/// vCPUs of one VM, at most: APIC IDs below the broadcast address, with room for the IOAPIC.
pub const MAX_VCPUS: u32 = 64;

/// The interpreter as an engine.
#[derive(Debug, Default)]
pub struct InterpEngine;

impl Engine for InterpEngine {
    fn name(&self) -> &'static str {
        "interp"
    }

    fn probe(&self) -> Result<Capabilities, EngineError> {
        let host = crate::host_features();
        if !(host.sse42 && host.popcnt) {
            return Err(EngineError::Unusable {
                engine: self.name(),
                why: "this host's processor lacks SSE4.2 or POPCNT; x86-64-v2 is needed (processors since about 2009)".into(),
            });
        }
        Ok(Capabilities {
            exact_ticks: true,
            dirty_log: true,
            max_vcpus: MAX_VCPUS,
            stock_guests: true,
        })
    }

    fn create_vm(&self, config: VmConfig) -> Result<Arc<dyn EngineVm>, EngineError> {
        Ok(Arc::new(InterpVm {
            shared: Arc::new(VmShared::new(config)?),
            make: |_: &Cpu| Ok(Absent),
            stats: Vec::new,
        }))
    }
}

/// Makes a VM whose vCPUs run code by the translators that `make` gives.
/// `stats` is [`EngineVm::stats`].
pub fn create_vm<T: Translator + 'static>(
    config: VmConfig,
    make: impl Fn(&Cpu) -> Result<T, EngineError> + Send + Sync + 'static,
    stats: impl Fn() -> Vec<(String, u64)> + Send + Sync + 'static,
) -> Result<Arc<dyn EngineVm>, EngineError> {
    let memory = config.memory.clone();
    let shared = Arc::new(VmShared::new(config)?);
    for range in memory.ranges() {
        let start = range.start;
        let vm = Arc::downgrade(&shared);
        let first = memory.host_page(start).expect("a range starts with RAM");
        first.tracker.on_code_write(move |page| {
            let vm = vm.upgrade();
            vm.iter()
                .for_each(|vm| vm.code_written(start + page as u64 * PAGE_SIZE));
            vm.is_some()
        });
    }
    Ok(Arc::new(InterpVm {
        shared,
        make,
        stats,
    }))
}

struct InterpVm<F, S> {
    shared: Arc<VmShared>,
    /// Makes a vCPU's translator.
    make: F,
    stats: S,
}

impl<T, F, S> EngineVm for InterpVm<F, S>
where
    T: Translator + 'static,
    F: Fn(&Cpu) -> Result<T, EngineError> + Send + Sync,
    S: Fn() -> Vec<(String, u64)> + Send + Sync,
{
    fn stats(&self) -> Vec<(String, u64)> {
        (self.stats)()
    }

    fn create_vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>, EngineError> {
        let vm = Arc::clone(&self.shared);
        Ok(Box::new(InterpVcpu::new(index, vm, &self.make)?))
    }

    fn send_msi(&self, address: u64, data: u32) {
        if let Some(ipi) = Ipi::from_msi(address, data) {
            self.shared.send(ipi, None);
        }
    }

    fn set_intr(&self, level: bool) {
        self.shared.intr.store(level, SeqCst);
        if level {
            self.shared.vcpus[0].request(request::LOOK);
        }
    }
}

/// What the vCPUs of one VM share.
pub struct VmShared {
    pub ram: Ram,
    pub clock: SharedClock,
    pub entropy: Entropy,
    pub model: Arc<CpuModel>,
    /// Physical address bits (CPUID 8000_0008h).
    pub physical_bits: u32,
    /// The model is a processor of AMD's.
    pub is_amd: bool,
    /// Control register bits that the model has.
    pub cr4_bits: u64,
    pub xcr0_bits: u64,
    pub efer_bits: u64,
    /// The 8259's INTR output.
    pub intr: AtomicBool,
    pub vcpus: Vec<Mailbox>,
    /// Held by the vCPU for which the others stand still.
    world: Mutex<()>,
}

/// What other threads see of a vCPU.
pub struct Mailbox {
    /// Low in memory, for translated code.
    pub requests: LowBox<AtomicU32>,
    executing: AtomicBool,
    messages: Mutex<Vec<Ipi>>,
    protect: Mutex<Protect>,
    /// Guest-physical pages whose code was written.
    code: Mutex<Vec<u64>>,
    /// How many protections have been carried out.
    protected: AtomicU64,
    /// The local APIC's [`Address`].
    pub address: AtomicU64,
    asleep: Mutex<()>,
    wake: Condvar,
}

#[derive(Default)]
struct Protect {
    pages: Vec<u64>,
    /// How many protections have ever been asked for.
    asked: u64,
}

/// The host's memory is at an end, where it matters.
pub fn no_memory(source: std::io::Error) -> EngineError {
    EngineError::Host {
        what: "cannot get memory for a vCPU in the lowest 2 GiB of the address space".into(),
        source,
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("a vCPU thread panicked")
}

impl VmShared {
    fn new(config: VmConfig) -> Result<VmShared, EngineError> {
        if !(1..=MAX_VCPUS).contains(&config.vcpus) {
            return Err(EngineError::Unusable {
                engine: "software",
                why: format!(
                    "{} vCPUs were asked for, it has 1 to {MAX_VCPUS}",
                    config.vcpus
                ),
            });
        }
        let [size, ..] = config
            .model
            .lookup(0x8000_0008, 0, &CpuidContext::default());
        let [_, vendor, ..] = config.model.lookup(0, 0, &CpuidContext::default());
        Ok(VmShared {
            ram: Ram::new(&config.memory),
            clock: config.clock,
            entropy: config.entropy,
            is_amd: vendor == u32::from_le_bytes(*b"Auth"),
            physical_bits: (size & 0xff).clamp(32, 52),
            cr4_bits: config.model.cr4_bits(),
            xcr0_bits: config.model.xcr0_bits(),
            efer_bits: config.model.efer_bits(),
            model: config.model,
            intr: AtomicBool::new(false),
            vcpus: (0..config.vcpus)
                .map(|_| Mailbox::new())
                .collect::<Result<_, _>>()?,
            world: Mutex::new(()),
        })
    }

    /// Tells every vCPU that guest-physical `page` held code and was written. Each holds the page's code again before this can happen
    /// again, so the lists stay short.
    fn code_written(&self, page: u64) {
        for vcpu in &self.vcpus {
            let mut pages = lock(&vcpu.code);
            if !pages.contains(&page) {
                pages.push(page);
            }
            drop(pages);
            vcpu.request(request::CODE);
        }
    }

    /// Delivers an interrupt message; `sender`: the vCPU that sent it.
    pub fn send(&self, ipi: Ipi, sender: Option<u32>) {
        let addresses: Vec<Address> = self
            .vcpus
            .iter()
            .map(|v| Address::from_bits(v.address.load(SeqCst)))
            .collect();
        for target in ipi.targets(&addresses, sender.map(|s| s as usize)) {
            enqueue(&mut lock(&self.vcpus[target].messages), ipi);
            self.vcpus[target].request(request::MAIL);
        }
    }
}

/// Adds a message to those that wait. What would have no effect of its own is left out, so that a guest that sends faster
/// than the receiver reads cannot make the queue grow: an interrupt that is requested already, a start-up message behind another, and
/// whatever an INIT undoes.
fn enqueue(waiting: &mut Vec<Ipi>, ipi: Ipi) {
    if ipi.mode == IpiMode::Init {
        waiting.retain(|w| !matches!(w.mode, IpiMode::Init | IpiMode::StartUp));
    }
    let same = |w: &Ipi| {
        w.mode == ipi.mode
            && (ipi.mode == IpiMode::StartUp || (w.vector, w.level) == (ipi.vector, ipi.level))
    };
    if !waiting.iter().any(same) {
        waiting.push(ipi);
    }
}

impl Mailbox {
    fn new() -> Result<Mailbox, EngineError> {
        let requests = LowBox::new(AtomicU32::new(0)).map_err(no_memory)?;
        Ok(Mailbox {
            requests,
            executing: AtomicBool::new(false),
            messages: Mutex::new(Vec::new()),
            protect: Mutex::new(Protect::default()),
            code: Mutex::new(Vec::new()),
            protected: AtomicU64::new(0),
            address: AtomicU64::new(0),
            asleep: Mutex::new(()),
            wake: Condvar::new(),
        })
    }

    /// Sets request bits and wakes the vCPU if it sleeps.
    pub fn request(&self, bits: u32) {
        let old = self.requests.fetch_or(bits, SeqCst);
        if old & bits != bits {
            drop(lock(&self.asleep));
            self.wake.notify_all();
        }
    }

    /// Takes back one request bit; whether it was set.
    pub fn take(&self, bit: u32) -> bool {
        self.requests.load(SeqCst) & bit != 0 && self.requests.fetch_and(!bit, SeqCst) & bit != 0
    }

    /// Takes the pages whose code was written.
    pub fn take_code_writes(&self) -> Vec<u64> {
        std::mem::take(&mut *lock(&self.code))
    }

    /// Takes the messages that have arrived.
    pub fn take_messages(&self) -> Vec<Ipi> {
        std::mem::take(&mut *lock(&self.messages))
    }

    /// Sleeps until there is a request or `timeout` has passed.
    pub fn sleep(&self, timeout: Option<Duration>) {
        let guard = lock(&self.asleep);
        if self.requests.load(SeqCst) != 0 {
            return;
        }
        match timeout {
            None => drop(self.wake.wait(guard)),
            Some(t) => drop(self.wake.wait_timeout(guard, t)),
        }
    }
}

impl Kick for Handle {
    fn kick(&self) {
        self.vm.vcpus[self.index as usize].request(request::KICK);
    }
}

/// A vCPU as other threads hold it.
pub struct Handle {
    pub vm: Arc<VmShared>,
    pub index: u32,
}

/// All other vCPUs stand still as long as this exists.
pub struct World<'a> {
    vm: &'a VmShared,
    index: u32,
    _alone: MutexGuard<'a, ()>,
}

impl Drop for World<'_> {
    fn drop(&mut self) {
        for (i, other) in self.vm.vcpus.iter().enumerate() {
            if i != self.index as usize {
                other.requests.fetch_and(!request::PARK, SeqCst);
            }
        }
    }
}

impl Cpu {
    fn mailbox(&self) -> &Mailbox {
        &self.vm.vcpus[self.index as usize]
    }

    /// Begins or ends touching guest memory.
    pub fn set_executing(&self, executing: bool) {
        self.mailbox().executing.store(executing, SeqCst);
    }

    /// Lets other threads of the host run first, if there are other vCPUs that this one may be waiting for.
    pub fn yield_now(&mut self) {
        if self.vm.vcpus.len() > 1 {
            self.set_executing(false);
            std::thread::yield_now();
            self.set_executing(true);
            self.serve_others();
        }
    }

    /// Serves the requests that others wait for. Called before guest memory is touched after a pause, and while waiting.
    pub fn serve_others(&mut self) {
        let vm = Arc::clone(&self.vm);
        let me = &vm.vcpus[self.index as usize];
        // The bit is cleared by whoever set it, before the lock is released. The next one may have found this vCPU
        // not executing meanwhile, so look again after saying that it is.
        while me.requests.load(SeqCst) & request::PARK != 0 {
            me.executing.store(false, SeqCst);
            drop(lock(&vm.world));
            me.executing.store(true, SeqCst);
        }
        if me.requests.load(SeqCst) & request::PROTECT != 0 {
            let mut protect = lock(&me.protect);
            me.requests.fetch_and(!request::PROTECT, SeqCst);
            for page in protect.pages.drain(..) {
                self.changes.protect(page);
                self.tlb.protect(page);
            }
            me.protected.store(protect.asked, SeqCst);
        }
    }

    /// Takes from every vCPU the right to write to guest-physical `page` without reporting.
    pub fn protect_everywhere(&mut self, page: u64) {
        self.tlb.protect(page);
        self.changes.protect(page);
        let vm = Arc::clone(&self.vm);
        for (i, other) in vm.vcpus.iter().enumerate() {
            if i == self.index as usize {
                continue;
            }
            let ticket = {
                let mut protect = lock(&other.protect);
                protect.pages.push(page);
                protect.asked += 1;
                protect.asked
            };
            other.requests.fetch_or(request::PROTECT, SeqCst);
            while other.executing.load(SeqCst) && other.protected.load(SeqCst) < ticket {
                self.serve_others();
                std::thread::yield_now();
            }
        }
    }

    /// Stops all other vCPUs until the result is dropped.
    pub fn stop_others<'a>(&mut self, vm: &'a VmShared) -> World<'a> {
        self.set_executing(false);
        let alone = lock(&vm.world);
        self.set_executing(true);
        for (i, other) in vm.vcpus.iter().enumerate() {
            if i != self.index as usize {
                other.requests.fetch_or(request::PARK, SeqCst);
                while other.executing.load(SeqCst) {
                    std::thread::yield_now();
                }
            }
        }
        let world = World {
            vm,
            index: self.index,
            _alone: alone,
        };
        // What was asked while this vCPU waited.
        self.serve_others();
        world
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lodger_lapic::Destination;

    fn ipi(mode: IpiMode, vector: u8, destination: u32) -> Ipi {
        Ipi {
            destination: Destination::Physical(destination),
            mode,
            vector,
            level: false,
        }
    }

    #[test]
    fn a_flood_of_messages_stays_bounded_and_keeps_its_effect() {
        use IpiMode::*;
        let mut waiting = Vec::new();
        for n in 0..100_000_u32 {
            for mode in [Fixed, Nmi, Init, StartUp] {
                enqueue(&mut waiting, ipi(mode, n as u8, n));
            }
        }
        assert!(waiting.len() <= 256 + 256 + 2, "{}", waiting.len());
        let modes: Vec<_> = waiting[waiting.len() - 2..]
            .iter()
            .map(|w| w.mode)
            .collect();
        assert_eq!(modes, [Init, StartUp], "the last INIT and what followed it");
        enqueue(&mut waiting, ipi(Init, 0, 0));
        assert!(
            waiting.iter().all(|w| w.mode != StartUp),
            "INIT waits again"
        );
    }
}
