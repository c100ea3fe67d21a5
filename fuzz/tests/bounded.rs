//! Every target for a bounded time, always on the same inputs as far as that goes.

use std::time::Duration;

use lodger_fuzz::TARGETS;
use lodger_fuzz::runner::{Bound, input, run};

/// One test, because the targets of a process must not run at the same time.
#[test]
fn targets_survive() {
    let bound = Bound {
        runs: 20_000,
        time: Duration::from_secs(3),
    };
    for target in TARGETS {
        match run(target, 0, bound) {
            Ok(runs) => println!("{}: {runs} inputs", target.name),
            Err(failure) => panic!("{}: {failure}", target.name),
        }
    }
}

#[test]
fn inputs_are_made_again_from_their_number() {
    let samples = [b"a sample".to_vec(), vec![7; 300]];
    for seed in 0..200 {
        assert_eq!(input(&samples, seed), input(&samples, seed));
    }
    let different = (0..200)
        .map(|s| input(&samples, s))
        .collect::<std::collections::BTreeSet<_>>();
    assert!(different.len() > 150);
}
