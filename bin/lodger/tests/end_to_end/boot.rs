//! An unmodified distribution kernel from end to end: the `mini` image, built from the host's package sources on first use.
//!
//! The interpreter runs it, which is the engine that works everywhere.

use crate::process::{Finished, Lodger, lodger};

/// Boots the image and has its shell run `command`.
#[track_caller]
fn boot(arguments: &[&str], kernel_arguments: &str, command: &str) -> Finished {
    let append = format!("{kernel_arguments} lodger.run=\"{command}\"");
    let first = ["run", "mini", "--engine", "interp", "--append", &append];
    lodger(&[&first, arguments].concat())
}

/// What the command printed.
#[track_caller]
fn command_output(finished: &Finished) -> String {
    let text = finished.text();
    let (_, output) = text
        .split_once(" MiB\n")
        .unwrap_or_else(|| panic!("no banner in\n{text}"));
    let (output, _) = output
        .split_once("LODGER-EXIT rc=0\n")
        .unwrap_or_else(|| panic!("no success in\n{text}"));
    output.to_owned()
}

#[test]
fn one_cpu() {
    let command = "nproc; cat /sys/class/misc/hw_random/rng_current; head -c 16 /dev/hwrng | wc -c; \
        sleep 0.2; date +%Y; cat /sys/devices/system/clocksource/clocksource0/current_clocksource; uname -m";
    let run = boot(&[], "", command).expect(0);
    let output = command_output(&run);
    let lines: Vec<_> = output.lines().collect();
    let [cpus, rng, random, year, clock, machine] = lines[..] else {
        panic!("other lines: {lines:?}");
    };
    assert_eq!([cpus, rng, random], ["1", "virtio_rng.0", "16"]);
    assert!(year.parse::<u32>().is_ok_and(|y| y >= 2025), "{year}");
    assert!(["tsc", "kvm-clock"].contains(&clock), "{clock}");
    assert_eq!(machine, "x86_64");
    assert!(
        run.stderr.contains("engine interp: asked for"),
        "{}",
        run.stderr
    );
}

#[test]
fn four_cpus() {
    // Each CPU counts its interrupts, and work spreads.
    let command = "nproc; for i in 1 2 3 4; do (while :; do :; done) & done; sleep 1; kill %1 %2 %3 %4; \
        grep -c processor /proc/cpuinfo; grep -E 'LOC|RES|CAL|TLB' /proc/interrupts | wc -l; \
        for i in 1 2 3 4 5 6 7 8; do seq 2000 | md5sum & done; wait";
    let run = boot(&["--cpus", "4", "--memory", "1G"], "", command).expect(0);
    let output = command_output(&run);
    let lines: Vec<_> = output.lines().collect();
    assert_eq!(lines[..3], ["4", "4", "4"], "{output}");
    let sums: Vec<_> = lines.iter().filter(|l| l.ends_with("  -")).collect();
    assert_eq!(sums.len(), 8, "{output}");
    assert!(sums.iter().all(|sum| *sum == sums[0]), "{output}");
}

#[test]
fn reset_without_reboot() {
    let run = boot(&["--no-reboot"], "", "reboot -f").expect(4);
    assert!(run.text().contains("reboot: Restarting system"));
}

#[test]
fn panic_resets() {
    let command = "echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger";
    let run = boot(&["--no-reboot"], "panic=-1", command).expect(4);
    assert!(run.text().contains("Kernel panic"), "{}", run.text());
}

#[test]
fn triple_fault() {
    // One of the ways in which the kernel can reset a machine.
    let run = boot(&["--no-reboot"], "reboot=t", "reboot -f").expect(3);
    assert!(run.stderr.contains("triple fault"), "{}", run.stderr);
}

