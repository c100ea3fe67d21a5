//! The engines of this host, and what is known not to work on them.

use lodger_dbt_x86::DbtEngine;
use lodger_interp::InterpEngine;
use lodger_kvm::KvmEngine;
use lodger_vcpu::Engine;

/// An engine to run guests on.
pub struct Candidate {
    pub engine: Box<dyn Engine>,
    /// It emulates kernel code, without some of it, instead of executing it: [`Engine::stock_guest_problem`].
    pub limited: bool,
}

/// All engines that can run something here.
pub fn all() -> Vec<Candidate> {
    let engines: [Box<dyn Engine>; 3] = [
        Box::new(InterpEngine),
        Box::<DbtEngine>::default(),
        Box::new(KvmEngine::new()),
    ];
    let mut usable = Vec::new();
    for engine in engines {
        match engine.probe() {
            Ok(_) => {
                let limited = engine.stock_guest_problem().is_some();
                usable.push(Candidate { engine, limited });
            }
            Err(error) => eprintln!("not run: {error}"),
        }
    }
    usable
}
