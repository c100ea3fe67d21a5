//! What a VM is started from: kept in its directory as the record's `spec`, so that it can be started again.

use std::str::FromStr;
use std::time::Duration;

use lodger_board::MachineSpec;
use serde::{Deserialize, Serialize};

use crate::cli::EngineChoice;

/// See the module documentation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VmSpec {
    /// What runs it.
    pub engine: EngineChoice,
    /// A reset ends it.
    #[serde(default)]
    pub no_reboot: bool,
    /// Whether it is started again when it has ended.
    #[serde(default)]
    pub restart: Restart,
    /// The engine's counters are told at the end.
    #[serde(default)]
    pub stats: bool,
    /// It boots an image, which can be told the terminal's size.
    #[serde(default)]
    pub image: bool,
    /// It runs the program of an image from a registry: what the guest writes to the debug-exit port is the program's status.
    #[serde(default)]
    pub container: bool,
    /// The machine.
    pub machine: MachineSpec,
}

/// When an ended VM is started again. One that the user has stopped is not.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Restart {
    /// Never.
    #[default]
    No,
    /// When its status is not 0, at most so many times in a row.
    OnFailure(Option<u32>),
    /// Whenever it ends.
    Always,
}

/// A run of this length is a success: the next wait is the shortest one again, and the count begins anew.
const GOOD_RUN: Duration = Duration::from_secs(10);
const SHORTEST: Duration = Duration::from_millis(100);
const LONGEST: Duration = Duration::from_secs(60);

impl Restart {
    /// How long to wait before the VM is started again, if it is, after a run of this length that ended with `status`.
    /// `tries` counts the restarts in a row.
    pub fn delay(self, status: u8, run: Duration, tries: &mut u32) -> Option<Duration> {
        if run >= GOOD_RUN {
            *tries = 0;
        }
        let again = match self {
            Restart::No => false,
            Restart::OnFailure(max) => status != 0 && max.is_none_or(|max| *tries < max),
            Restart::Always => true,
        };
        again.then(|| {
            let delay = SHORTEST.saturating_mul(1 << (*tries).min(20));
            *tries += 1;
            delay.min(LONGEST)
        })
    }
}

impl FromStr for Restart {
    type Err = String;

    fn from_str(text: &str) -> Result<Restart, String> {
        match text.split_once(':') {
            None if text == "no" => Ok(Restart::No),
            None if text == "on-failure" => Ok(Restart::OnFailure(None)),
            None if text == "always" => Ok(Restart::Always),
            Some(("on-failure", max)) => {
                let max = max
                    .parse()
                    .map_err(|_| format!("'{max}' is not a number"))?;
                Ok(Restart::OnFailure(Some(max)))
            }
            _ => Err("policies are no, on-failure, on-failure:N and always".into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies() {
        // Policy, status, restarts that follow when every run is short.
        for (policy, status, restarts) in [
            ("no", 1, 0),
            ("on-failure", 0, 0),
            ("on-failure", 3, 50),
            ("on-failure:2", 3, 2),
            ("on-failure:0", 3, 0),
            ("always", 0, 50),
        ] {
            let policy: Restart = policy.parse().unwrap();
            let mut tries = 0;
            let again = (0..50).take_while(|_| {
                let delay = policy.delay(status, Duration::ZERO, &mut tries);
                delay.is_some_and(|delay| (SHORTEST..=LONGEST).contains(&delay))
            });
            assert_eq!(again.count(), restarts, "{policy:?}");
        }
        for bad in ["", "never", "on-failure:", "on-failure:x", "always:2"] {
            assert!(bad.parse::<Restart>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_good_run_begins_anew() {
        let mut tries = 0;
        let policy = Restart::OnFailure(Some(1));
        for _ in 0..5 {
            assert_eq!(policy.delay(1, GOOD_RUN, &mut tries), Some(SHORTEST));
        }
        assert_eq!(policy.delay(1, Duration::ZERO, &mut tries), None);
    }
}
