//! A switch between the machines of one user, without anybody in between: each member has a socket in the switch's directory, and sends
//! frames to those of the others. Beyond that every member has a gateway of its own, as in a user-mode network.
//!
//! A member takes the first free place of the directory, which gives it its addresses: place N is card 52:54:00:4c:64:N and
//! 10.0.2.(15+N). Files of a place: `N.lock` (locked as long as it is taken), `N.sock`, and `N.name` for the name server.
//! Frames for the address of a place go there; all others, and those to several, to everybody.
//!
//! Limits: 200 members; a member that does not take its frames loses them after a moment, as on any network.

use std::collections::HashMap;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use lodger_clock::InputPort;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType, bind, connect, send,
    socket_with,
};
use serde::{Deserialize, Serialize};

use crate::cut;
use crate::header::HEADER_LEN;
use crate::inlet::Inlet;
use crate::user::addresses::{GATEWAY_MAC, GUEST};
use crate::user::names::Names;
use crate::user::{NetError, UserNet, UserNetSpec};
use crate::{NetBackend, Offloads};

/// Places of a switch.
const PLACES: u8 = 200;
/// Of the cards' addresses, before the place.
const MAC: [u8; 5] = [0x52, 0x54, 0x00, 0x4c, 0x64];
/// How long a frame waits for a member that has many already.
const PATIENCE: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 10_000_000,
};
/// How long such a member is not waited for again.
const SLOW: Duration = Duration::from_millis(200);
/// How long the list of members is believed.
const FRESH: Duration = Duration::from_millis(200);

/// A place at a switch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SwitchSpec {
    /// The switch's directory, which is made if need be. It must belong to the user alone.
    pub directory: PathBuf,
    /// The name by which other members find this one.
    #[serde(default)]
    pub name: Option<String>,
    /// The way out.
    #[serde(default)]
    pub user: UserNetSpec,
}

/// See the module documentation.
pub struct SwitchNet {
    user: UserNet,
    inlet: Inlet<OwnedFd>,
    place: Place,
    members: Mutex<Members>,
}

/// A place that is taken.
struct Place {
    directory: PathBuf,
    number: u8,
    /// Locked.
    _lock: File,
}

#[derive(Default)]
struct Members {
    /// Who is there, but this one, and when that was looked up.
    others: Option<(Instant, Vec<u8>)>,
    sockets: HashMap<u8, Member>,
}

#[derive(Clone)]
struct Member {
    socket: Arc<OwnedFd>,
    /// It did not take a frame; when.
    slow: Option<Instant>,
}

impl Place {
    /// Takes the first free place.
    fn take(directory: &Path) -> io::Result<Place> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)?;
        for number in 0..PLACES {
            let lock = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(directory.join(format!("{number}.lock")))?;
            match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {
                    return Ok(Place {
                        directory: directory.into(),
                        number,
                        _lock: lock,
                    });
                }
                Err(Errno::WOULDBLOCK) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(io::Error::other(format!("all {PLACES} places are taken")))
    }

    fn file(&self, number: u8, kind: &str) -> PathBuf {
        self.directory.join(format!("{number}.{kind}"))
    }

    /// The socket at which the others' frames arrive.
    fn listen(&self) -> io::Result<OwnedFd> {
        let path = self.file(self.number, "sock");
        // That of an earlier member.
        remove(&path)?;
        let socket = datagrams()?;
        bind(&socket, &SocketAddrUnix::new(&path)?)?;
        Ok(socket)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        for kind in ["sock", "name"] {
            // What stays is replaced by the next member.
            let _ = remove(&self.file(self.number, kind));
        }
    }
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn datagrams() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(socket_with(
        AddressFamily::UNIX,
        SocketType::DGRAM,
        flags,
        None,
    )?)
}

