use std::io::{Read, Write};

use super::*;

/// Waits for one event.
fn next(sockets: &HostSockets) -> Event {
    let mut events = Vec::new();
    while events.is_empty() {
        sockets.wait(&mut events).unwrap();
    }
    assert_eq!(events.len(), 1, "{events:?}");
    events.remove(0)
}

#[test]
fn a_program_connects() {
    let dir = tempfile::tempdir().unwrap();
    let long = dir.path().join("d".repeat(100));
    fs::create_dir(&long).unwrap();
    for path in [dir.path().join("v"), long.join("v".repeat(20))] {
        let sockets = HostSockets::listen(&path).unwrap();
        let mode = path.metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let (address, _dir) = short(&path).unwrap();
        let mut program = UnixStream::connect(address).unwrap();
        program.write_all(b"CONN").unwrap();
        let mut events = Vec::new();
        sockets.wait(&mut events).unwrap();
        program.write_all(b"ECT 22\nhello").unwrap();
        let Event::Request { mut stream, port } = next(&sockets) else {
            panic!("no request");
        };
        assert_eq!(port, 22);
        sockets.watch(&stream, 7).unwrap();
        let mut told = false;
        while !told {
            let event = next(&sockets);
            let Event::Ready {
                token, readable, ..
            } = event
            else {
                panic!("{event:?}");
            };
            assert_eq!(token, 7);
            told = readable;
        }
        let mut bytes = [0; 5];
        stream.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"hello");
        drop(program);
        let event = next(&sockets);
        assert!(matches!(
            event,
            Event::Ready {
                token: 7,
                closed: true,
                ..
            }
        ));
        drop(sockets);
        assert!(!path.exists());
    }
}

#[test]
fn the_other_side_connects() {
    let dir = tempfile::tempdir().unwrap();
    let sockets = HostSockets::listen(&dir.path().join("v")).unwrap();
    let error = sockets.connect(80).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::NotFound);
    let listener = UnixListener::bind(dir.path().join("v_80")).unwrap();
    let stream = sockets.connect(80).unwrap();
    listener.accept().unwrap();
    drop(stream);
    drop(listener);
    let error = sockets.connect(80).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
}

#[test]
fn what_is_in_use_stays() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v");
    fs::write(&path, "a file").unwrap();
    assert!(matches!(
        HostSockets::listen(&path),
        Err(ListenError::InUse(_))
    ));
    assert_eq!(fs::read_to_string(&path).unwrap(), "a file");
    fs::remove_file(&path).unwrap();
    let first = HostSockets::listen(&path).unwrap();
    assert!(matches!(
        HostSockets::listen(&path),
        Err(ListenError::InUse(_))
    ));
    // What a crash leaves is no obstacle, and what came since is not taken away.
    fs::remove_file(&path).unwrap();
    drop(UnixListener::bind(&path).unwrap());
    let second = HostSockets::listen(&path).unwrap();
    drop(first);
    assert!(path.exists());
    drop(second);
    assert!(!path.exists());
}

#[test]
fn waking() {
    let dir = tempfile::tempdir().unwrap();
    let sockets = HostSockets::listen(&dir.path().join("v")).unwrap();
    sockets.wake();
    let mut events = Vec::new();
    sockets.wait(&mut events).unwrap();
    assert!(events.is_empty());
}
