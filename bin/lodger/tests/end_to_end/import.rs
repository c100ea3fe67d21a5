//! Disk images of other makers, and what cloud-init in them is told.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use crate::process::{Lodger, lodger};
use crate::registry::package;

fn run(program: &mut Command) -> String {
    let output = program.output().expect("it runs");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program:?}: {stderr}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The files of the image `mini`, whose kernel and RAM disk serve as a distribution's.
fn mini() -> std::path::PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("lodger/images/mini");
    if !dir.exists() {
        lodger(&["image", "build"]).expect(0);
    }
    dir
}

/// A disk with a partition table and an ext4 file system with a kernel, as cloud images have it.
fn cloud_disk(dir: &Path, grub: &str) -> std::path::PathBuf {
    let boot = dir.join("tree/boot");
    std::fs::create_dir_all(boot.join("grub")).expect("a folder");
    std::fs::copy(mini().join("vmlinuz"), boot.join("vmlinuz-6.1.0-9")).expect("a kernel");
    std::fs::copy(mini().join("initrd.cpio"), boot.join("initrd.img-6.1.0-9")).expect("an initrd");
    std::fs::write(
        boot.join("vmlinuz-6.1.0-10"),
        "not this one: it has no RAM disk",
    )
    .expect("a file");
    std::fs::write(dir.join("tree/hello"), "from the disk\n").expect("a file");
    std::fs::write(boot.join("grub/grub.cfg"), grub).expect("a file");
    let files = dir.join("files.img");
    let size = 64 << 20;
    std::fs::File::create(&files)
        .and_then(|file| file.set_len(size))
        .expect("a file");
    run(Command::new("/sbin/mke2fs")
        .args(["-q", "-t", "ext4", "-d"])
        .arg(dir.join("tree"))
        .arg(&files));
    let disk = dir.join("disk.img");
    let file = std::fs::File::create(&disk).expect("a disk");
    file.set_len(size + (1 << 20)).expect("a disk");
    file.write_all_at(&std::fs::read(files).expect("a file"), 1 << 20)
        .expect("a disk");
    // One partition, from sector 2048 on.
    let mut entry = [0; 66];
    entry[4] = 0x83;
    entry[8..12].copy_from_slice(&2048_u32.to_le_bytes());
    entry[12..16].copy_from_slice(&((size / 512) as u32).to_le_bytes());
    entry[64..].copy_from_slice(&[0x55, 0xaa]);
    file.write_all_at(&entry, 446).expect("a disk");
    disk
}

#[test]
fn a_cloud_image_boots_with_its_own_kernel() {
    mini();
    let dir = tempfile::tempdir().expect("a folder");
    let cache = dir.path().join("cache");
    let lodger =
        |arguments: &[&str]| Lodger::start_in(&[("XDG_CACHE_HOME", &cache)], arguments).finish();
    let script = "cat /proc/cmdline; mount -t ext4 -o ro /dev/vda1 /mnt && cat /mnt/hello; cat /sys/block/vda/size";
    let grub = format!(
        "menuentry 'Cloud' {{\n\tlinux /boot/vmlinuz-6.1.0-9 root=PARTUUID=1 quiet lodger.run=\"{script}\"\n\
         \tinitrd /boot/initrd.img-6.1.0-9\n}}\n"
    );
    let disk = cloud_disk(dir.path(), &grub);
    let qcow2 = dir.path().join("disk.qcow2");
    let (disk, qcow2) = (
        disk.to_str().expect("UTF-8"),
        qcow2.to_str().expect("UTF-8"),
    );
    lodger(&["disk", "convert", disk, qcow2]).expect(0);
    lodger(&["image", "import", qcow2, "--name", "cloud", "--size", "1G"]).expect(0);
    std::fs::remove_file(qcow2).expect("a file");
    let list = lodger(&["image", "ls"]).expect(0).text();
    assert!(
        list.contains("cloud") && list.contains("imported from"),
        "{list}"
    );
    let text = lodger(&["run", "-q", "cloud"]).expect(0).text();
    for part in [
        "root=PARTUUID=1 quiet",
        "console=ttyS0",
        "from the disk\n2097152\nLODGER-EXIT rc=0",
    ] {
        assert!(text.contains(part), "{part}:\n{text}");
    }

    // Without a configuration it is the newest kernel that has a RAM disk.
    std::fs::remove_dir_all(dir.path().join("tree")).expect("a folder");
    cloud_disk(dir.path(), "");
    lodger(&["image", "import", disk, "--name", "plain"]).expect(0);
    let append = "lodger.run=\"cat /proc/cmdline\"";
    let text = lodger(&["run", "-q", "plain", "--append", append])
        .expect(0)
        .text();
    assert!(text.contains("root=/dev/vda1 ro"), "{text}");

    // What has no kernel is not kept.
    let text = dir.path().join("text");
    std::fs::write(&text, vec![b'x'; 1 << 20]).expect("a file");
    let text = text.to_str().expect("UTF-8");
    for (file, name, status, says) in [
        (text, "text", 1, "--kernel FILE"),
        ("/no/such", "text", 1, "/no/such"),
        (disk, "debian", 2, "names of imported images"),
    ] {
        let import = lodger(&["image", "import", file, "--name", name]).expect(status);
        assert!(import.stderr.contains(says), "{}", import.stderr);
    }
    let names = cache.join("lodger/imported").read_dir().expect("a folder");
    let mut names: Vec<_> = names
        .map(|entry| entry.expect("a name").file_name())
        .collect();
    names.sort();
    assert_eq!(names, ["cloud", "plain"]);
    lodger(&["image", "rm", "cloud", "plain"]).expect(0);
    let gone = lodger(&["run", "cloud"]).expect(2);
    assert!(gone.stderr.contains("'cloud'"), "{}", gone.stderr);
}