#[test]
fn disks() {
    let disk = tempfile::NamedTempFile::new().expect("a file");
    let image: Vec<u8> = (0..2 << 20).map(|i: u32| (i / 512) as u8).collect();
    std::fs::write(disk.path(), &image).expect("a disk");
    let other = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(other.path(), vec![0x77; 1 << 20]).expect("a disk");
    let dir = tempfile::tempdir().expect("a directory");
    let sparse = dir.path().join("c.qcow2");
    let sparse = sparse.to_str().expect("ASCII");
    lodger(&["disk", "create", sparse, "3M"]).expect(0);
    let command = "cat /sys/block/vda/size /sys/block/vdb/size /sys/block/vdb/ro; \
        dd if=/dev/vda bs=512 skip=5 count=1 2>&- | hexdump -C | head -n 1; \
        echo written by the guest | dd of=/dev/vda bs=512 seek=9 conv=notrunc,fsync 2>&-; \
        echo x | dd of=/dev/vdb conv=notrunc 2>&- || echo refused; \
        dd if=/dev/vda of=/dev/null bs=64k 2>&- && echo all; \
        cat /sys/block/vdc/size; mke2fs /dev/vdc >/dev/null; modprobe -q ext4; mkdir /d; mount -t ext4 /dev/vdc /d && \
        seq 99999 > /d/f; umount /d; mount -t ext4 /dev/vdc /d; tail -n 1 /d/f; umount /d; \
        dd if=/dev/vda of=/dev/vdc bs=64k seek=30 count=3 conv=notrunc,fsync 2>&-";
    let arguments = [
        "--disk",
        disk.path().to_str().expect("ASCII"),
        "--disk",
        &format!("{},ro", other.path().to_str().expect("ASCII")),
        "--disk",
        sparse,
    ];
    let run = boot(&arguments, "", command).expect(0);
    let output = command_output(&run);
    let lines: Vec<_> = output.lines().collect();
    assert_eq!(lines[..3], ["4096", "2048", "1"], "{output}");
    assert!(lines[3].contains("05 05 05 05"), "{output}");
    assert_eq!(lines[4..6], ["refused", "all"], "{output}");
    assert_eq!(lines[6..], ["6144", "99999"], "{output}");
    let after = std::fs::read(disk.path()).expect("the disk");
    let text = b"written by the guest\n";
    assert_eq!(&after[9 * 512..9 * 512 + text.len()], text);
    assert_eq!(after[..9 * 512], image[..9 * 512]);
    assert_eq!(after[10 * 512..], image[10 * 512..]);
    lodger(&["disk", "check", sparse]).expect(0);
    let raw = dir.path().join("raw");
    lodger(&[
        "disk",
        "convert",
        sparse,
        raw.to_str().expect("ASCII"),
        "--to",
        "raw",
    ])
    .expect(0);
    let sparse = std::fs::read(raw).expect("the disk");
    assert_eq!(sparse[30 << 16..33 << 16], after[..3 << 16]);
    let untouched = std::fs::read(other.path()).expect("the disk");
    assert_eq!(untouched, vec![0x77; 1 << 20]);
}

#[test]
fn a_shell_reads_standard_input() {
    let mut run = Lodger::start(&["run", "--engine", "interp", "--quiet"]);
    run.wait_for("mini:/# ");
    run.type_in("echo $((6 * 7))\n");
    run.wait_for("42");
    run.wait_for("mini:/# ");
    run.type_in("exit\n");
    let finished = run.finish().expect(0);
    assert_eq!(finished.stderr, "");
}

#[test]
fn the_same_packages_make_the_same_image() {
    let files = |home: &tempfile::TempDir, umask: &str| {
        let build = "umask \"$1\"; exec \"$2\" --quiet image build mini";
        let mut command = std::process::Command::new("sh");
        command.args(["-c", build, "sh", umask, env!("CARGO_BIN_EXE_lodger")]);
        command.env("XDG_CACHE_HOME", home.path()).env("TZ", umask);
        assert!(command.status().expect("a shell").success());
        let dir = home.path().join("lodger/images/mini");
        ["image.json", "initrd.cpio", "vmlinuz"]
            .map(|name| std::fs::read(dir.join(name)).expect("a file"))
    };
    let folder = || tempfile::tempdir().expect("a folder");
    let (one, other) = (files(&folder(), "022"), files(&folder(), "077"));
    assert!(one == other);
}
