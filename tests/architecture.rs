//! The laws of the floor plan (ARCHITECTURE.md) that a program can check: which room may know which, where unsafe code
//! may be, how long a file may get.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Every room and the rooms it may depend on. `test:` marks dependencies of tests only.
const EDGES: &str = "
support/host_sys:
support/clock:
memory/guest_memory:
memory/address_space:
isa/x86:
engine/vcpu: support/clock memory/guest_memory isa/x86
engine/softmmu: memory/guest_memory isa/x86 support/host_sys
engine/lapic: isa/x86
engine/native: support/host_sys
engine/interp: support/clock support/host_sys memory/guest_memory engine/lapic engine/native engine/softmmu engine/vcpu isa/x86
engine/dbt_x86: support/host_sys engine/interp engine/native engine/softmmu engine/vcpu isa/x86 test:support/clock test:memory/guest_memory
engine/kvm: support/clock memory/guest_memory engine/vcpu isa/x86
devices/device_model: memory/address_space support/clock memory/guest_memory
devices/chipset: memory/address_space support/clock devices/device_model memory/guest_memory
devices/pci: memory/address_space devices/device_model
devices/virtio: memory/address_space devices/device_model memory/guest_memory devices/pci  test:devices/virtio
devices/virtio_devices: backends/block backends/net backends/share backends/vsock support/clock devices/device_model memory/address_space memory/guest_memory devices/pci devices/virtio
backends/block: support/host_sys
backends/char: support/clock support/host_sys
backends/net: support/clock support/host_sys
backends/vsock:
backends/share:
machine/loader: memory/guest_memory isa/x86 machine/tables
machine/tables:
machine/board: memory/address_space backends/block backends/char backends/net backends/share devices/chipset support/clock devices/device_model memory/guest_memory machine/loader devices/pci machine/tables engine/vcpu devices/virtio devices/virtio_devices isa/x86 test:engine/interp
vmm/lifecycle: machine/board support/clock engine/vcpu isa/x86 memory/guest_memory memory/address_space devices/device_model test:engine/interp
control/api:
control/store: control/api
guest/protocol:
guest/agent: guest/protocol
image:
bin/lodger: *
tests: *
bench: *
fuzz: *
";

/// Rooms that may hold unsafe code.
const UNSAFE: &[&str] = &[
    "backends/block",
    "guest/agent",
    "support/host_sys",
    "memory/guest_memory",
    "engine/softmmu",
    "engine/native",
    "engine/interp",
    "engine/dbt_x86",
    "engine/kvm",
];

/// Lines that a source file may have.
const MAX_LINES: usize = 900;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("tests/ is in the workspace")
        .into()
}

struct Room {
    /// Folder, relative to the workspace.
    folder: String,
    /// Folders of the rooms it depends on; true: for tests only.
    needs: Vec<(String, bool)>,
}

fn rooms() -> Vec<Room> {
    let output = Command::new(env!("CARGO"))
        .args([
            "metadata",
            "--format-version",
            "1",
            "--no-deps",
            "--offline",
        ])
        .current_dir(root())
        .output()
        .expect("cargo runs");
    let metadata: serde_json::Value =
        serde_json::from_slice(&output.stdout).expect("cargo prints JSON");
    let relative = |path: &str| {
        let path = Path::new(path)
            .strip_prefix(root())
            .expect("a member is in the workspace");
        path.to_str().expect("a path of ours").to_owned()
    };
    let packages = metadata["packages"].as_array().expect("packages");
    let room = |package: &serde_json::Value| {
        let manifest = package["manifest_path"].as_str().expect("a path");
        let dependencies = package["dependencies"].as_array().expect("dependencies");
        Room {
            folder: relative(manifest.trim_end_matches("/Cargo.toml")),
            needs: dependencies
                .iter()
                .filter_map(|d| Some((relative(d["path"].as_str()?), d["kind"] == "dev")))
                .collect(),
        }
    };
    packages.iter().map(room).collect()
}

#[test]
fn arrows_go_down() {
    let table: BTreeMap<&str, BTreeSet<&str>> = EDGES
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(room, needs)| (room, needs.split_whitespace().collect()))
        .collect();
    let mut wrong = Vec::new();
    for room in rooms() {
        let Some(allowed) = table.get(room.folder.as_str()) else {
            wrong.push(format!("{} is not in the table", room.folder));
            continue;
        };
        for (need, for_tests) in room.needs {
            let as_test = format!("test:{need}");
            let listed = allowed.contains("*")
                || allowed.contains(need.as_str())
                || for_tests && allowed.contains(as_test.as_str());
            if !listed {
                wrong.push(format!("{} -> {need} is not in the table", room.folder));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).expect("a folder of ours") {
        let path = entry.expect("an entry").path();
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or("");
        if path.is_dir() && name != "target" && !name.starts_with('.') {
            sources(&path, found);
        } else if name.ends_with(".rs") {
            found.push(path);
        }
    }
}

#[test]
fn unsafe_code_lives_in_listed_rooms_with_a_reason() {
    let mut wrong = Vec::new();
    for room in rooms() {
        let mut files = Vec::new();
        sources(&root().join(&room.folder).join("src"), &mut files);
        for file in files {
            let text = std::fs::read_to_string(&file).expect("a source file");
            let opened = text.contains("allow(unsafe_code)");
            if opened && !UNSAFE.contains(&room.folder.as_str()) {
                wrong.push(format!("{}: the room is not listed", file.display()));
            }
            if opened && !text.contains("// UNSAFETY: ") {
                wrong.push(format!("{}: no reason is given", file.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn files_stay_readable() {
    let mut files = Vec::new();
    sources(&root(), &mut files);
    let long = |f: &PathBuf| {
        std::fs::read_to_string(f)
            .expect("a source file")
            .lines()
            .count()
            > MAX_LINES
    };
    let long: Vec<_> = files.into_iter().filter(long).collect();
    assert!(long.is_empty(), "more than {MAX_LINES} lines: {long:?}");
}

#[test]
fn nothing_outside_the_engines_names_one() {
    let mut wrong = Vec::new();
    for room in rooms() {
        let outside = [
            "devices/",
            "machine/",
            "memory/",
            "support/",
            "backends/",
            "vmm/",
            "isa/",
        ]
        .iter()
        .any(|street| room.folder.starts_with(street));
        for (need, for_tests) in &room.needs {
            let engine = need.starts_with("engine/") && need != "engine/vcpu";
            if outside && engine && !for_tests {
                wrong.push(format!("{} -> {need}", room.folder));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
