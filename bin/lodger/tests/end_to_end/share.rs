//! Shared folders, from `--share` to the files of the guest.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;
use std::process::Command;

use crate::process::{Finished, lodger};

/// Runs a script in the image `mini`, which has the folder at /srv, and at /ro read-only.
fn run_script(folder: &Path, script: &str) -> Finished {
    fs::write(folder.join("script"), script).expect("a script");
    let folder = folder.to_str().expect("ASCII");
    lodger(&[
        "run",
        "mini",
        "-q",
        "--net",
        "none",
        "--share",
        &format!("{folder}:/srv"),
        "--share",
        &format!("{folder}:/ro:ro"),
        "--append",
        "lodger.run=\"sh /srv/script\"",
    ])
}

fn sha256(path: &Path) -> String {
    let output = Command::new("sha256sum").arg(path).output();
    let output = output.expect("sha256sum runs").stdout;
    String::from_utf8_lossy(&output)[..64].to_owned()
}

#[test]
fn guest_and_host_share_a_folder() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = |name: &str| dir.path().join(name);
    // Bytes that are nowhere the same.
    let bytes: Vec<u8> = (0..3 << 20_u32)
        .flat_map(|n: u32| n.wrapping_mul(2_654_435_761).to_le_bytes())
        .collect();
    fs::write(path("from-host"), &bytes).expect("a file");
    fs::write(path("old"), "old").expect("a file");
    symlink("/etc/passwd", path("link")).expect("a link");
    let script = r#"
        sha256sum /srv/from-host
        head -c 9000000 /dev/urandom > /srv/from-guest
        sha256sum /srv/from-guest
        dd if=/srv/from-host of=/srv/copy bs=1M conv=fsync 2>/dev/null
        cmp /srv/from-host /srv/copy && echo same
        mkdir /srv/many
        n=0; while [ $n -lt 2000 ]; do echo $n > /srv/many/$n; n=$((n + 1)); done
        echo there are $(ls /srv/many | wc -l), $(find /srv/many -type f | wc -l), $(cat /srv/many/* | wc -l)
        rm /srv/many/1?? && rmdir /srv/many || echo not empty
        echo new > /srv/new && mv /srv/new /srv/old && ls /srv/new
        cat /srv/old
        ln -s old /srv/soft && ln /srv/old /srv/hard && cat /srv/soft /srv/hard
        chmod 751 /srv/old && stat -c 'mode %a of %u' /srv/old
        chown 7 /srv/old || echo not given away
        cut -d: -f1-3 /srv/link
        cat /srv/../etc/passwd | cut -d: -f1-3
        echo x > /ro/x || echo not written
        rm -f /ro/old || echo not removed
        cat /ro/old
        truncate -s 5 /srv/copy
        tail -f /srv/many/0 >/tmp/tail & sleep 0.1
        echo more >> /srv/many/0; sleep 1; cat /tmp/tail; kill $!
        df /srv | tail -1 | cut -d' ' -f1
    "#;
    let text = run_script(dir.path(), script).expect(0).text();
    let has = |line: &str| assert!(text.lines().any(|l| l == line), "{line}\n{text}");
    has(&format!("{}  /srv/from-host", sha256(&path("from-host"))));
    has(&format!("{}  /srv/from-guest", sha256(&path("from-guest"))));
    has("same");
    has("there are 2000, 2000, 2000");
    has("not empty");
    let count = |line: &str| text.lines().filter(|l| *l == line).count();
    assert_eq!(count("new"), 4, "{text}");
    has("mode 751 of 0");
    has("not given away");
    // A link leads to the guest's own file, and so does the way up.
    assert_eq!(count("root::0"), 2, "{text}");
    has("not written");
    has("not removed");
    has("more");
    has("share0");
    assert_eq!(fs::read_dir(path("many")).expect("a folder").count(), 1900);
    for n in (0..100).chain(200..2000) {
        let expected = if n == 0 {
            "0\nmore\n".into()
        } else {
            format!("{n}\n")
        };
        assert_eq!(
            fs::read_to_string(path(&format!("many/{n}"))).expect("it is there"),
            expected
        );
    }
    let old = fs::metadata(path("old")).expect("it is there");
    assert_eq!((old.mode() & 0o7777, old.nlink()), (0o751, 2));
    assert_eq!(fs::read(path("copy")).expect("it is there"), bytes[..5]);
    assert_eq!(
        fs::read_link(path("soft")).expect("a link"),
        Path::new("old")
    );
    assert!(!path("x").exists());
}

#[test]
fn the_guest_sees_what_the_host_does() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = |name: &str| dir.path().join(name);
    fs::write(path("file"), "one").expect("a file");
    let host = {
        let (ask, answer, file) = (path("ask"), path("answer"), path("file"));
        let added = path("added");
        std::thread::spawn(move || {
            let deadline = std::time::Instant::now() + std::time::Duration::from_secs(100);
            while !ask.exists() && std::time::Instant::now() < deadline {
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
            fs::write(&file, "twotwo").expect("a file");
            fs::create_dir(&added).expect("a folder");
            fs::write(&answer, "").expect("a file");
        })
    };
    let script = r#"
        cat /srv/file; ls /srv >/dev/null
        touch /srv/ask
        while [ ! -e /srv/answer ]; do sleep 0.2; done
        sleep 1.1
        echo now $(cat /srv/file)
        [ -d /srv/added ] && echo a folder
    "#;
    let text = run_script(dir.path(), script).expect(0).text();
    host.join().expect("it works");
    assert!(text.contains("now twotwo\na folder\n"), "{text}");
}

#[test]
fn what_cannot_be_shared_is_told_before_the_start() {
    let dir = tempfile::tempdir().expect("a directory");
    let folder = dir.path().to_str().expect("ASCII");
    fs::write(dir.path().join("file"), "").expect("a file");
    for (share, status, what) in [
        (
            format!("{folder}/nothing:/srv"),
            1,
            "No such file or directory",
        ),
        (
            format!("{folder}/file:/srv"),
            1,
            "share the folder that it is in",
        ),
        (format!("{folder}:srv"), 2, "where GUEST begins with /"),
        (format!("{folder}:/srv:rw"), 2, "unknown option 'rw'"),
    ] {
        let run = lodger(&["run", "mini", "--share", &share]).expect(status);
        assert!(run.stderr.contains(what), "{}", run.stderr);
        assert_eq!(run.text(), "", "no guest has started");
    }
}
