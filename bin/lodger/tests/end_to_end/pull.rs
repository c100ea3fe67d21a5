//! Images from a registry: pulled, run, and what goes wrong.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tar::EntryType;
use tempfile::TempDir;

use crate::process::{Finished, Lodger};
use crate::registry::{Archive, Compression, Layer, Registry, package};

/// A user's cache, with the kernel of `mini` that all tests share.
struct Home {
    dir: TempDir,
}

impl Home {
    fn new() -> Home {
        Home {
            dir: tempfile::tempdir().expect("a folder"),
        }
    }

    fn cache(&self) -> PathBuf {
        self.dir.path().join("cache")
    }

    /// Gives it the image `mini`, which is built if need be.
    fn with_kernel(self) -> Home {
        let shared = Path::new(env!("CARGO_TARGET_TMPDIR")).join("lodger/images/mini");
        if !shared.exists() {
            crate::process::lodger(&["image", "build"]).expect(0);
        }
        let images = self.cache().join("lodger/images");
        std::fs::create_dir_all(&images).expect("a folder");
        std::os::unix::fs::symlink(shared, images.join("mini")).expect("a link");
        self
    }

    fn start(&self, arguments: &[&str]) -> Lodger {
        let (data, cache, config) = (
            self.dir.path().join("data"),
            self.cache(),
            self.dir.path().join("docker"),
        );
        let environment: [(&str, &Path); 4] = [
            ("XDG_CACHE_HOME", &cache),
            ("XDG_DATA_HOME", &data),
            ("DOCKER_CONFIG", &config),
            ("HOME", self.dir.path()),
        ];
        Lodger::start_in(&environment, arguments)
    }

    #[track_caller]
    fn lodger(&self, arguments: &[&str]) -> Finished {
        self.start(arguments).finish()
    }

    /// Names in a directory of the cache.
    fn names(&self, below: &str) -> Vec<String> {
        let dir = self.cache().join("lodger").join(below);
        let entries = dir.read_dir().into_iter().flatten();
        let names = entries.map(|entry| entry.expect("an entry").file_name());
        names
            .map(|name| name.into_string().expect("ASCII"))
            .collect()
    }
}

/// Busybox under many names, and two users.
fn busybox(registry: &Registry, repository: &str) -> Layer {
    let program = std::fs::read(package("busybox-static").join("bin/busybox"));
    let passwd = "root:x:0:0:root:/root:/bin/sh\nweb:x:101:102:Web:/srv/web:/bin/sh\n";
    let mut archive = Archive::new()
        .dir("bin", 0o755)
        .file("bin/busybox", 0o755, 0, &program.expect("busybox"))
        .file("etc/passwd", 0o644, 0, passwd.as_bytes());
    for name in [
        "sh", "id", "pwd", "env", "hostname", "cat", "head", "ls", "stat", "sleep", "wget", "true",
    ] {
        archive = archive.link(EntryType::Symlink, &format!("bin/{name}"), "busybox");
    }
    registry.push_layer(repository, &archive.finish(), Compression::Gzip)
}

