//! Puts together IPv4 packets that the card sends in fragments. RFC 791, RFC 815.
//!
//! Fragments that overlap make their packet useless, as RFC 5722 has it for IPv6: no honest sender makes such.

use std::collections::VecDeque;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use smoltcp::wire::{IpProtocol, Ipv4Packet};

/// Packets under way at a time; a new one takes the place of the oldest.
const MOST: usize = 16;
/// How long a packet may take.
const PATIENCE: Duration = Duration::from_secs(15);
/// The longest payload of an IP packet.
const LONGEST: usize = 65515;

/// What the fragments of a packet have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Key {
    from: Ipv4Addr,
    to: Ipv4Addr,
    protocol: IpProtocol,
    ident: u16,
}

struct Partial {
    key: Key,
    payload: Vec<u8>,
    /// Which bytes are there, as ranges in order.
    have: Vec<(usize, usize)>,
    /// Known since the last fragment has come.
    len: Option<usize>,
    began: Instant,
}

/// All packets under way.
#[derive(Default)]
pub(crate) struct Fragments(VecDeque<Partial>);

impl Fragments {
    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }

    /// Takes a fragment; returns the payload of the packet that it completes.
    pub(crate) fn add(&mut self, packet: &Ipv4Packet<&[u8]>, now: Instant) -> Option<Vec<u8>> {
        self.0.retain(|p| now.duration_since(p.began) < PATIENCE);
        let key = Key {
            from: packet.src_addr(),
            to: packet.dst_addr(),
            protocol: packet.next_header(),
            ident: packet.ident(),
        };
        let at = match self.0.iter().position(|p| p.key == key) {
            Some(at) => at,
            None => {
                if self.0.len() == MOST {
                    self.0.pop_front();
                }
                self.0.push_back(Partial {
                    key,
                    payload: Vec::new(),
                    have: Vec::new(),
                    len: None,
                    began: now,
                });
                self.0.len() - 1
            }
        };
        let start = packet.frag_offset().into();
        match self.0[at].add(start, packet.payload(), !packet.more_frags()) {
            Some(false) => None,
            Some(true) => self.0.remove(at).map(|p| p.payload),
            None => {
                self.0.remove(at);
                None
            }
        }
    }
}

impl Partial {
    /// Takes a part of the payload; whether it is complete now. None: it never will be.
    fn add(&mut self, start: usize, part: &[u8], last: bool) -> Option<bool> {
        let end = start + part.len();
        let known = self.len.or(last.then_some(end));
        if end > LONGEST || part.is_empty() || known.is_some_and(|len| end > len) {
            return None;
        }
        let place = self.have.partition_point(|&(from, _)| from < start);
        let before = place.checked_sub(1).map_or(0, |n| self.have[n].1);
        let after = self.have.get(place).map_or(usize::MAX, |range| range.0);
        if start < before || end > after || last && self.len.is_some() {
            return None;
        }
        if last && self.have.last().is_some_and(|range| range.1 > end) {
            return None;
        }
        self.len = known;
        self.have.insert(place, (start, end));
        if self.payload.len() < end {
            self.payload.resize(end, 0);
        }
        self.payload[start..end].copy_from_slice(part);
        let there: usize = self.have.iter().map(|(from, to)| to - from).sum();
        Some(self.len == Some(there))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn partial() -> Partial {
        Partial {
            key: Key {
                from: Ipv4Addr::LOCALHOST,
                to: Ipv4Addr::LOCALHOST,
                protocol: IpProtocol::Udp,
                ident: 1,
            },
            payload: Vec::new(),
            have: Vec::new(),
            len: None,
            began: Instant::now(),
        }
    }

    #[test]
    fn parts_in_any_order_make_a_whole() {
        let whole: Vec<u8> = (0..100).collect();
        for order in [
            [0, 1, 2],
            [2, 1, 0],
            [1, 2, 0],
            [2, 0, 1],
            [0, 2, 1],
            [1, 0, 2],
        ] {
            let mut p = partial();
            for (n, part) in order.into_iter().enumerate() {
                let range = [0..40, 40..96, 96..100][part].clone();
                let complete = p.add(range.start, &whole[range], part == 2);
                assert_eq!(complete, Some(n == 2), "{order:?}");
            }
            assert_eq!(p.payload, whole);
        }
    }

    #[test]
    fn nonsense_is_given_up() {
        /// Start, length, and whether it says that it is the last one.
        type Part = (usize, usize, bool);
        let cases: &[&[Part]] = &[
            &[(0, 0, false)],
            &[(0, 8, false), (0, 8, false)],
            &[(0, 8, false), (7, 8, false)],
            &[(8, 8, false), (0, 9, false)],
            &[(8, 8, true), (16, 8, false)],
            &[(16, 8, false), (0, 8, true)],
            &[(8, 8, true), (8, 8, true)],
            &[(65512, 8, true)],
        ];
        for parts in cases {
            let mut p = partial();
            let results: Vec<_> = (parts.iter())
                .map(|&(start, len, last)| p.add(start, &vec![1; len], last))
                .collect();
            assert_eq!(results.last(), Some(&None), "{parts:?}");
        }
    }
}
