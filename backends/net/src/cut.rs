//! What a card leaves to the other side, done here for a card that does not take it over: checksums, and the cutting of large TCP
//! segments (RFC 9293, RFC 1071; VIRTIO 1.2, section 5.1.6.2).

use crate::Offloads;
use crate::header::{Gso, HEADER_LEN, PacketHeader};
use crate::inlet::Sorted;

const ETHERNET: usize = 14;
const TCP: u8 = 6;
/// Segments of a packet, at most: one that asks for more is dropped.
const SEGMENTS: usize = 1024;

/// The one's complement sum of 16-bit words.
fn sum(start: u32, bytes: &[u8]) -> u32 {
    let mut sum = start;
    for word in bytes.chunks(2) {
        sum += u32::from(word[0]) << 8 | word.get(1).map_or(0, |low| u32::from(*low));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum
}

fn put(bytes: &mut [u8], at: usize, value: u16) {
    bytes[at..][..2].copy_from_slice(&value.to_be_bytes());
}

/// Makes a packet fit for a card that takes over `offloads`.
pub(crate) fn for_card(packet: &[u8], offloads: Offloads) -> Sorted {
    let nothing = Sorted::Instead(Vec::new());
    let Some((header, frame)) = PacketHeader::split(packet) else {
        return nothing;
    };
    match header.gso {
        Gso::Tcp4 if offloads.tso4 && header.needs_checksum => Sorted::AsItIs,
        Gso::None if offloads.checksum || !header.needs_checksum => Sorted::AsItIs,
        Gso::None => checksummed(header, frame).map_or(nothing, |p| Sorted::Instead(vec![p])),
        _ => segments(header, frame).map_or(nothing, Sorted::Instead),
    }
}

/// The packet with its checksum. None if that would be outside.
fn checksummed(header: PacketHeader, frame: &[u8]) -> Option<Vec<u8>> {
    let start = usize::from(header.checksum_start);
    let place = start + usize::from(header.checksum_offset);
    if place + 2 > frame.len() {
        return None;
    }
    let mut packet = PacketHeader::default().to_bytes().to_vec();
    packet.extend(frame);
    let value = match !sum(0, &frame[start..]) as u16 {
        // UDP: zero means that there is none.
        0 => 0xffff,
        value => value,
    };
    put(&mut packet[HEADER_LEN..], place, value);
    Some(packet)
}

/// The TCP segments of a large one. None if it is none.
fn segments(header: PacketHeader, frame: &[u8]) -> Option<Vec<Vec<u8>>> {
    let tcp = usize::from(header.checksum_start);
    let ip = frame.get(ETHERNET..tcp)?;
    let version = ip.first()? >> 4;
    let right = match version {
        4 => ip.len() == usize::from(ip[0] & 15) * 4 && ip.len() >= 20,
        6 => ip.len() >= 40,
        _ => false,
    };
    let payload = tcp + usize::from(frame.get(tcp + 12)? >> 4) * 4;
    let size = usize::from(header.segment_len);
    if !right || payload < tcp + 20 || payload > frame.len() || size == 0 {
        return None;
    }
    let (headers, payload) = frame.split_at(payload);
    let count = payload.len().div_ceil(size);
    if count > SEGMENTS {
        return None;
    }
    let first = u32::from_be_bytes(headers[tcp + 4..][..4].try_into().expect("4 bytes"));
    let segment = |(n, data): (usize, &[u8])| {
        let mut packet = PacketHeader::default().to_bytes().to_vec();
        packet.extend(headers);
        packet.extend(data);
        let frame = &mut packet[HEADER_LEN..];
        let behind_ip = frame.len() - tcp;
        let addresses = match version {
            4 => {
                let ident = u16::from_be_bytes([frame[ETHERNET + 4], frame[ETHERNET + 5]]);
                put(frame, ETHERNET + 2, (frame.len() - ETHERNET) as u16);
                put(frame, ETHERNET + 4, ident.wrapping_add(n as u16));
                put(frame, ETHERNET + 10, 0);
                let value = !sum(0, &frame[ETHERNET..tcp]) as u16;
                put(frame, ETHERNET + 10, value);
                ETHERNET + 12..ETHERNET + 20
            }
            _ => {
                put(frame, ETHERNET + 4, (frame.len() - ETHERNET - 40) as u16);
                ETHERNET + 8..ETHERNET + 40
            }
        };
        let sequence = first.wrapping_add((n * size) as u32);
        frame[tcp + 4..][..4].copy_from_slice(&sequence.to_be_bytes());
        if n + 1 < count {
            // FIN and PSH are the last one's,
            frame[tcp + 13] &= !0x09;
        }
        if n > 0 {
            // CWR the first one's.
            frame[tcp + 13] &= !0x80;
        }
        put(frame, tcp + 16, 0);
        let pseudo = sum(u32::from(TCP) + behind_ip as u32, &frame[addresses]);
        let value = !sum(pseudo, &frame[tcp..]) as u16;
        put(frame, tcp + 16, value);
        packet
    };
    Some(payload.chunks(size).enumerate().map(segment).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use smoltcp::wire::{EthernetFrame, Ipv4Packet, Ipv6Packet, TcpPacket};

    const NONE: Offloads = Offloads {
        checksum: false,
        tso4: false,
    };

    /// A TCP packet of 2500 bytes, over IPv4 or IPv6, as a card leaves it to others.
    fn large(v6: bool) -> Vec<u8> {
        let ip = if v6 { 40 } else { 20 };
        let header = PacketHeader {
            needs_checksum: true,
            gso: if v6 { Gso::Tcp6 } else { Gso::Tcp4 },
            headers_len: ETHERNET as u16 + ip + 20,
            segment_len: 1000,
            checksum_start: ETHERNET as u16 + ip,
            checksum_offset: 16,
            ..PacketHeader::default()
        };
        let mut packet = header.to_bytes().to_vec();
        packet.extend([2; 12]);
        match v6 {
            true => {
                packet.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 0, TCP, 64]);
                packet.extend([0xfd; 32]);
            }
            false => {
                packet.extend([8, 0, 0x45, 0, 0, 0, 0, 7, 0, 0, 64, TCP, 0, 0]);
                packet.extend([10, 0, 2, 15, 10, 0, 2, 16]);
            }
        }
        packet.extend([
            0, 80, 0, 81, 0, 0, 1, 0, 0, 0, 0, 9, 0x50, 0x99, 1, 0, 0, 0, 0, 0,
        ]);
        packet.extend((0..2500).map(|n| n as u8));
        packet
    }

    #[test]
    fn a_large_segment_is_cut() {
        for v6 in [false, true] {
            let Sorted::Instead(packets) = for_card(&large(v6), NONE) else {
                panic!("not cut")
            };
            let mut data = Vec::new();
            for (n, packet) in packets.iter().enumerate() {
                let (header, frame) = PacketHeader::split(packet).unwrap();
                assert_eq!(header, PacketHeader::default());
                let frame = EthernetFrame::new_checked(frame).unwrap();
                let check = |bytes: &[u8], from, to| {
                    let tcp = TcpPacket::new_checked(bytes).unwrap();
                    assert!(tcp.verify_checksum(&from, &to), "{v6} {n}");
                    assert_eq!(tcp.seq_number().0, 0x100 + 1000 * n as i32);
                    assert_eq!((tcp.fin(), tcp.psh(), tcp.cwr()), (n == 2, n == 2, n == 0));
                    tcp.payload().to_vec()
                };
                data.extend(match v6 {
                    false => {
                        let ip = Ipv4Packet::new_checked(frame.payload()).unwrap();
                        assert!(ip.verify_checksum());
                        assert_eq!(ip.ident(), 7 + n as u16);
                        check(ip.payload(), ip.src_addr().into(), ip.dst_addr().into())
                    }
                    true => {
                        let ip = Ipv6Packet::new_checked(frame.payload()).unwrap();
                        check(ip.payload(), ip.src_addr().into(), ip.dst_addr().into())
                    }
                });
            }
            assert_eq!(packets.len(), 3);
            assert_eq!(data, (0..2500).map(|n| n as u8).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_card_that_takes_it_over_gets_it_as_it_is() {
        let all = Offloads {
            checksum: true,
            tso4: true,
        };
        assert!(matches!(for_card(&large(false), all), Sorted::AsItIs));
        assert!(matches!(for_card(&large(true), all), Sorted::Instead(p) if p.len() == 3));
    }

    #[test]
    fn nonsense_is_dropped() {
        let good = large(false);
        let cases: &[(usize, u8)] = &[
            (1, 3),                     // unknown segmentation
            (4, 1),                     // segments of one byte
            (6, 0xff),                  // the checksum starts elsewhere
            (HEADER_LEN + 14, 0x46),    // the IP header is longer
            (HEADER_LEN + 34 + 12, 16), // the TCP header is shorter
        ];
        for (at, value) in cases {
            let mut packet = good.clone();
            packet[*at] = *value;
            if *at == 4 {
                packet[5] = 0;
            }
            let sorted = for_card(&packet, NONE);
            assert!(matches!(sorted, Sorted::Instead(p) if p.is_empty()), "{at}");
        }
        for len in 0..good.len().min(120) {
            for_card(&good[..len], NONE);
        }
    }
}