#[test]
fn an_image_runs_as_its_configuration_says() {
    let registry = Registry::start();
    let home = Home::new().with_kernel();
    let layer = busybox(&registry, "team/app");
    let script = "id -u; id -g; pwd; echo $GREETING; echo $HOME; hostname; ls -ld . | cut -c1-10; \
        cat /etc/resolv.conf; exit 7";
    let config = json!({
        "Entrypoint": ["sh", "-c"], "Cmd": [script], "User": "web", "WorkingDir": "/srv/new/dir",
        "Env": ["PATH=/bin", "GREETING=it's \"quoted\" $HOME"], "StopSignal": "SIGUSR1",
    });
    let image = registry.push("team/app", "1.0", &[&layer], config.clone(), "amd64");
    let other = registry.push("team/app", "other", &[&layer], config, "arm64");
    registry.push_index("team/app", "latest", &[(other, "arm64"), (image, "amd64")]);

    let name = registry.name("team/app");
    let pulled = home.lodger(&["image", "pull", &name]).expect(0);
    assert!(
        pulled.stderr.contains(":latest: pulled (sha256:"),
        "{}",
        pulled.stderr
    );
    let again = home.lodger(&["image", "pull", &name]).expect(0);
    assert!(again.stderr.contains("here already"), "{}", again.stderr);
    let list = home.lodger(&["image", "ls"]).expect(0).text();
    assert!(list.contains(&format!("{name}:latest")), "{list}");
    let seen = home.lodger(&["image", "inspect", &name]).expect(0).text();
    let seen: Value = serde_json::from_str(&seen).expect("JSON");
    assert_eq!(seen[0]["pulled"]["container"]["directory"], "/srv/new/dir");

    let run = home.lodger(&["run", &name]).expect(7);
    let expected = "101\n102\n/srv/new/dir\nit's \"quoted\" $HOME\n/srv/web\nlodger\ndrwxr-xr-x\nnameserver 10.0.2.3\n";
    assert_eq!(run.text(), expected);

    // A command of one's own, with a system that ends by itself.
    let shared = tempfile::tempdir().expect("a folder");
    std::fs::write(shared.path().join("file"), "shared\n").expect("a file");
    let share = format!("{}:/new/place:ro", shared.path().display());
    let script = "echo $A $GREETING; pwd; hostname; cat /new/place/file; kill -9 $$";
    let run = home.lodger(&[
        "run",
        "-q",
        "-e",
        "A=b",
        "-e",
        "GREETING=hi",
        "-w",
        "/tmp",
        "--hostname",
        "box",
        "--share",
        &share,
        "--entrypoint",
        "/bin/sh",
        &name,
        "--",
        "-c",
        script,
    ]);
    let run = run.expect(137).text();
    assert!(run.starts_with("b hi\n/tmp\nbox\nshared\n"), "{run}");
    let run = home.lodger(&["run", "-q", "--entrypoint", "/no/such", &name]);
    assert!(run.expect(127).text().contains("/no/such"));

    // In the background, until it is asked to end.
    let script = "trap 'exit 5' USR1; echo ready; while :; do sleep 0.1; done";
    home.lodger(&["run", "-d", "--name", "web", &name, script])
        .expect(0);
    let mut logs = home.start(&["logs", "-f", "web"]);
    logs.wait_for("ready");
    // Commands have what the program has.
    let script = "id -u; pwd; echo $GREETING; cat /etc/passwd | head -c 4";
    let run = home.lodger(&["exec", "web", "sh", "-c", script]).expect(0);
    let expected = "101\n/srv/new/dir\nit's \"quoted\" $HOME\nroot";
    assert_eq!(run.text(), expected);
    let stopped = home.lodger(&["stop", "--time", "60", "web"]).expect(0);
    assert!(stopped.stderr.contains("status 5"), "{}", stopped.stderr);
    logs.finish().expect(0);
    home.lodger(&["rm", "web"]).expect(0);

    home.lodger(&["image", "rm", &name]).expect(0);
    assert_eq!(home.names("pulled"), [""; 0]);
    assert_eq!(home.names("blobs/sha256"), [""; 0]);
    let gone = home.lodger(&["run", &name]).expect(2);
    assert!(gone.stderr.contains("image pull"), "{}", gone.stderr);
}

#[test]
fn an_init_has_the_machine_to_itself() {
    let registry = Registry::start();
    let home = Home::new().with_kernel();
    let base = busybox(&registry, "system");
    let table = "::sysinit:/bin/sh -c \"head -c 4 /proc/1/cmdline; echo; ls -1 /\"\n::once:/sbin/poweroff\n";
    let system = Archive::new()
        .link(EntryType::Symlink, "sbin/init", "/bin/busybox")
        .link(EntryType::Symlink, "sbin/poweroff", "/bin/busybox")
        .file("etc/inittab", 0o644, 0, table.as_bytes())
        .finish();
    let system = registry.push_layer("system", &system, Compression::Gzip);
    let config = json!({"Cmd": ["/sbin/init"]});
    registry.push("system", "latest", &[&base, &system], config, "amd64");
    let name = registry.name("system");
    home.lodger(&["image", "pull", &name]).expect(0);
    let run = home.lodger(&["run", "-q", &name]).expect(0).text();
    let expected = "init\nbin\ndev\netc\nlost+found\nproc\nsbin\nsys\n";
    assert!(run.starts_with(expected), "{run:?}");
}

