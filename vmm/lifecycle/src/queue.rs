//! What is asked of a VM, and what is allowed when. See the state machine in the crate's documentation.
//!
//! No threads and no locks. The vCPUs run on for a moment after a request has been let in, so the guest may ask for more:
//! the first end counts, and what it asks for between a reset's request and the reset does not count.

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

impl Request {
    /// Whether it comes from the guest, rather than from the user or the host.
    fn is_guests(&self) -> bool {
        match self {
            Request::Pause | Request::Resume => false,
            Request::Reset => true,
            Request::End(end) => !matches!(end, End::Stopped | End::Failed(_)),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Running,
    Paused,
    /// The reset is being carried out.
    Resetting,
    Ended,
}

/// The state and the requests that wait: at most one of each kind.
#[derive(Debug)]
pub(crate) struct RequestQueue {
    state: State,
    end: Option<End>,
    reset: bool,
    /// A pause if running, a resumption if paused.
    toggle: bool,
    /// A reset ends the VM.
    no_reboot: bool,
}

impl RequestQueue {
    pub(crate) fn new(no_reboot: bool) -> RequestQueue {
        RequestQueue {
            state: State::Running,
            end: None,
            reset: false,
            toggle: false,
            no_reboot,
        }
    }

    /// Lets a request in, or not.
    pub(crate) fn submit(&mut self, request: Request) -> bool {
        let resetting = self.reset || self.state == State::Resetting;
        if self.state == State::Ended || self.end.is_some() || resetting && request.is_guests() {
            return false;
        }
        let paused = self.state == State::Paused;
        match request {
            Request::Pause if paused || self.toggle => return false,
            Request::Resume if !paused || self.toggle => return false,
            Request::Pause | Request::Resume => self.toggle = true,
            Request::Reset if self.no_reboot => self.end = Some(End::Reset),
            Request::Reset => self.reset = true,
            Request::End(end) => self.end = Some(end),
        }
        true
    }

    /// Whether there is nothing to take.
    pub(crate) fn is_empty(&self) -> bool {
        let reset = self.reset && self.state == State::Running;
        self.end.is_none() && !self.toggle && !reset
    }

    /// Takes a request, to be carried out now. The vCPUs may still be running for a moment. A reset waits until a pause is
    /// over, and is over with [`RequestQueue::reset_done`].
    pub(crate) fn take(&mut self) -> Option<Request> {
        assert_ne!(self.state, State::Resetting, "a reset is not over");
        if let Some(end) = self.end.take() {
            self.state = State::Ended;
            return Some(Request::End(end));
        }
        if self.reset && self.state == State::Running {
            (self.reset, self.state) = (false, State::Resetting);
            return Some(Request::Reset);
        }
        if !std::mem::take(&mut self.toggle) {
            return None;
        }
        Some(match self.state {
            State::Paused => {
                self.state = State::Running;
                Request::Resume
            }
            _ => {
                self.state = State::Paused;
                Request::Pause
            }
        })
    }

    /// The reset has been carried out: from now on the guest is a new one.
    pub(crate) fn reset_done(&mut self) {
        assert_eq!(self.state, State::Resetting);
        self.state = State::Running;
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
        // `+x` is let in, `-x` is refused, `=x` is taken, `!` ends a reset.
        let scripts = [
            "=nothing +reset =reset ! =nothing +reset =reset !",
            "+reset -reset -crash -off =reset -reset -crash -off ! =nothing +crash =crash",
            "+reset +stop -crash -stop =stop -off -stop -reset -pause =nothing",
            "+reset =reset +stop ! =stop",
            "+crash -reset -off -stop =crash",
            "-resume +pause -pause =pause -pause +resume -resume =resume -resume +pause",
            "+pause =pause +stop =stop -resume",
            "+pause +crash =crash",
            "+pause =pause +off =off",
            "+pause +reset =reset ! =pause",
            "+pause =pause +reset -crash =nothing +resume =resume =reset ! =nothing",
            "+reset =reset +pause ! =pause",
            "+stop -off =stop",
        ];
        for script in scripts {
            run(&mut RequestQueue::new(false), script);
        }
        run(
            &mut RequestQueue::new(true),
            "+reset -reset -off =end-reset -reset",
        );
    }

    fn run(queue: &mut RequestQueue, script: &str) {
        for step in script.split(' ') {
            let (sign, what) = step.split_at(1);
            match sign {
                "=" => {
                    let empty = queue.is_empty();
                    let taken = name(queue.take());
                    assert_eq!(taken, what, "{script}: {step}");
                    assert_eq!(empty, what == "nothing", "{script}: {step}");
                }
                "!" => queue.reset_done(),
                _ => assert_eq!(queue.submit(request(what)), sign == "+", "{script}: {step}"),
            }
        }
    }
}