impl SwitchNet {
    /// Takes a place at the switch.
    pub fn start(spec: &SwitchSpec) -> Result<SwitchNet, NetError> {
        let failed = |source| NetError::Switch {
            directory: spec.directory.clone(),
            source,
        };
        let place = Place::take(&spec.directory).map_err(failed)?;
        let name = place.file(place.number, "name");
        remove(&name).map_err(failed)?;
        if let Some(text) = &spec.name {
            fs::write(&name, text).map_err(failed)?;
        }
        let socket = place.listen().map_err(failed)?;
        let guest = (GUEST.to_bits() + u32::from(place.number)).into();
        let names = Names::new(spec.directory.clone());
        let user = UserNet::join(&spec.user, guest, Some(names))?;
        Ok(SwitchNet {
            user,
            inlet: Inlet::start(socket, cut::for_card)?,
            place,
            members: Mutex::default(),
        })
    }

    /// The card's address.
    pub fn mac(&self) -> [u8; 6] {
        let [a, b, c, d, e] = MAC;
        [a, b, c, d, e, self.place.number]
    }

    /// Who else is there.
    fn others(&self) -> Vec<u8> {
        let mut members = self.members.lock().expect("nothing panics under this lock");
        if let Some((when, others)) = &members.others
            && when.elapsed() < FRESH
        {
            return others.clone();
        }
        let number = |entry: io::Result<fs::DirEntry>| {
            let name = entry.ok()?.file_name();
            let number = name.to_str()?.strip_suffix(".sock")?.parse::<u8>().ok()?;
            (number < PLACES && number != self.place.number).then_some(number)
        };
        let entries = fs::read_dir(&self.place.directory).into_iter().flatten();
        let others: Vec<u8> = entries.filter_map(number).collect();
        members.others = Some((Instant::now(), others.clone()));
        others
    }

    /// The socket that leads to a member.
    fn member(&self, number: u8) -> io::Result<Member> {
        let mut members = self.members.lock().expect("nothing panics under this lock");
        if let Some(member) = members.sockets.get(&number) {
            return Ok(member.clone());
        }
        let socket = datagrams()?;
        connect(
            &socket,
            &SocketAddrUnix::new(self.place.file(number, "sock"))?,
        )?;
        let member = Member {
            socket: Arc::new(socket),
            slow: None,
        };
        members.sockets.insert(number, member.clone());
        Ok(member)
    }

    /// Sends a packet to a member. What it does not take is lost.
    fn deliver(&self, number: u8, packet: &[u8]) {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        // A second time if the member has left and another taken its place.
        for _ in 0..2 {
            let Ok(member) = self.member(number) else {
                return;
            };
            let mut sent = send(&member.socket, packet, flags);
            let waits = member.slow.is_none_or(|when| when.elapsed() > SLOW);
            if sent == Err(Errno::AGAIN) && waits {
                let mut fds = [PollFd::new(&*member.socket, PollFlags::OUT)];
                // Whatever comes of it, it is tried once more.
                let _ = poll(&mut fds, Some(&PATIENCE));
                sent = send(&member.socket, packet, flags);
                let slow = (sent == Err(Errno::AGAIN)).then(Instant::now);
                let mut members = self.members.lock().expect("nothing panics under this lock");
                if let Some(member) = members.sockets.get_mut(&number) {
                    member.slow = slow;
                }
            }
            if !matches!(
                sent,
                Err(Errno::CONNREFUSED | Errno::NOTCONN | Errno::CONNRESET)
            ) {
                return;
            }
            let mut members = self.members.lock().expect("nothing panics under this lock");
            members.sockets.remove(&number);
        }
    }
}

impl NetBackend for SwitchNet {
    fn connect(&self, card: Weak<dyn InputPort>) {
        self.user.connect(card.clone());
        self.inlet.connect(card);
    }

    fn start(&self, offloads: Offloads) {
        self.user.start(offloads);
        self.inlet.up(offloads);
    }

    fn stop(&self) {
        self.user.stop();
        self.inlet.down();
    }

    fn send(&self, packet: &[u8]) {
        let Some(to) = packet.get(HEADER_LEN..HEADER_LEN + 6) else {
            return;
        };
        let several = to[0] & 1 != 0;
        if several || to == GATEWAY_MAC.0 {
            self.user.send(packet);
        }
        if to == GATEWAY_MAC.0 {
            return;
        }
        match to[5] {
            number if to[..5] == MAC && number < PLACES => self.deliver(number, packet),
            _ => {
                for number in self.others() {
                    self.deliver(number, packet);
                }
            }
        }
    }