#[test]
fn layers_lie_over_each_other() {
    let registry = Registry::start();
    let home = Home::new().with_kernel();
    let base = busybox(&registry, "app");
    let lower = Archive::new()
        .file("a/gone", 0o644, 0, b"1")
        .file("a/stays", 0o4711, 7, b"two")
        .link(EntryType::Link, "a/again", "a/stays")
        .file("a/under", 0o644, 0, b"six")
        .link(EntryType::Link, "kept", "a/under")
        .file("b/c/d", 0o644, 0, b"3")
        .file("b/e", 0o644, 0, b"4")
        .file("dir/x", 0o644, 0, b"5")
        .link(EntryType::Symlink, "to", "b")
        .finish();
    let upper = Archive::new()
        .file("b/new", 0o600, 0, b"new")
        .file("a/.wh.gone", 0, 0, b"")
        .file("a/.wh.under", 0, 0, b"")
        .file("b/.wh..wh..opq", 0, 0, b"")
        .file("to/through", 0o644, 0, b"")
        .file("dir", 0o644, 0, b"a file now")
        .device(EntryType::Char, "null", (1, 3))
        .device(EntryType::Block, "disk", (259, 70_000))
        .device(EntryType::Fifo, "pipe", (0, 0))
        .xattr("user.note", "kept")
        .file("noted", 0o644, 0, b"")
        .finish();
    let lower = registry.push_layer("app", &lower, Compression::Zstd);
    let upper = registry.push_layer("app", &upper, Compression::None);
    let script = "cd /; ls -1 a b dir; cat a/stays kept; stat -c '%a %u %h' a/stays kept; \
        stat -c '%F %t %T' null disk pipe; cat null";
    let config = json!({"Cmd": ["sh", "-c", script]});
    registry.push("app", "latest", &[&base, &lower, &upper], config, "amd64");
    let name = registry.name("app");
    home.lodger(&["image", "pull", &name]).expect(0);
    let run = home.lodger(&["run", "--quiet", &name]).expect(0).text();
    let expected = "dir\n\na:\nagain\nstays\n\nb:\nnew\nthrough\ntwosix4711 7 2\n644 0 1\n\
        character special file 1 3\nblock special file 103 11170\nfifo 0 0\n";
    assert_eq!(run, expected);
    // The disk is sound, says another program, and has the attribute.
    let disk = home
        .cache()
        .join("lodger/pulled")
        .join(&home.names("pulled")[0])
        .join("root.img");
    let fsck = std::process::Command::new("/sbin/e2fsck")
        .args(["-n", "-f"])
        .arg(&disk)
        .output();
    if let Ok(fsck) = fsck {
        assert!(
            fsck.status.success(),
            "{}",
            String::from_utf8_lossy(&fsck.stdout)
        );
        let debugfs = std::process::Command::new("/sbin/debugfs")
            .args(["-R", "ea_get noted user.note"])
            .arg(&disk)
            .output()
            .expect("it comes with e2fsck");
        let text = String::from_utf8_lossy(&debugfs.stdout).into_owned();
        assert!(text.contains("kept"), "{text}");
    }
}

#[test]
fn a_transfer_goes_on_where_it_broke_off() {
    let registry = Registry::start();
    let home = Home::new();
    let base = busybox(&registry, "app");
    registry.push("app", "latest", &[&base], json!({"Cmd": ["sh"]}), "amd64");
    let file = registry.blob_file(&base);
    let bytes = std::fs::read(&file).expect("a blob");
    let half = bytes.len() / 2;
    let blobs = home.cache().join("lodger/blobs/sha256");
    std::fs::create_dir_all(&blobs).expect("a folder");
    let part = blobs.join(base.digest()).with_extension("part");
    std::fs::write(&part, &bytes[..half]).expect("a file");
    // What is here already is not asked for: there, it is something else now.
    let there = std::fs::File::options()
        .write(true)
        .open(&file)
        .expect("a blob");
    there.write_all_at(&vec![0; half], 0).expect("a blob");
    let name = registry.name("app");
    let pull = home.lodger(&["image", "pull", &name]);
    // Without a kernel only the image itself is made.
    assert_eq!(home.names("pulled").len(), 1, "{}", pull.stderr);
    assert!(!part.exists());
}

