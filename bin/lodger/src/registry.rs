//! Everything that is linked in and chosen at run time: the engines. Nothing else names one.

use lodger_dbt_x86::DbtEngine;
use lodger_interp::InterpEngine;
pub use lodger_interp::host_features;
use lodger_kvm::KvmEngine;
use lodger_vcpu::{Engine, EngineError};

use crate::cli::EngineChoice;
use crate::status::Error;

/// An engine, and why this one.
pub struct Chosen {
    /// The engine.
    pub engine: Box<dyn Engine>,
    /// The reason, for a person.
    pub reason: String,
    /// Why the engine cannot run stock systems, if it cannot.
    pub only_simple_guests: Option<String>,
    /// The frequency of its time-stamp counter in kHz.
    pub tsc_khz: u32,
}

/// The time-stamp counter of software engines: one cycle is half a nanosecond.
const SOFTWARE_TSC_KHZ: u32 = 2_000_000;

/// All engines, fastest first.
pub fn engines() -> Vec<Box<dyn Engine>> {
    vec![
        Box::new(KvmEngine::default()),
        dbt(),
        Box::new(InterpEngine),
    ]
}

fn dbt() -> Box<dyn Engine> {
    Box::<DbtEngine>::default()
}

/// The engine that the user asked for, or the best one that works here.
pub fn choose(choice: EngineChoice) -> Result<Chosen, Error> {
    let kvm = || -> Box<dyn Engine> { Box::new(KvmEngine::default()) };
    let software = |engine, reason| Chosen {
        engine,
        reason,
        only_simple_guests: None,
        tsc_khz: SOFTWARE_TSC_KHZ,
    };
    let kvm_chosen = |engine: Box<dyn Engine>, reason: &str, problem| Chosen {
        engine,
        reason: reason.into(),
        only_simple_guests: problem,
        tsc_khz: lodger_host_sys::tsc::frequency_khz(),
    };
    match choice {
        EngineChoice::Dbt => match DbtEngine::default().probe() {
            Ok(_) => Ok(software(dbt(), "asked for".into())),
            Err(error) => Err(Error::Engine(format!(
                "{error}; --engine interp works everywhere"
            ))),
        },
        EngineChoice::Interp => Ok(software(Box::new(InterpEngine), "asked for".into())),
        EngineChoice::Kvm => {
            let engine = kvm();
            match engine.probe() {
                Ok(_) => {
                    let problem = engine.stock_guest_problem();
                    Ok(kvm_chosen(engine, "asked for", problem))
                }
                Err(error) => Err(Error::Engine(format!(
                    "{error}; --engine interp works everywhere"
                ))),
            }
        }
        EngineChoice::Auto => {
            let engine = kvm();
            let why_not = match engine.probe() {
                Err(EngineError::Unusable { why, .. }) => why,
                Err(error) => error.to_string(),
                Ok(_) => match engine.stock_guest_problem() {
                    None => return Ok(kvm_chosen(engine, "this host has it, and it works", None)),
                    Some(problem) => problem,
                },
            };
            tracing::info!("not kvm: {why_not}");
            let reason = format!(
                "not kvm: {} (more: lodger doctor)",
                first_sentence(&why_not)
            );
            Ok(match DbtEngine::default().probe() {
                Ok(_) => software(dbt(), reason),
                Err(error) => software(Box::new(InterpEngine), format!("{reason}; {error}")),
            })
        }
    }
}

/// What is wrong, without what to do about it.
fn first_sentence(text: &str) -> &str {
    text.split_once(". ").map_or(text, |(first, _)| first)
}
