//! The task that owns a VM.

use std::sync::Arc;

use lodger_board::{Boot, Machine};
use lodger_x86::CpuState;

use crate::handle::VmHandle;
use crate::outcome::{Failure, Outcome};
use crate::queue::{End, Request};
use crate::report::CrashReport;
use crate::vcpu::VcpuThread;

/// A VM that has been started, but for its vCPUs.
pub struct VmController {
    // The threads end before the machine is dropped.
    vcpus: Vec<VcpuThread>,
    machine: Arc<Machine>,
    handle: VmHandle,
    boot: Boot,
}

impl Drop for VmController {
    /// Also after a panic the vCPUs leave their loops, so that their threads can end.
    fn drop(&mut self) {
        self.handle.stop();
    }
}

impl VmController {
    /// Starts `machine` at power-on. `handle` is the one that the machine has as its
    /// [`MachineControl`](lodger_device_model::MachineControl).
    pub fn start(machine: Arc<Machine>, handle: VmHandle) -> Result<VmController, Failure> {
        // Guest time begins when the vCPUs do.
        machine.clock().pause();
        let power_on = machine.power_on()?;
        tracing::info!("{}", power_on.boot.description);
        let start = |i| VcpuThread::start(i, Arc::clone(&machine), handle.clone());
        let vcpus: Vec<_> = (0..machine.spec().vcpus)
            .map(start)
            .collect::<Result<_, _>>()?;
        let kickers = vcpus.iter().map(VcpuThread::created);
        handle.set_kickers(kickers.collect::<Result<_, _>>()?);
        let controller = VmController {
            vcpus,
            machine,
            handle,
            boot: power_on.boot,
        };
        controller.load(power_on.vcpus)?;
        Ok(controller)
    }

    /// The kernel that it boots.
    pub fn boot(&self) -> &Boot {
        &self.boot
    }

    /// Runs the VM until it ends.
    pub fn run(self) -> Outcome {
        self.machine.clock().resume();
        match self.serve() {
            Ok(outcome) => outcome,
            Err(failure) => Outcome::HostFailure(failure),
        }
    }

    fn serve(&self) -> Result<Outcome, Failure> {
        let mut paused = false;
        loop {
            // Between two requests the vCPUs run, unless the next one is there already.
            let running = !paused && self.handle.clear_halt();
            if running {
                self.vcpus.iter().for_each(VcpuThread::run);
            }
            let request = self.handle.next();
            if running {
                self.wait_until_parked()?;
            }
            match request {
                Request::Pause => {
                    self.machine.pause();
                    paused = true;
                }
                Request::Resume => {
                    self.machine.resume();
                    paused = false;
                }
                Request::Reset => {
                    tracing::info!("the guest resets the machine");
                    self.load(self.machine.power_on()?.vcpus)?;
                    self.handle.reset_done();
                }
                Request::End(end) => return self.outcome(end),
            }
        }
    }

    /// Waits for all vCPUs, also when some fail, so that none runs on.
    fn wait_until_parked(&self) -> Result<(), Failure> {
        let parked: Vec<_> = self.vcpus.iter().map(VcpuThread::parked).collect();
        parked.into_iter().collect()
    }

    fn load(&self, states: Vec<CpuState>) -> Result<(), Failure> {
        let mut vcpus = self.vcpus.iter().zip(states);
        vcpus.try_for_each(|(vcpu, state)| vcpu.load(state))
    }

    fn outcome(&self, end: End) -> Result<Outcome, Failure> {
        Ok(match end {
            End::PoweredOff => Outcome::PoweredOff,
            End::Reset => Outcome::Reset,
            End::DebugExit(value) => Outcome::DebugExit(value),
            End::Stopped => Outcome::Stopped,
            End::Failed(failure) => Outcome::HostFailure(failure),
            End::Crashed(index) => {
                let reports = self.vcpus.iter().map(VcpuThread::report);
                Outcome::Crashed(Box::new(CrashReport {
                    kernel: self.boot.description.clone(),
                    crashed: index,
                    vcpus: reports.collect::<Result<_, _>>()?,
                }))
            }
        })
    }
}
