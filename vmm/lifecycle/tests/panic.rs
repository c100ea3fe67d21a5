//! A panic anywhere ends the VM. In a process of its own, because it changes the panic hook.

#[path = "vm/script.rs"]
#[expect(dead_code, reason = "the other tests use the rest")]
mod script;

use lodger_lifecycle::{Failure, Outcome, Policy};

use script::Step::Spin;

#[test]
fn a_panic_in_a_timer_ends_the_vm() {
    let rig = script::rig(&[&[&[Spin]]], Policy::default(), None);
    rig.handle.fail_on_panic();
    let controller = rig.start().unwrap();
    let clock = rig.machine.clock();
    let timer = clock.timer(Box::new(|| panic!("a bug, made for this test")));
    timer.arm(clock.now());
    match controller.run() {
        Outcome::HostFailure(Failure::Panicked { thread }) => assert_eq!(thread, "clock"),
        other => panic!("{other:?}"),
    }
}
