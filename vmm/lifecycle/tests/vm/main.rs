//! VMs from start to end, with vCPUs that follow scripts.

mod script;

use lodger_lifecycle::{Failure, Outcome, Policy};
use lodger_vcpu::{Entry, Exit};

use script::Step::{Endless, Fail, Panic, Spin};
use script::{Scripts, Step, rig};

const REBOOT: Policy = Policy { no_reboot: false };
const NO_REBOOT: Policy = Policy { no_reboot: true };

const POWER_OFF: Step = Step::Exit(Exit::PortWrite {
    port: 0x604,
    size: 2,
    value: 0x3400,
});
const RESET: Step = Step::Exit(Exit::PortWrite {
    port: 0xcf9,
    size: 1,
    value: 6,
});
const DEBUG_EXIT: Step = Step::Exit(Exit::PortWrite {
    port: 0xf4,
    size: 1,
    value: 0x21,
});
const CRASH: Step = Step::Exit(Exit::Shutdown);
const POLL: Step = Endless(Exit::PortRead {
    port: 0x3fd,
    size: 1,
});

/// The outcome in a word.
fn word(outcome: Outcome) -> String {
    match outcome {
        Outcome::PoweredOff => "off".into(),
        Outcome::Reset => "reset".into(),
        Outcome::DebugExit(value) => format!("exit {value:#x}"),
        Outcome::Crashed(report) => format!("crash {}", report.crashed),
        Outcome::Stopped => "stopped".into(),
        Outcome::HostFailure(failure) => format!("failure: {failure}"),
    }
}

#[test]
fn a_vm_ends_as_the_guest_asks() {
    let cases: &[(Scripts, Policy, &str)] = &[
        (&[&[&[POWER_OFF]]], REBOOT, "off"),
        (&[&[&[DEBUG_EXIT]]], REBOOT, "exit 0x21"),
        (&[&[&[RESET]]], NO_REBOOT, "reset"),
        (&[&[&[CRASH]]], REBOOT, "crash 0"),
        (&[&[&[POLL], &[CRASH]]], REBOOT, "crash 1"),
        (&[&[&[POWER_OFF], &[POLL], &[Spin], &[POLL]]], REBOOT, "off"),
        // Twice reset, then off; the first asks several times.
        (
            &[
                &[&[RESET, RESET, RESET], &[Spin]],
                &[&[Spin], &[RESET]],
                &[&[POWER_OFF], &[POLL]],
            ],
            REBOOT,
            "off",
        ),
        // What happens between the request and the reset does not count.
        (&[&[&[RESET, CRASH]], &[&[POWER_OFF]]], REBOOT, "off"),
        (&[&[&[RESET, CRASH]]], NO_REBOOT, "reset"),
        (&[&[&[POWER_OFF, RESET, DEBUG_EXIT, CRASH]]], REBOOT, "off"),
        (
            &[&[&[Fail]]],
            REBOOT,
            "failure: vCPU 0: the engine stopped: out of order",
        ),
        (
            &[&[&[POLL], &[Panic]]],
            REBOOT,
            "failure: thread vcpu1 panicked; this is a bug in Lodger",
        ),
    ];
    for &(scripts, policy, expected) in cases {
        let outcome = rig(scripts, policy, None).run();
        assert_eq!(word(outcome), expected, "{scripts:?}");
    }
}

#[test]
fn exits_are_answered() {
    const SCRIPT: Scripts = &[&[&[
        Step::Exit(Exit::PortRead {
            port: 0x402,
            size: 2,
        }),
        Step::Exit(Exit::MmioRead {
            address: 0xe000_0000,
            size: 4,
        }),
        Step::Exit(Exit::MmioWrite {
            address: 0xd000_0000,
            size: 8,
            value: 1,
        }),
        Step::Exit(Exit::InterruptAcknowledge),
        Step::Exit(Exit::Eoi(0x31)),
        Step::Exit(Exit::TickLimit),
        Step::Exit(Exit::Kicked),
        DEBUG_EXIT,
    ]]];
    let rig = rig(SCRIPT, REBOOT, None);
    assert_eq!(word(rig.run()), "exit 0x21");
    let entries = [
        Entry::Resume,
        Entry::Data(0xffff),
        Entry::Data(0x0008_1b36),
        Entry::Written,
        Entry::Interrupt(None),
        Entry::Resume,
        Entry::Resume,
        Entry::Resume,
        Entry::Written,
    ];
    assert_eq!(*rig.entries.lock().unwrap(), entries);
}