#[test]
fn logins_are_found() {
    // The password is `secret`.
    let line = "me:$2y$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a\n";
    let registry = Registry::start_for(Some(line));
    let home = Home::new();
    let name = registry.name("private/app");
    let refused = home.lodger(&["image", "pull", &name]).expect(1);
    assert!(
        refused.stderr.contains("docker login"),
        "{}",
        refused.stderr
    );
    let config = home.dir.path().join("docker");
    std::fs::create_dir(&config).expect("a folder");
    let host = name.split('/').next().expect("a host");
    // me:wrong, me:secret
    for (pair, says) in [
        ("bWU6d3Jvbmc=", "does not do"),
        ("bWU6c2VjcmV0", "no such image"),
    ] {
        let auths: Value = json!({"auths": {host: {"auth": pair}}});
        std::fs::write(config.join("config.json"), auths.to_string()).expect("a file");
        let pull = home.lodger(&["image", "pull", &name]).expect(1);
        assert!(pull.stderr.contains(says), "{}", pull.stderr);
    }
}

#[test]
fn what_goes_wrong_is_said_and_leaves_nothing() {
    let registry = Registry::start();
    let base = busybox(&registry, "app");
    let config = json!({"Cmd": ["sh"]});
    registry.push("app", "latest", &[&base], config.clone(), "amd64");
    let arm = registry.push("app", "arm", &[&base], config.clone(), "arm64");
    registry.push_index("app", "list", &[(arm, "arm64")]);
    registry.push(
        "app",
        "nobody",
        &[&base],
        json!({"Cmd": ["sh"], "User": "nobody"}),
        "amd64",
    );
    let text = registry.push_layer(
        "app",
        b"no archive at all, but long enough",
        Compression::Gzip,
    );
    registry.push("app", "text", &[&text], config.clone(), "amd64");
    let big = Archive::new()
        .file("big", 0o644, 0, &vec![1; 9 << 20])
        .finish();
    let big = registry.push_layer("app", &big, Compression::Gzip);
    registry.push("app", "big", &[&big], config.clone(), "amd64");
    let broken = Archive::new().file("x", 0o644, 0, &[7; 4096]).finish();
    let broken = registry.push_layer("app", &broken, Compression::None);
    registry.push("app", "broken", &[&broken], config, "amd64");
    let file = std::fs::File::options()
        .write(true)
        .open(registry.blob_file(&broken));
    file.expect("a blob")
        .write_all_at(b"Y", 600)
        .expect("a blob");

    let name = |rest: &str| registry.name(rest);
    let wrong_digest = format!("app@sha256:{}", "0".repeat(64));
    let cases = [
        (name("nothing"), 1, "no such image"),
        (name("app:2"), 1, "no such image"),
        (name(&wrong_digest), 1, "no such image"),
        (name("app:arm"), 1, "linux/arm64, not for linux/amd64"),
        (name("app:list"), 1, "but for linux/arm64"),
        (name("app:nobody"), 1, "'nobody' is not in its /etc/passwd"),
        (name("app:text"), 1, "cannot be unpacked"),
        (name("app:broken"), 1, "something else"),
        ("127.0.0.1:1/app".into(), 1, "cannot reach 127.0.0.1:1"),
        ("Not/A/Name".into(), 2, "'Not/A/Name'"),
    ];
    let home = Home::new();
    for (name, status, says) in cases {
        let pull = home.lodger(&["image", "pull", &name]).expect(status);
        assert!(pull.stderr.contains(says), "{name}: {}", pull.stderr);
    }
    let pull = home
        .lodger(&["image", "pull", &name("app:big"), "--size", "8M"])
        .expect(1);
    assert!(pull.stderr.contains("--size SIZE"), "{}", pull.stderr);
    assert_eq!(home.names("pulled"), [""; 0]);
    assert_eq!(home.names("work"), [""; 0]);
    // What was fetched and is sound stays for the next try, and goes when it is told to.
    let parts = home.names("blobs/sha256");
    assert!(
        !parts.iter().any(|name| name.ends_with(".part")),
        "{parts:?}"
    );
    home.lodger(&["image", "prune"]).expect(0);
    assert_eq!(home.names("blobs/sha256"), [""; 0]);
}