    fn flush(&self) {
        self.user.flush();
    }

    fn room(&self) {
        self.user.room();
        self.inlet.wake();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A card that remembers what it got.
    #[derive(Default)]
    struct Card(Mutex<Vec<Vec<u8>>>);

    impl InputPort for Card {
        fn offer(&self, packet: &[u8]) -> usize {
            self.0.lock().unwrap().push(packet.to_vec());
            packet.len()
        }
    }

    impl Card {
        /// The first frame of this kind from that address, when it comes.
        fn frame(&self, from: [u8; 6], kind: [u8; 2]) -> Vec<u8> {
            let end = Instant::now() + Duration::from_secs(20);
            while Instant::now() < end {
                for packet in self.0.lock().unwrap().iter() {
                    let frame = &packet[HEADER_LEN..];
                    if frame[6..12] == from && frame[12..14] == kind {
                        return frame.to_vec();
                    }
                }
                std::thread::sleep(Duration::from_millis(5));
            }
            panic!("no such frame came");
        }
    }

    fn join(directory: &Path, name: &str) -> (SwitchNet, Arc<Card>) {
        let net = SwitchNet::start(&SwitchSpec {
            directory: directory.into(),
            name: Some(name.into()),
            user: UserNetSpec {
                isolated: true,
                ..UserNetSpec::default()
            },
        });
        let (net, card) = (net.unwrap(), Arc::new(Card::default()));
        let port: Arc<dyn InputPort> = card.clone();
        net.connect(Arc::downgrade(&port));
        net.start(Offloads {
            checksum: true,
            tso4: true,
        });
        (net, card)
    }

    fn frame(to: [u8; 6], from: [u8; 6], text: &[u8]) -> Vec<u8> {
        let mut packet = vec![0; HEADER_LEN];
        packet.extend(to);
        packet.extend(from);
        packet.extend([0x88, 0xb5]);
        packet.extend(text);
        packet
    }

    const KIND: [u8; 2] = [0x88, 0xb5];

    #[test]
    fn frames_go_to_the_member_they_are_for() {
        let directory = tempfile::tempdir().unwrap();
        let directory = directory.path().join("lan");
        let (a, card_a) = join(&directory, "a");
        let (b, card_b) = join(&directory, "b");
        let (c, card_c) = join(&directory, "c");
        let (mac_a, mac_b, mac_c) = (a.mac(), b.mac(), c.mac());
        a.send(&frame(mac_b, mac_a, b"for b"));
        assert!(card_b.frame(mac_a, KIND).ends_with(b"for b"));
        b.send(&frame([0xff; 6], mac_b, b"for all"));
        assert!(card_a.frame(mac_b, KIND).ends_with(b"for all"));
        assert!(card_c.frame(mac_b, KIND).ends_with(b"for all"));
        assert!(
            card_c
                .0
                .lock()
                .unwrap()
                .iter()
                .all(|p| p[HEADER_LEN + 6..][..6] != mac_a)
        );
        // Another takes the place of one that has left.
        drop(b);
        let (b, card_b) = join(&directory, "b2");
        assert_eq!(b.mac(), mac_b);
        a.send(&frame(mac_b, mac_a, b"for the new b"));
        assert!(card_b.frame(mac_a, KIND).ends_with(b"for the new b"));
        let names = Names::new(directory.clone());
        let address = |name| names.find(name);
        assert_eq!(address("B2"), Some([10, 0, 2, 16].into()));
        assert_eq!(
            (address("b"), address("c")),
            (None, Some([10, 0, 2, 17].into()))
        );
        drop((a, b, c));
        assert_eq!(names.find("c"), None);
        assert_ne!(mac_b, mac_c);
    }

    #[test]
    fn a_switch_that_cannot_be_made_is_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let spec = SwitchSpec {
            directory: file.path().join("lan"),
            name: None,
            user: UserNetSpec::default(),
        };
        let error = SwitchNet::start(&spec).err().expect("a file is in the way");
        assert!(error.to_string().contains("lan"), "{error}");
    }
}