#[test]
fn cloud_init_finds_its_seed() {
    let dir = tempfile::tempdir().expect("a folder");
    let key = dir.path().join("key.pub");
    std::fs::write(&key, "ssh-ed25519 AAAAC3Nza me@host\n").expect("a file");
    let own = dir.path().join("own");
    std::fs::write(&own, "#!/bin/sh\necho mine\n").expect("a file");
    let own = own.to_str().expect("UTF-8");
    let files = format!("{own},,{own}");
    // The guest sends the disk, byte by byte, through its console.
    let append = "lodger.run=\"cat /sys/block/vda/ro; gzip -c /dev/vda | base64\"";
    let short = [
        "--user",
        "alice",
        "--ssh-key",
        key.to_str().expect("UTF-8"),
        "--hostname",
        "box",
    ];
    let cases = [
        (
            &short[..],
            [
                ("user-data", "\"name\": \"alice\""),
                ("user-data", "ssh-ed25519 AAAAC3Nza"),
                ("meta-data", "\"local-hostname\": \"box\""),
            ],
        ),
        (
            &["--cloud-init", &files],
            [
                ("user-data", "echo mine"),
                ("meta-data", "instance-id"),
                ("network-config", "echo mine"),
            ],
        ),
    ];
    for (arguments, expected) in cases {
        let arguments = [&["run", "-q", "--append", append], arguments].concat();
        let text = lodger(&arguments).expect(0).text();
        let (_, text) = text.split_once(" MiB\n1\n").expect("a read-only disk");
        let (text, _) = text.split_once("LODGER-EXIT rc=0").expect("all of it");
        let disk = dir.path().join("seed");
        std::fs::write(&disk, text).expect("a file");
        let disk = disk.to_str().expect("UTF-8");
        run(Command::new("sh").args(["-c", "base64 -d \"$1\" | gunzip >\"$1.img\"", "sh", disk]));
        let tool = package("mtools").join("usr/bin/mtools");
        let mtools = |command: &[&str]| {
            let image = format!("{disk}.img");
            let (first, rest) = command.split_first().expect("a command");
            run(Command::new(&tool)
                .args(["-c", first, "-i", &image])
                .args(rest))
        };
        let label = mtools(&["mlabel", "-s", "::"]);
        assert!(label.contains("CIDATA"), "{label}");
        for (file, part) in expected {
            let text = mtools(&["mtype", &format!("::{file}")]);
            assert!(text.contains(part), "{file}: {text}");
        }
    }
    let wrong = lodger(&["run", "--cloud-init", "/no/such/file"]).expect(1);
    assert!(wrong.stderr.contains("/no/such/file"), "{}", wrong.stderr);
}
