//! What is asked of a VM, and what is allowed when. See the state machine in the crate's documentation.
//!
//! No threads and no locks. At most one request waits, because each needs the vCPUs to stand still; an end replaces what
//! waits. The first end counts.

use lodger_device_model::MachineRequest;

use crate::outcome::Failure;

/// Asked of a VM.
#[derive(Debug)]
pub(crate) enum Request {
    Pause,
    Resume,
    /// The guest asks for a reset.
    Reset,
    End(End),
}

/// How a VM ends.
#[derive(Debug)]
pub(crate) enum End {
    PoweredOff,
    Reset,
    DebugExit(u32),
    /// A triple fault of this vCPU.
    Crashed(u32),
    Stopped,
    Failed(Failure),
}

impl From<MachineRequest> for Request {
    fn from(request: MachineRequest) -> Request {
        match request {
            MachineRequest::PowerOff => Request::End(End::PoweredOff),
            MachineRequest::Reset => Request::Reset,
            MachineRequest::DebugExit(value) => Request::End(End::DebugExit(value)),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Running,
    Paused,
    Ended,
}

/// The state and the request that waits.
#[derive(Debug)]
pub(crate) struct RequestQueue {
    state: State,
    waiting: Option<Request>,
    /// A reset ends the VM.
    no_reboot: bool,
}

impl RequestQueue {
    pub(crate) fn new(no_reboot: bool) -> RequestQueue {
        RequestQueue {
            state: State::Running,
            waiting: None,
            no_reboot,
        }
    }

    /// Lets a request in, or not.
    pub(crate) fn submit(&mut self, request: Request) -> bool {
        let request = match request {
            Request::Reset if self.no_reboot => Request::End(End::Reset),
            other => other,
        };
        let allowed = match (&request, &self.waiting, self.state) {
            (_, Some(Request::End(_)), _) | (_, _, State::Ended) => false,
            // What vCPUs do between a reset's request and the reset does not count.
            (Request::End(End::Crashed(_)), Some(Request::Reset), _) => false,
            (Request::End(_), ..) => true,
            (_, Some(_), _) => false,
            (Request::Pause | Request::Reset, None, state) => state == State::Running,
            (Request::Resume, None, state) => state == State::Paused,
        };
        if allowed {
            self.waiting = Some(request);
        }
        allowed
    }

    /// Whether no request waits.
    pub(crate) fn is_empty(&self) -> bool {
        self.waiting.is_none()
    }

    /// Takes the request that waits, to be carried out now.
    pub(crate) fn take(&mut self) -> Option<Request> {
        let request = self.waiting.take()?;
        self.state = match &request {
            Request::Pause => State::Paused,
            Request::Resume | Request::Reset => State::Running,
            Request::End(_) => State::Ended,
        };
        Some(request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(name: &str) -> Request {
        match name {
            "pause" => Request::Pause,
            "resume" => Request::Resume,
            "reset" => Request::Reset,
            "off" => Request::End(End::PoweredOff),
            "crash" => Request::End(End::Crashed(0)),
            "stop" => Request::End(End::Stopped),
            other => panic!("{other}"),
        }
    }

    fn name(request: Option<Request>) -> &'static str {
        match request {
            None => "nothing",
            Some(Request::Pause) => "pause",
            Some(Request::Resume) => "resume",
            Some(Request::Reset) => "reset",
            Some(Request::End(End::PoweredOff)) => "off",
            Some(Request::End(End::Reset)) => "end-reset",
            Some(Request::End(End::Crashed(_))) => "crash",
            Some(Request::End(_)) => "stop",
        }
    }

    #[test]
    fn requests_are_taken_as_the_state_allows() {
        // `+x` is let in, `-x` is refused, `=x` is taken.
        let scripts = [
            "=nothing +reset =reset =nothing +reset =reset",
            "+reset -reset -pause -crash =reset +crash =crash",
            "+reset +off -crash -stop =off -off -stop -reset -pause =nothing",
            "+crash -reset -off =crash",
            "-resume +pause -pause =pause -pause -reset +resume -resume =resume -resume +pause",
            "+pause =pause +stop =stop -resume",
            "+pause +crash =crash",
            "+stop -off =stop",
        ];
        for script in scripts {
            let mut queue = RequestQueue::new(false);
            run(&mut queue, script);
        }
        let mut queue = RequestQueue::new(true);
        run(&mut queue, "+reset -reset -off =end-reset -reset");
    }

    fn run(queue: &mut RequestQueue, script: &str) {
        for step in script.split(' ') {
            let (sign, what) = step.split_at(1);
            match sign {
                "=" => assert_eq!(name(queue.take()), what, "{script}: {step}"),
                _ => assert_eq!(queue.submit(request(what)), sign == "+", "{script}: {step}"),
            }
        }
    }
}
