//! The agent over a pair of connected sockets, on this machine.

use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use lodger_guest_protocol::{Exec, Exit, INPUT_WINDOW, WindowSize};

use super::*;

/// The host's end of a connection to an agent.
struct Host {
    stream: UnixStream,
    agent: Option<std::thread::JoinHandle<()>>,
}

impl Host {
    fn connect() -> Host {
        let (stream, other) = UnixStream::pair().unwrap();
        let patience = Some(Duration::from_secs(20));
        stream.set_read_timeout(patience).unwrap();
        stream.set_write_timeout(patience).unwrap();
        let agent = std::thread::spawn(move || serve(other.into()));
        Host {
            stream,
            agent: Some(agent),
        }
    }

    fn ask(request: Request) -> Host {
        let mut host = Host::connect();
        host.say(ToGuest::Request(VERSION, request));
        host
    }

    fn run(script: &str) -> Host {
        Host::exec(Exec {
            argv: ["sh", "-c", script].map(|word| word.into()).into(),
            ..Exec::default()
        })
    }

    fn exec(exec: Exec) -> Host {
        let mut host = Host::ask(Request::Exec(exec));
        assert_eq!(host.next(), FromGuest::Accepted(Answer::Done));
        host
    }

    fn say(&mut self, message: ToGuest) {
        write(&mut self.stream, &message).unwrap();
    }

    fn next(&mut self) -> FromGuest {
        read(&mut self.stream).unwrap().unwrap()
    }

    /// Everything up to the end: output, errors, the end.
    fn finish(&mut self) -> (Vec<u8>, Vec<u8>, Exit) {
        let (mut output, mut errors) = (Vec::new(), Vec::new());
        let exit = loop {
            match self.next() {
                FromGuest::Data(data) => output.extend(data),
                FromGuest::Errors(data) => errors.extend(data),
                FromGuest::Taken(_) | FromGuest::End => {}
                FromGuest::Exit(exit) => break exit,
                other => panic!("{other:?}"),
            }
        };
        (output, errors, exit)
    }

    fn failure(&mut self) -> Failure {
        loop {
            match self.next() {
                FromGuest::Failure(failure) => return failure,
                FromGuest::Accepted(_) | FromGuest::Data(_) => {}
                other => panic!("{other:?}"),
            }
        }
    }

