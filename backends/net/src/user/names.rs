//! Names of the members of a switch, as a name server tells them. RFC 1035.

use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::path::PathBuf;

use rustix::fs::{FlockOperation, flock};

use super::addresses::GUEST;

/// What names may end in; DHCP tells the card to look there.
pub(crate) const DOMAIN: &str = "lodger.internal";

const HEADER: usize = 12;
const ADDRESS: u16 = 1;
const INTERNET: u16 = 1;
const NO_SUCH_NAME: u8 = 3;
/// Seconds that an answer may be remembered: members come and go.
const TTL: u32 = 2;

/// See the module documentation.
pub(crate) struct Names {
    directory: PathBuf,
}

impl Names {
    pub(crate) fn new(directory: PathBuf) -> Names {
        Names { directory }
    }

    /// The address of a member that is there.
    pub(crate) fn find(&self, name: &str) -> Option<Ipv4Addr> {
        let entries = fs::read_dir(&self.directory).ok()?;
        for entry in entries.flatten() {
            let file = entry.file_name();
            let number = file.to_str().and_then(|file| file.strip_suffix(".name"));
            let Some(number) = number.and_then(|number| number.parse::<u8>().ok()) else {
                continue;
            };
            let found = fs::read_to_string(entry.path());
            let same = found.is_ok_and(|found| found.eq_ignore_ascii_case(name));
            if same && self.is_taken(number) {
                return Some((GUEST.to_bits() + u32::from(number)).into());
            }
        }
        None
    }

    /// A place of whoever was killed is not.
    fn is_taken(&self, number: u8) -> bool {
        let lock = File::open(self.directory.join(format!("{number}.lock")));
        lock.is_ok_and(|lock| flock(&lock, FlockOperation::NonBlockingLockShared).is_err())
    }

    /// The answer to a query for a member's name. None: it is for others to answer.
    pub(crate) fn answer(&self, query: &[u8]) -> Option<Vec<u8>> {
        let word = |at: usize| Some(u16::from_be_bytes([*query.get(at)?, *query.get(at + 1)?]));
        // A standard query with one question.
        if word(2)? & 0xf800 != 0 || word(4)? != 1 {
            return None;
        }
        let (name, end) = name(query)?;
        let (kind, class) = (word(end)?, word(end + 2)?);
        let short = name.strip_suffix(DOMAIN).and_then(|n| n.strip_suffix('.'));
        let simple = short.unwrap_or(&name);
        let found = match simple.contains('.') || class != INTERNET {
            true => None,
            false => self.find(simple),
        };
        if found.is_none() && short.is_none() {
            return None;
        }
        let address = found.filter(|_| kind == ADDRESS);
        let mut reply = query[..end + 4].to_vec();
        reply[2] = 0x84 | query[2] & 1;
        reply[3] = 0x80 | if found.is_none() { NO_SUCH_NAME } else { 0 };
        reply[6..HEADER].fill(0);
        if let Some(address) = address {
            reply[7] = 1;
            // The name is that of the question.
            reply.extend([0xc0, HEADER as u8]);
            reply.extend(ADDRESS.to_be_bytes());
            reply.extend(INTERNET.to_be_bytes());
            reply.extend(TTL.to_be_bytes());
            reply.extend([0, 4]);
            reply.extend(address.octets());
        }
        Some(reply)
    }
}

/// The name that is asked for, in lower case, and where the question goes on.
fn name(query: &[u8]) -> Option<(String, usize)> {
    let mut name = String::new();
    let mut at = HEADER;
    loop {
        let len = usize::from(*query.get(at)?);
        let label = query.get(at + 1..at + 1 + len)?;
        at += 1 + len;
        match len {
            0 => return Some((name, at)),
            1..64 if name.len() < 255 && label.is_ascii() => {}
            _ => return None,
        }
        if !name.is_empty() {
            name.push('.');
        }
        name.extend(label.iter().map(|b| char::from(b.to_ascii_lowercase())));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn query(name: &str, kind: u16) -> Vec<u8> {
        let mut bytes = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        for label in name.split('.') {
            bytes.push(label.len() as u8);
            bytes.extend(label.as_bytes());
        }
        bytes.push(0);
        bytes.extend(kind.to_be_bytes());
        bytes.extend(INTERNET.to_be_bytes());
        bytes
    }

    #[test]
    fn members_are_found_by_name() {
        let directory = tempfile::tempdir().unwrap();
        let path = |file: &str| directory.path().join(file);
        let lock = File::create(path("1.lock")).unwrap();
        flock(&lock, FlockOperation::LockExclusive).unwrap();
        fs::write(path("1.name"), "web").unwrap();
        File::create(path("2.lock")).unwrap();
        fs::write(path("2.name"), "gone").unwrap();
        let names = Names::new(directory.path().into());
        /// The response code and the address; none: it is for others to answer.
        type Expected = Option<(u8, &'static [u8])>;
        let cases: &[(&str, u16, Expected)] = &[
            ("web", 1, Some((0, &[10, 0, 2, 16]))),
            ("WEB.lodger.internal", 1, Some((0, &[10, 0, 2, 16]))),
            ("web", 28, Some((0, &[]))),
            ("gone", 1, None),
            ("gone.lodger.internal", 1, Some((3, &[]))),
            ("web.example.org", 1, None),
            ("a.web.lodger.internal", 1, Some((3, &[]))),
        ];
        for (name, kind, expected) in cases {
            let query = query(name, *kind);
            let reply = names.answer(&query);
            let got = reply.as_ref().map(|reply| {
                assert_eq!((&reply[..2], reply[2] & 0x80), (&query[..2], 0x80));
                let answers = &reply[query.len()..];
                (reply[3] & 15, answers.get(12..).unwrap_or(&[]))
            });
            assert_eq!(got, *expected, "{name} {kind}");
        }
        let good = query("web", 1);
        for len in 0..good.len() {
            assert_eq!(names.answer(&good[..len]), None, "cut to {len}");
        }
        for (at, value) in [(2, 0x81), (5, 2), (12, 0xc0), (13, 0xff)] {
            let mut bad = good.clone();
            bad[at] = value;
            assert_eq!(names.answer(&bad), None, "{at}");
        }
    }
}
