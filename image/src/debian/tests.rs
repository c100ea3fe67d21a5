//! The pieces of a build that need neither packages nor a machine.

use std::process::{Command, Stdio};

use super::*;

#[test]
fn options_that_make_no_sense() {
    let with = |change: &dyn Fn(&mut BuildOptions)| {
        let mut options = BuildOptions::default();
        change(&mut options);
        Debian::new(NAME, None, &options)
            .err()
            .map(|error| error.to_string())
    };
    for name in ["git", "g++", "libc6.1", "0ad"] {
        assert_eq!(with(&|o| o.packages = vec![name.into()]), None);
    }
    for name in ["", "a", "-y", "git-", "Git", "a/b", "?essential", "a=1"] {
        let error = with(&|o| o.packages = vec![name.into()]).unwrap();
        assert!(error.contains(&format!("'{name}'")), "{error}");
    }
    for name in ["me", "web-1", "a_b"] {
        assert_eq!(with(&|o| o.user = Some(name.into())), None);
    }
    for name in [
        "",
        "root",
        "1a",
        "A",
        "a b",
        "a:b",
        "$(id)",
        &"a".repeat(40),
    ] {
        assert!(with(&|o| o.user = Some(name.into())).is_some(), "{name}");
    }
    assert!(with(&|o| o.size = Some(MOST_SIZE + 1)).is_some());
}

#[test]
fn scripts_are_shell_scripts() {
    for script in [BOOT, SETUP] {
        let mut shell = Command::new("sh")
            .arg("-n")
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        let mut input = shell.stdin.take().unwrap();
        input.write_all(script.as_bytes()).unwrap();
        drop(input);
        assert!(shell.wait().unwrap().success());
    }
}

/// An archive as the machine writes it: a list of all files, and some of them.
fn archive(paths: &str, files: &[(&str, &str)]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (path, data) in [&[("lodger-paths", paths)], files].concat() {
        let mut header = tar::Header::new_gnu();
        header.set_size(data.len() as u64);
        header.set_mode(0o640);
        header.set_uid(0);
        header.set_gid(42);
        header.set_mtime(9);
        tar.append_data(&mut header, path, data.as_bytes()).unwrap();
    }
    tar.into_inner().unwrap()
}

#[test]
fn what_the_machine_changed_is_merged() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = Store::create(&dir.path().join("store")).unwrap();
    let mut tree = Tree::default();
    for path in ["etc/kept", "etc/changed", "etc/removed", "dev", "run"] {
        tree.file(path, 0o644, b"old".to_vec());
    }
    let tar = archive(
        "dev\netc\netc/changed\netc/kept\netc/new\nrun\n",
        &[
            ("etc/changed", "new"),
            ("etc/new", "new"),
            ("run", "mounted"),
        ],
    );
    merge(&mut tree, &tar[..], &mut store).unwrap();
    let text = |path: &str| {
        let bytes = tree.content(path)?.bytes().unwrap();
        Some(String::from_utf8(bytes).unwrap())
    };
    for (path, expected) in [
        ("etc/kept", Some("old")),
        ("etc/changed", Some("new")),
        ("etc/new", Some("new")),
        ("etc/removed", None),
        ("run", Some("old")),
    ] {
        assert_eq!(text(path).as_deref(), expected, "{path}");
    }
    assert_eq!(tree.get("etc/new").unwrap().owner, (0, 42));
    assert!(merge(&mut tree, io::empty(), &mut store).is_err());
}

/// A machine that says these lines, and how it ends.
struct Says(&'static [&'static str], Result<(), String>);

impl Guest for Says {
    fn run(&mut self, job: &GuestJob, line: &mut dyn FnMut(&str)) -> Result<(), String> {
        assert!(job.append.contains("init=/lodger/setup"));
        self.0.iter().for_each(|text| line(text));
        self.1.clone()
    }
}

#[test]
fn how_a_setup_ends() {
    let setup = Setup {
        epoch: 1,
        release: "6.1",
        user: None,
        packages: &[],
    };
    let job = GuestJob {
        kernel: "k".into(),
        initrd: "i".into(),
        append: "init=/lodger/setup".into(),
        disks: Vec::new(),
        memory: 1,
    };
    for (lines, ending, expected) in [
        (
            &["processing: configure: a", "LODGER-SETUP ok"][..],
            Ok(()),
            None,
        ),
        (&["LODGER-SETUP ok", "reboot: Power down"], Ok(()), None),
        (
            &[
                "one",
                "status: a: x",
                "two",
                "LODGER-SETUP failed: a.preinst",
                "Powering off",
            ],
            Ok(()),
            Some("one; two; failed: a.preinst"),
        ),
        (
            &["Kernel panic"],
            Ok(()),
            Some("Kernel panic; it ended early"),
        ),
        (&[], Err("no memory".to_owned()), Some("no memory")),
        (
            &["LODGER-SETUP ok"],
            Err("crashed".to_owned()),
            Some("crashed"),
        ),
    ] {
        let result = setup.run_guest(&job, &mut (), &mut Says(lines, ending));
        let detail = result.err().map(|error| match error {
            Error::Setup { detail } => detail,
            other => panic!("{other}"),
        });
        assert_eq!(detail.as_deref(), expected, "{lines:?}");
    }
}

#[test]
fn settings_of_an_image() {
    let mut tree = Tree::default();
    for (path, data) in [
        ("etc/machine-id", "0123"),
        ("etc/shadow-", "x"),
        ("var/lib/dbus/machine-id", "0123"),
        ("etc/ssh/ssh_host_rsa_key", "secret"),
        ("var/log/apt/history.log", "x"),
        ("lodger/setup", "x"),
        ("etc/passwd", "x"),
    ] {
        tree.file(path, 0o644, data.into());
    }
    let options = BuildOptions {
        user: Some("me".into()),
        ssh_keys: vec!["ssh-ed25519 AAAA me".into(), "ssh-ed25519 BBBB\n".into()],
        ..BuildOptions::default()
    };
    settings::apply(&mut tree, &options, "deb http://m.example sid main\n");
    for (path, expected) in [
        ("etc/machine-id", ""),
        ("etc/passwd", "x"),
        ("etc/apt/sources.list", "deb http://m.example sid main\n"),
        (
            "home/me/.ssh/authorized_keys",
            "ssh-ed25519 AAAA me\nssh-ed25519 BBBB\n",
        ),
        ("etc/sudoers.d/lodger", "me ALL=(ALL:ALL) NOPASSWD:ALL\n"),
    ] {
        let bytes = tree.content(path).unwrap().bytes().unwrap();
        assert_eq!(String::from_utf8(bytes).unwrap(), expected, "{path}");
    }
    let id = &tree.get("var/lib/dbus/machine-id").unwrap().kind;
    assert!(matches!(id, Kind::Symlink(to) if to == "/etc/machine-id"));
    let keys = tree.get("home/me/.ssh/authorized_keys").unwrap();
    assert_eq!((keys.owner, keys.permissions), ((1000, 1000), 0o600));
    for gone in [
        "etc/shadow-",
        "etc/ssh/ssh_host_rsa_key",
        "var/log/apt",
        "lodger",
    ] {
        assert!(tree.get(gone).is_none(), "{gone}");
    }
}
