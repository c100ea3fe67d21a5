//! What the executable promises to scripts: exit statuses, what goes to standard output and what to standard error.

use std::process::Command;

use crate::guest::{debug_exit, guest, path};
use crate::process::{Finished, Lodger, lodger};
use tempfile::NamedTempFile;

/// Runs this code with the debug-exit port and further arguments.
#[track_caller]
fn run(code: &[u8], arguments: &[&str]) -> Finished {
    let file = guest(code);
    let first = ["run", "--kernel", path(&file), "--engine", "interp"];
    lodger(&[&first, arguments].concat())
}

#[test]
fn debug_exit_gives_the_status() {
    for (value, status) in [(0, 1), (1, 3), (0x10, 0x21), (0xff, 0xff)] {
        run(&debug_exit(value), &["--device", "debug-exit"]).expect(status);
    }
}

#[test]
fn console_bytes_pass_unchanged() {
    // mov edx, 0x3f8; xor eax, eax; 1: out dx, al; inc al; jnz 1b; then the end.
    let mut code = vec![
        0xba, 0xf8, 3, 0, 0, 0x31, 0xc0, 0xee, 0xfe, 0xc0, 0x75, 0xfb,
    ];
    code.extend(debug_exit(0));
    let finished = run(&code, &["--device", "debug-exit"]).expect(1);
    let all: Vec<u8> = (0..=255).collect();
    assert_eq!(finished.stdout, all);
}

#[test]
fn quiet_says_nothing() {
    let finished = run(&debug_exit(0), &["--device", "debug-exit", "--quiet"]).expect(1);
    assert_eq!(finished.stderr, "");
    let finished = run(&debug_exit(0), &["--device", "debug-exit"]).expect(1);
    assert_eq!(finished.stderr, "lodger: engine interp: asked for\n");
}

#[test]
fn a_triple_fault_is_reported() {
    // mov ebx, 0x12345678; lidt [null]; ud2
    let code = [
        0xbb, 0x78, 0x56, 0x34, 0x12, 0x0f, 0x01, 0x1d, 0x30, 0, 0x10, 0, 0x0f, 0x0b, 0, 0, 0, 0,
        0, 0, 0, 0,
    ];
    let finished = run(&code, &[]).expect(3);
    assert_eq!(finished.stdout, b"");
    for part in [
        "triple fault of vCPU 0",
        "Multiboot",
        "rip 000000000010002c",
        "rbx 0000000012345678",
        "ud2",
    ] {
        let report = &finished.stderr;
        assert!(report.contains(part), "{part:?} is not in\n{report}");
    }
}

#[test]
fn a_reset_ends_the_run_without_reboot() {
    // mov al, 0xfe; out 0x64, al; hlt
    run(
        &[0xb0, 0xfe, 0xe6, 0x64, 0xf4, 0xeb, 0xfd],
        &["--no-reboot"],
    )
    .expect(4);
}

#[test]
fn a_reset_starts_the_guest_again() {
    // CMOS memory survives: the first run sets byte 0x72 and resets, the second one finds it set.
    // mov al, 0x72; out 0x70, al; in al, 0x71; cmp al, 0x5a; je 1f; mov al, 0x5a; out 0x71, al; mov al, 0xfe; out 0x64, al; jmp .
    let mut code = vec![
        0xb0, 0x72, 0xe6, 0x70, 0xe4, 0x71, 0x3c, 0x5a, 0x74, 0x0a, 0xb0, 0x5a, 0xe6, 0x71, 0xb0,
        0xfe, 0xe6, 0x64, 0xeb, 0xfe,
    ];
    code.extend(debug_exit(5));
    run(&code, &["--device", "debug-exit"]).expect(11);
}

#[test]
fn standard_input_reaches_the_serial_port() {
    // Echoes each byte plus one until '!' comes.
    // 1: mov edx, 0x3fd; in al, dx; test al, 1; jz 1b; mov dl, 0xf8; in al, dx; cmp al, '!'; je 2f; inc al; out dx, al; jmp 1b; 2:
    let mut code = vec![
        0xba, 0xfd, 3, 0, 0, 0xec, 0xa8, 1, 0x74, 0xf6, 0xb2, 0xf8, 0xec, 0x3c, b'!', 0x74, 5,
        0xfe, 0xc0, 0xee, 0xeb, 0xea,
    ];
    code.extend(debug_exit(0));
    let file = guest(&code);
    let arguments = [
        "run",
        "--kernel",
        path(&file),
        "--engine",
        "interp",
        "--device",
        "debug-exit",
    ];
    let mut run = Lodger::start(&arguments);
    run.type_in("HAL");
    run.wait_for("IBM");
    run.type_in("!");
    run.finish().expect(1);
}

#[test]
fn the_end_of_input_does_not_end_the_guest() {
    // Waits for the PIT's channel 0 to count down some 50 ms, by polling, with nothing on standard input.
    // mov al, 0x30; out 0x43, al; mov al, 0xff; out 0x40, al; out 0x40, al; 1: mov al, 0xe2; out 0x43, al; in al, 0x40; test al, 0x80; jz 1b
    let mut code = vec![
        0xb0, 0x30, 0xe6, 0x43, 0xb0, 0xff, 0xe6, 0x40, 0xe6, 0x40, 0xb0, 0xe2, 0xe6, 0x43, 0xe4,
        0x40, 0xa8, 0x80, 0x74, 0xf6,
    ];
    code.extend(debug_exit(0));
    run(&code, &["--device", "debug-exit"]).expect(1);
}