    /// Reads until there is this text.
    fn wait_for(&mut self, text: &str) {
        let mut seen = String::new();
        while !seen.contains(text) {
            if let FromGuest::Data(data) = self.next() {
                seen += &String::from_utf8_lossy(&data);
            }
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = self.stream.shutdown(Shutdown::Both);
        let agent = self.agent.take().unwrap().join();
        assert!(agent.is_ok() || std::thread::panicking());
    }
}

fn text(bytes: Vec<u8>) -> String {
    String::from_utf8(bytes).unwrap()
}

#[test]
fn commands_end() {
    for (script, output, errors, exit) in [
        ("echo out; echo err >&2", "out\n", "err\n", Exit::Code(0)),
        ("exit 7", "", "", Exit::Code(7)),
        ("kill -TERM $$", "", "", Exit::Signal(15)),
        ("cat; wc -c", "0\n", "", Exit::Code(0)),
        (
            "echo $PATH | head -c 14; umask",
            "/usr/local/sbi0022\n",
            "",
            Exit::Code(0),
        ),
        // What stays behind does not hold the end up.
        (
            "sleep 1000 & echo over; kill $!",
            "over\n",
            "",
            Exit::Code(0),
        ),
    ] {
        let (out, err, end) = Host::run(script).finish();
        assert_eq!(
            (&text(out)[..], &text(err)[..], end),
            (output, errors, exit),
            "{script}"
        );
    }
    let mut host = Host::run("(sleep 1000 & echo $! ) ; exit 3");
    let (output, _, exit) = host.finish();
    assert_eq!(exit, Exit::Code(3));
    let pid = text(output).trim().parse().unwrap();
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}

#[test]
fn commands_have_an_environment() {
    let exec = Exec {
        argv: ["sh", "-c", "echo $A-$HOME; pwd"].map(|w| w.into()).into(),
        env: vec![
            (b"A".to_vec(), b"1 2".to_vec()),
            (b"HOME".to_vec(), b"/h".to_vec()),
        ],
        dir: Some(b"/usr".to_vec()),
        ..Exec::default()
    };
    let (output, _, _) = Host::exec(exec.clone()).finish();
    assert_eq!(text(output), "1 2-/h\n/usr\n");
    if rustix::process::getuid().is_root() {
        let exec = Exec {
            argv: ["sh", "-c", "id -u; id -G"].map(|w| w.into()).into(),
            user: Some("65534:12".into()),
            ..Exec::default()
        };
        let (output, errors, _) = Host::exec(exec).finish();
        assert_eq!(
            (text(output), text(errors)),
            ("65534\n12\n".into(), String::new())
        );
    }
}

#[test]
fn commands_that_cannot_run() {
    let exec = |words: &[&str]| Exec {
        argv: words.iter().map(|word| word.as_bytes().into()).collect(),
        ..Exec::default()
    };
    let script = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(script.path(), "#!/no/such/interpreter\n").unwrap();
    let path = script.path().to_str().unwrap();
    let cannot = exec(&[path]);
    let directory = Exec {
        dir: Some(b"/no/such".to_vec()),
        ..exec(&["true"])
    };
    let user = Exec {
        user: Some("no-such-user".into()),
        ..exec(&["true"])
    };
    let variable = Exec {
        env: vec![(b"A=B".to_vec(), Vec::new())],
        ..exec(&["true"])
    };
    for (exec, kind, says) in [
        (
            exec(&["no-such-program"]),
            FailureKind::NotFound,
            "no such program",
        ),
        (exec(&["/no/such"]), FailureKind::NotFound, "/no/such"),
        (cannot, FailureKind::NotRunnable, path),
        (exec(&["/etc"]), FailureKind::NotRunnable, "/etc"),
        (directory, FailureKind::Other, "/no/such is not a directory"),
        (user, FailureKind::Other, "no-such-user"),
        (exec(&[]), FailureKind::Request, "no command"),
        (exec(&[""]), FailureKind::Request, "no command"),
        (exec(&["a\0b"]), FailureKind::NotRunnable, "a"),
        (variable, FailureKind::Request, "A=B"),
    ] {
        let failure = Host::ask(Request::Exec(exec)).failure();
        assert_eq!(failure.kind, kind, "{}", failure.message);
        assert!(failure.message.contains(says), "{}", failure.message);
    }
}

#[test]
fn much_output_for_a_slow_host() {
    let mut host = Host::run("head -c 5000000 /dev/zero; head -c 3000000 /dev/zero >&2");
    std::thread::sleep(Duration::from_millis(300));
    let (output, errors, exit) = host.finish();
    assert_eq!(
        (output.len(), errors.len(), exit),
        (5_000_000, 3_000_000, Exit::Code(0))
    );
}

#[test]
fn much_input_for_a_slow_command() {
    let mut host = Host::exec(Exec {
        argv: ["sh", "-c", "sleep 0.3; wc -c"].map(|w| w.into()).into(),
        input: true,
        ..Exec::default()
    });
    let mut window = INPUT_WINDOW as usize;
    let mut left = 3_000_000;
    while left > 0 {
        while window == 0 {
            if let FromGuest::Taken(n) = host.next() {
                window += n as usize;
            }
        }
        let n = window.min(left).min(30_000);
        host.say(ToGuest::Data(vec![1; n]));
        window -= n;
        left -= n;
    }
    host.say(ToGuest::End);
    let (output, _, _) = host.finish();
    assert_eq!(text(output).trim(), "3000000");
}

/// Signals are heard whatever the command leaves unread; so are those who send more than they may.
#[test]
fn signals_and_the_window() {
    let exec = Exec {
        argv: [
            "sh",
            "-c",
            "trap 'exit 9' USR1; echo up; while :; do sleep 0.05; done",
        ]
        .map(|w| w.into())
        .into(),
        input: true,
        ..Exec::default()
    };
    let mut host = Host::exec(exec.clone());
    host.wait_for("up");
    for _ in 0..4 {
        host.say(ToGuest::Data(vec![0; INPUT_WINDOW as usize / 4]));
    }
    host.say(ToGuest::Signal(10));
    assert_eq!(host.finish().2, Exit::Code(9));
    let mut host = Host::exec(exec);
    host.wait_for("up");
    let part = ToGuest::Data(vec![0; INPUT_WINDOW as usize / 4]);
    let written = (0..9).try_for_each(|_| write(&mut host.stream, &part));
    assert!(written.is_ok() || written.is_err_and(|e| e.kind() == io::ErrorKind::BrokenPipe));
    // The pipe has taken some; more than that and the window ends it.
    let mut rest = Vec::new();
    let ended = host.stream.read_to_end(&mut rest);
    assert!(ended.is_ok() || ended.is_err_and(|e| e.kind() == io::ErrorKind::ConnectionReset));
}

#[test]
fn commands_have_terminals() {
    let mut host = Host::exec(Exec {
        argv: [
            "sh",
            "-c",
            "tty; stty size; read line; stty size; cat; echo end",
        ]
        .map(|w| w.into())
        .into(),
        terminal: Some(WindowSize {
            columns: 91,
            rows: 17,
        }),
        input: true,
        ..Exec::default()
    });
    host.wait_for("17 91");
    host.say(ToGuest::Resize(WindowSize {
        columns: 100,
        rows: 30,
    }));
    host.say(ToGuest::Data(b"x\n".to_vec()));
    host.wait_for("30 100");
    // The end of the input, and the key that interrupts.
    host.say(ToGuest::End);
    let (output, errors, exit) = host.finish();
    assert!(text(output).ends_with("end\r\n"));
    assert_eq!((errors, exit), (vec![], Exit::Code(0)));
    let mut host = Host::exec(Exec {
        argv: [
            "sh",
            "-c",
            "trap 'exit 5' INT; echo up; while :; do sleep 0.05; done",
        ]
        .map(|w| w.into())
        .into(),
        terminal: Some(WindowSize {
            columns: 80,
            rows: 25,
        }),
        input: true,
        ..Exec::default()
    });
    host.wait_for("up");
    host.say(ToGuest::Data(vec![3]));
    assert_eq!(host.finish().2, Exit::Code(5));
}

#[test]
fn a_host_that_goes_takes_its_command_with_it() {
    for terminal in [
        None,
        Some(WindowSize {
            columns: 80,
            rows: 25,
        }),
    ] {
        let mut host = Host::exec(Exec {
            argv: ["sh", "-c", "echo up; exec sleep 1000"]
                .map(|w| w.into())
                .into(),
            terminal,
            ..Exec::default()
        });
        host.wait_for("up");
        // Waits for the agent's thread, which waits for the command.
        drop(host);
    }
}

#[test]
fn files_go_both_ways() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).into_os_string().into_encoded_bytes();
    std::fs::write(dir.path().join("a"), vec![7; 3_000_000]).unwrap();
    let mut host = Host::ask(Request::Pack {
        path: path("a"),
        name: b"b".to_vec(),
        follow: false,
    });
    assert_eq!(host.next(), FromGuest::Accepted(Answer::Done));
    let mut tar = Vec::new();
    loop {
        match host.next() {
            FromGuest::Data(data) => tar.extend(data),
            FromGuest::End => break,
            other => panic!("{other:?}"),
        }
    }
    let mut host = Host::ask(Request::Unpack { dir: path("") });
    assert_eq!(host.next(), FromGuest::Accepted(Answer::Done));
    for part in tar.chunks(100_000) {
        host.say(ToGuest::Data(part.into()));
    }
    host.say(ToGuest::End);
    assert_eq!(host.next(), FromGuest::End);
    assert!(std::fs::read(dir.path().join("b")).unwrap() == vec![7; 3_000_000]);

    let failure = Host::ask(Request::Pack {
        path: path("none"),
        name: b"b".to_vec(),
        follow: false,
    })
    .failure();
    assert!(failure.message.contains("none"), "{}", failure.message);
    // A failure in the middle is told when everything has been sent.
    let mut host = Host::ask(Request::Unpack { dir: path("none") });
    for part in tar.chunks(100_000) {
        host.say(ToGuest::Data(part.into()));
    }
    host.say(ToGuest::End);
    let failure = host.failure();
    assert!(failure.message.contains("none"), "{}", failure.message);

    for (name, follow, kind) in [
        ("a", false, Some(FileKind::File)),
        ("", false, Some(FileKind::Directory)),
        ("link", false, Some(FileKind::Link)),
        ("link", true, Some(FileKind::File)),
        ("a/b", true, None),
        ("none", true, None),
    ] {
        // It may be there already.
        let _ = std::os::unix::fs::symlink("a", dir.path().join("link"));
        let mut host = Host::ask(Request::Stat {
            path: path(name),
            follow,
        });
        assert_eq!(
            host.next(),
            FromGuest::Accepted(Answer::Found(kind)),
            "{name}"
        );
    }
}