#[test]
fn stopping_ends_every_guest() {
    const SCRIPTS: [Scripts; 2] = [&[&[&[POLL], &[Spin]]], &[&[&[Spin], &[POLL]]]];
    for scripts in SCRIPTS {
        let rig = rig(scripts, REBOOT, None);
        let controller = rig.start().unwrap();
        let vm = std::thread::spawn(|| controller.run());
        rig.handle.stop();
        assert_eq!(word(vm.join().unwrap()), "stopped");
    }
    // Also before it has begun.
    let rig = rig(&[&[&[POLL]]], REBOOT, None);
    rig.handle.stop();
    assert_eq!(word(rig.run()), "stopped");
}

#[test]
fn guest_time_stands_still_before_the_start_and_in_a_pause() {
    let rig = rig(&[&[&[POLL], &[Spin]]], REBOOT, None);
    let controller = rig.start().unwrap();
    let clock = rig.machine.clock().clone();
    let before = clock.now();
    let runs = || rig.entries.lock().unwrap().len();
    assert_eq!((runs(), clock.now()), (0, before));
    assert!(!rig.handle.resume(), "it is not paused");
    let vm = std::thread::spawn(|| controller.run());
    let wait_for = |condition: &dyn Fn() -> bool| {
        while !condition() {
            std::thread::yield_now();
        }
    };
    wait_for(&|| runs() > 10);
    assert!(rig.handle.pause());
    // It is paused once it can be resumed; and then nothing has run on.
    wait_for(&|| {
        let at = clock.now();
        std::thread::sleep(std::time::Duration::from_millis(1));
        at == clock.now()
    });
    let (at, ran) = (clock.now(), runs());
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert_eq!((clock.now(), runs()), (at, ran));
    assert!(!rig.handle.pause(), "it is paused already");
    assert!(rig.handle.resume());
    wait_for(&|| runs() > ran);
    wait_for(&|| clock.now() > at);
    rig.handle.stop();
    assert_eq!(word(vm.join().unwrap()), "stopped");
}

#[test]
fn a_paused_vm_can_be_stopped() {
    let rig = rig(&[&[&[POLL]]], REBOOT, None);
    let controller = rig.start().unwrap();
    let vm = std::thread::spawn(|| controller.run());
    assert!(rig.handle.pause());
    rig.handle.stop();
    assert_eq!(word(vm.join().unwrap()), "stopped");
}

#[test]
fn a_vcpu_that_cannot_be_made_fails_the_start() {
    let rig = rig(&[&[&[POLL], &[Spin], &[Spin]]], REBOOT, Some(1));
    match rig.start() {
        Err(Failure::Engine { vcpu: 1, .. }) => {}
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("it started"),
    }
}

#[test]
fn a_kernel_that_is_gone_at_a_reset_is_a_host_failure() {
    let rig = rig(&[&[&[RESET], &[POLL]]], REBOOT, None);
    let controller = rig.start().unwrap();
    let kernel = rig.machine.spec().boot.kernel.clone();
    std::fs::remove_file(&kernel).unwrap();
    let outcome = word(controller.run());
    assert!(outcome.contains(kernel.to_str().unwrap()), "{outcome}");
}

#[test]
fn the_crash_report_can_be_read() {
    const SCRIPT: Scripts = &[&[
        &[
            Step::Exit(Exit::Eoi(0x30)),
            Step::Exit(Exit::Eoi(0x30)),
            Step::Exit(Exit::PortWrite {
                port: 0x80,
                size: 1,
                value: 7,
            }),
            CRASH,
        ],
        &[Spin],
    ]];
    let Outcome::Crashed(report) = rig(SCRIPT, REBOOT, None).run() else {
        panic!("it did not crash");
    };
    let text = report.to_string();
    for part in [
        "triple fault of vCPU 0",
        "kernel: Multiboot",
        "vCPU 0 after 4 instructions",
        "  rip 000000000000fff0  rflags 0000000000000002",
        "cs   f000  base 00000000ffff0000",
        "  000000000000fff0  ud2",
        "  end of interrupt 0x30  (2 times)",
        "  out   port 0x0080, 8 bits: 0x7",
        "vCPU 1: WaitForSipi",
    ] {
        assert!(text.contains(part), "{part:?} is not in:\n{text}");
    }
}
