//! The translator as an engine.

use std::arch::is_x86_feature_detected as detected;
use std::sync::Arc;

use lodger_interp::{Cpu, InterpEngine, create_vm};
use lodger_vcpu::{Capabilities, Engine, EngineError, EngineVm, VmConfig};

use crate::run::Dbt;
use crate::stats::{self, Shared};

/// The binary translator as an engine.
#[derive(Debug, Default)]
pub struct DbtEngine {
    /// Status flags that the guest does not use any more are still right when an exception saves them. Slower: for tests.
    pub exact_flags: bool,
}

impl Engine for DbtEngine {
    fn name(&self) -> &'static str {
        "dbt"
    }

    fn probe(&self) -> Result<Capabilities, EngineError> {
        if !(detected!("avx2") && detected!("bmi2")) {
            return Err(EngineError::Unusable {
                engine: self.name(),
                why: "this host's processor lacks AVX2 or BMI2 (processors since about 2013 have them)".into(),
            });
        }
        InterpEngine.probe()
    }

    fn create_vm(&self, config: VmConfig) -> Result<Arc<dyn EngineVm>, EngineError> {
        let exact_flags = self.exact_flags;
        let shared = Shared::default();
        let counters = Arc::clone(&shared);
        let make = move |cpu: &Cpu| Dbt::new(cpu, exact_flags, &counters);
        create_vm(config, make, move || stats::sum(&shared))
    }
}
