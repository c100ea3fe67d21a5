//! The requests and answers. Fields may be added within a version; nothing else changes.

use serde::{Deserialize, Serialize};

/// The version of the protocol that this crate speaks.
pub const VERSION: u32 = 1;

/// Asked of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case")]
pub enum Request {
    /// How it is. Answer: [`Answer::Status`].
    Status,
    /// Press the power button; if the machine is still on after `seconds`, end it. No restart follows. Answer, when it has
    /// ended: [`Answer::Stopped`].
    Stop {
        /// Seconds that the guest has.
        seconds: u32,
    },
    /// End it at once, as if the power failed. No restart follows. Answer, when it has ended: [`Answer::Stopped`].
    Kill,
    /// Press the power button and no more. Answer: [`Answer::Done`], or an error if the guest does not listen to it.
    PowerButton,
    /// The terminal at the console has this size now; for machines whose console carries that. Answer: [`Answer::Done`].
    Resize {
        /// Columns.
        columns: u16,
        /// Rows.
        rows: u16,
    },
    /// Stop the vCPUs and guest time. Answer: [`Answer::Done`].
    Pause,
    /// Let them go on. Answer: [`Answer::Done`].
    Resume,
    /// How much memory it has and takes. Answer: [`Answer::Memory`].
    Memory,
    /// Let the guest do with so much RAM, which it gives or takes in its own time. Answer: [`Answer::Done`].
    SetMemory {
        /// Bytes, at most what the machine was built with.
        bytes: u64,
    },
    /// Answer, when the VM has ended for good: [`Answer::Ended`].
    Wait,
    /// After [`Answer::Done`] the connection carries what the guest's console prints, and to the guest what is written to
    /// it. It is closed when the VM ends. Several may be attached at once: all see everything, the guest sees what any of
    /// them types.
    Console,
}

/// Answered to a [`Request`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "kebab-case")]
pub enum Answer {
    /// See [`Request::Status`].
    Status(Status),
    /// It has been done.
    Done,
    /// See [`Request::Stop`] and [`Request::Kill`].
    Stopped {
        /// How it came to its end.
        how: Stopped,
        /// The end itself.
        ending: Ending,
    },
    /// See [`Request::Wait`].
    Ended(Ending),
    /// See [`Request::Memory`].
    Memory(Memory),
    /// It has not been done.
    Error {
        /// For programs.
        kind: ErrorKind,
        /// For people.
        message: String,
    },
}

/// Why something has not been done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorKind {
    /// The request's version is not spoken here.
    Version,
    /// Not a request.
    Malformed,
    /// It makes no sense now: pausing what is paused, for example.
    State,
    /// Too many connections.
    Busy,
    /// A kind that this version does not know.
    #[serde(other)]
    Other,
}

/// How a VM is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Its name.
    pub name: String,
    /// Its id, 12 hexadecimal digits.
    pub id: String,
    /// The monitor's process id.
    pub pid: u32,
    /// What it is doing.
    pub phase: Phase,
    /// When the machine was last started, in seconds since 1970-01-01T00:00:00Z.
    pub started: u64,
    /// How often the restart policy has started it again.
    pub restarts: u32,
    /// The engine that runs it.
    pub engine: String,
}

/// The memory of a VM, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// RAM that the machine was built with.
    pub max: u64,
    /// RAM that the guest was asked to do with.
    pub asked: u64,
    /// RAM that it does with; what is missing is in its balloon.
    pub actual: u64,
    /// What the host has given for RAM so far, less what was given back.
    pub host: u64,
    /// What the guest has reported as free in all, so that the host could take it back.
    pub reported: u64,
    /// Its own figures, if it has a driver that tells them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest: Option<GuestFigures>,
}

/// What a guest tells of its memory, in bytes, as far as it does.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestFigures {
    /// All that it has.
    pub total: Option<u64>,
    /// What is not used.
    pub free: Option<u64>,
    /// What programs can have without swapping.
    pub available: Option<u64>,
    /// What is in its caches of files.
    pub caches: Option<u64>,
}

/// What a VM is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// The machine is being built.
    Starting,
    /// The vCPUs run.
    Running,
    /// The vCPUs and guest time stand still.
    Paused,
    /// It has been asked to end.
    Stopping,
    /// It has ended, and the restart policy will start it again in a moment.
    Restarting,
    /// It has ended for good; the monitor is about to go.
    Ended,
}

/// How a VM that was told to stop came to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stopped {
    /// The guest ended by itself, having felt the power button.
    ByGuest,
    /// The guest did not power off in time after the power button.
    TimedOut,
    /// The guest does not listen to the power button, and did not end in time.
    Deaf,
    /// At once, as asked.
    Killed,
}

/// How a VM ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ending {
    /// The exit status, as of `lodger run`.
    pub status: u8,
    /// The same in words: "the guest powered off".
    pub reason: String,
    /// When, in seconds since 1970-01-01T00:00:00Z.
    pub time: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is on the wire is promised to other programs.
    #[test]
    fn messages_on_the_wire() {
        let requests = [
            (Request::Status, r#"{"request":"status"}"#),
            (
                Request::Stop { seconds: 10 },
                r#"{"request":"stop","seconds":10}"#,
            ),
            (Request::PowerButton, r#"{"request":"power-button"}"#),
            (
                Request::SetMemory { bytes: 7 },
                r#"{"request":"set-memory","bytes":7}"#,
            ),
        ];
        for (request, text) in requests {
            assert_eq!(serde_json::to_string(&request).unwrap(), text);
            assert_eq!(serde_json::from_str::<Request>(text).unwrap(), request);
        }
        let ending = Ending {
            status: 0,
            reason: "the guest powered off".into(),
            time: 7,
        };
        let answers = [
            (Answer::Done, r#"{"answer":"done"}"#),
            (
                Answer::Ended(ending.clone()),
                r#"{"answer":"ended","status":0,"reason":"the guest powered off","time":7}"#,
            ),
            (
                Answer::Stopped {
                    how: Stopped::ByGuest,
                    ending,
                },
                r#"{"answer":"stopped","how":"by-guest","ending":{"status":0,"reason":"the guest powered off","time":7}}"#,
            ),
            (
                Answer::Memory(Memory {
                    max: 5,
                    asked: 4,
                    actual: 3,
                    host: 2,
                    reported: 1,
                    guest: None,
                }),
                r#"{"answer":"memory","max":5,"asked":4,"actual":3,"host":2,"reported":1}"#,
            ),
            (
                Answer::Error {
                    kind: ErrorKind::State,
                    message: "no".into(),
                },
                r#"{"answer":"error","kind":"state","message":"no"}"#,
            ),
        ];
        for (answer, text) in answers {
            assert_eq!(serde_json::to_string(&answer).unwrap(), text);
            assert_eq!(serde_json::from_str::<Answer>(text).unwrap(), answer);
        }
        // Fields may be added, and kinds of errors.
        let newer = r#"{"answer":"error","kind":"tired","message":"no","since":3}"#;
        let expected = Answer::Error {
            kind: ErrorKind::Other,
            message: "no".into(),
        };
        assert_eq!(serde_json::from_str::<Answer>(newer).unwrap(), expected);
    }
}
