//! Whether the engine is usable, and what it says if not.

use std::io::Write;

use lodger_kvm::KvmEngine;
use lodger_vcpu::{Engine, EngineError};

#[test]
fn the_host_is_judged_with_a_reason() {
    let engine = KvmEngine::new();
    match engine.probe() {
        Ok(capabilities) => {
            assert!(capabilities.max_vcpus >= 1);
            let problem = engine.stock_guest_problem();
            assert_eq!(capabilities.stock_guests, problem.is_none(), "{problem:?}");
        }
        Err(EngineError::Unusable { engine: "kvm", why }) => {
            assert!(why.contains("/dev/kvm") || why.contains("KVM"), "{why}");
            assert_eq!(
                engine.stock_guest_problem().map(|p| p.contains(&why)),
                Some(true)
            );
        }
        Err(other) => panic!("{other}"),
    }
}

#[test]
fn what_is_no_kvm_is_refused_with_advice() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(b"not a device").unwrap();
    let path = file.path().to_str().unwrap();
    for (device, said) in [
        ("/nonexistent/kvm", "modprobe"),
        (path, "is not KVM"),
        ("/nonexistent\0kvm", "zero byte"),
    ] {
        let error = KvmEngine::on(device).probe().unwrap_err().to_string();
        assert!(error.contains(said), "{device:?}: {error}");
    }
}