#[test]
fn a_port_of_the_guest() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut asked = String::new();
        stream.read_to_string(&mut asked).unwrap();
        stream.write_all(asked.to_uppercase().as_bytes()).unwrap();
    });
    let mut host = Host::ask(Request::Dial { port });
    assert_eq!(host.next(), FromGuest::Accepted(Answer::Done));
    host.say(ToGuest::Data(b"hello".to_vec()));
    host.say(ToGuest::End);
    assert_eq!(host.next(), FromGuest::Data(b"HELLO".to_vec()));
    assert_eq!(host.next(), FromGuest::End);
    server.join().unwrap();
    let failure = Host::ask(Request::Dial { port: 1 }).failure();
    assert!(failure.message.contains("port 1 "), "{}", failure.message);
}

#[test]
fn requests_that_are_none() {
    let mut host = Host::ask(Request::Ping);
    assert!(matches!(host.next(), FromGuest::Accepted(Answer::Pong(_))));
    let mut host = Host::connect();
    host.say(ToGuest::Request(99, Request::Ping));
    let failure = host.failure();
    assert_eq!(
        (failure.kind, &failure.message[..]),
        (FailureKind::Version, "1")
    );
    let mut host = Host::connect();
    host.say(ToGuest::Signal(9));
    assert_eq!(host.failure().kind, FailureKind::Request);
    let mut host = Host::connect();
    host.stream.write_all(&[0xff; 100]).unwrap();
    assert_eq!(host.failure().kind, FailureKind::Request);
}