#[test]
fn wrong_arguments() {
    let cases: &[(&[&str], &str)] = &[
        (&["run", "--engine", "qemu"], "--engine"),
        (&["run", "--cpus", "0"], "--cpus"),
        (&["run", "--memory", "lots"], "--memory"),
        (&["run", "--device", "toaster"], "--device"),
        (&["run", "--initrd", "x"], "--kernel"),
        (&["run", "-p", "80"], "8080:80"),
        (&["run", "--net", "none", "-p", "80:80"], "--net user"),
        (&["fly"], "fly"),
        (&[], "Usage"),
        (&["run", "no-such-image"], "known images: mini"),
        (&["image", "remove", "no-such-image"], "no-such-image"),
        (
            &["run", "--memory", "1K", "--kernel", "/dev/null"],
            "memory",
        ),
    ];
    for (arguments, says) in cases {
        let finished = lodger(arguments).expect(2);
        let stderr = &finished.stderr;
        assert!(stderr.contains(says), "{arguments:?}: {stderr}");
        assert_eq!(finished.stdout, b"", "{arguments:?}");
    }
}

/// Wrong arguments are found before an image is built for them.
#[test]
fn wrong_arguments_cost_no_image() {
    let cases: [(&[&str], i32, &str); 4] = [
        (&["--cpus", "5000"], 2, "vCPUs"),
        (&["--memory", "1K"], 2, "memory"),
        (&["--disk", "/dev/null,ro"], 1, "/dev/null"),
        (&["--disk", "/no/such/disk"], 1, "/no/such/disk"),
    ];
    for (arguments, status, says) in cases {
        let cache = tempfile::tempdir().expect("a folder");
        let finished = Command::new(env!("CARGO_BIN_EXE_lodger"))
            .args(["run", "--engine", "interp"])
            .args(arguments)
            .env("XDG_CACHE_HOME", cache.path())
            .output()
            .expect("lodger runs");
        let stderr = String::from_utf8_lossy(&finished.stderr);
        assert_eq!(finished.status.code(), Some(status), "{stderr}");
        assert!(stderr.contains(says), "{arguments:?}: {stderr}");
        let made = cache.path().read_dir().expect("a folder").count();
        assert_eq!(made, 0, "{arguments:?}: {stderr}");
    }
}

#[test]
fn failures_say_what_to_do() {
    let text = NamedTempFile::new().expect("a file");
    std::fs::write(text.path(), "#!/bin/sh\nexit 0\n").expect("a file");
    let good = guest(&debug_exit(0));
    let (text, good) = (path(&text), path(&good));
    let cases: &[(&[&str], &[&str])] = &[
        (&["/no/such/file"], &["/no/such/file"]),
        (&[text], &[text, "a script"]),
        (&[good, "--initrd", "/no/such/initrd"], &["/no/such/initrd"]),
        (&[good, "--disk", "/no/such/disk"], &["/no/such/disk"]),
        (&[good, "-p", "192.0.2.77:80:80"], &["192.0.2.77:80:80/tcp"]),
    ];
    for (arguments, parts) in cases {
        let first = ["run", "--engine", "interp", "--kernel"];
        let finished = lodger(&[&first, *arguments].concat()).expect(1);
        for part in *parts {
            let stderr = &finished.stderr;
            assert!(stderr.contains(part), "{arguments:?}: {stderr}");
        }
    }
}

#[test]
fn help_and_version() {
    let version = lodger(&["--version"]).expect(0);
    let expected = format!("lodger {}\n", env!("CARGO_PKG_VERSION"));
    assert_eq!(version.text(), expected);
    let help = lodger(&["run", "--help"]).expect(0).text();
    for part in ["Exit status", "--no-reboot", "Ctrl-A", "--disk"] {
        assert!(help.contains(part), "{part}");
    }
}

#[test]
fn completions_and_manual_pages() {
    for shell in ["bash", "zsh", "fish"] {
        let script = lodger(&["completions", shell]).expect(0).text();
        assert!(script.contains("no-reboot"), "{shell}");
    }
    let page = lodger(&["man", "run"]).expect(0).text();
    assert!(
        page.contains(".TH") && page.contains("no\\-reboot"),
        "{page}"
    );
    lodger(&["man", "no-such-command"]).expect(2);
    let dir = tempfile::tempdir().expect("a folder");
    let all = dir.path().join("man1");
    lodger(&["man", "--dir", all.to_str().expect("ASCII")]).expect(0);
    assert!(all.join("lodger-image-build.1").exists());
}

#[test]
fn the_doctor_and_the_list_of_images() {
    // Its status tells whether everything works, which depends on the host.
    let doctor = lodger(&["doctor"]).text();
    assert!(doctor.contains("interp"), "{doctor}");
    let list = lodger(&["image", "list"]).expect(0).text();
    assert!(list.contains("mini"), "{list}");
}

#[test]
fn a_disk_that_is_in_use() {
    let disk = NamedTempFile::new().expect("a file");
    disk.as_file().set_len(1 << 20).expect("a disk");
    // mov edx, 0x3f8; mov al, '!'; out dx, al; jmp .
    let forever = guest(&[0xba, 0xf8, 3, 0, 0, 0xb0, b'!', 0xee, 0xeb, 0xfe]);
    let arguments = [
        "run",
        "--kernel",
        path(&forever),
        "--engine",
        "interp",
        "--disk",
        path(&disk),
    ];
    let mut first = Lodger::start(&arguments);
    first.wait_for("!");
    let refused = lodger(&arguments).expect(1);
    assert!(refused.stderr.contains(path(&disk)), "{}", refused.stderr);
    first.terminate();
    // As a shell reports SIGTERM.
    first.finish().expect(128 + 15);
}
