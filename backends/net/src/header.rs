//! The header in front of each frame: `struct virtio_net_hdr_v1` of Linux's `linux/virtio_net.h`, which tap devices and packet sockets
//! use as well; the meaning of its fields is in VIRTIO 1.2, section 5.1.6. Little-endian.

/// Bytes of a [`PacketHeader`].
pub const HEADER_LEN: usize = 12;

const NEEDS_CHECKSUM: u8 = 1;
const CHECKSUM_IS_VALID: u8 = 2;
const ECN: u8 = 0x80;

/// Into what a frame is still to be cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Gso {
    /// Nothing.
    #[default]
    None,
    /// TCP segments over IPv4.
    Tcp4,
    /// TCP segments over IPv6.
    Tcp6,
}

/// What is left to do for a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PacketHeader {
    /// The checksum at `checksum_start + checksum_offset` covers the frame from `checksum_start` on and is not there yet; only the sum
    /// of the pseudo-header is.
    pub needs_checksum: bool,
    /// The checksums need not be looked at.
    pub checksum_is_valid: bool,
    /// What the frame is to be cut into.
    pub gso: Gso,
    /// Bytes of all headers of the frame; a hint.
    pub headers_len: u16,
    /// Bytes of payload of each segment to be.
    pub segment_len: u16,
    /// See `needs_checksum`; bytes from the frame's start.
    pub checksum_start: u16,
    /// See `needs_checksum`.
    pub checksum_offset: u16,
}

impl PacketHeader {
    /// Its bytes, for a frame in one buffer.
    pub fn to_bytes(self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        if self.needs_checksum {
            bytes[0] |= NEEDS_CHECKSUM;
        }
        if self.checksum_is_valid {
            bytes[0] |= CHECKSUM_IS_VALID;
        }
        bytes[1] = match self.gso {
            Gso::None => 0,
            Gso::Tcp4 => 1,
            Gso::Tcp6 => 4,
        };
        let fields = [
            self.headers_len,
            self.segment_len,
            self.checksum_start,
            self.checksum_offset,
            1,
        ];
        for (place, field) in bytes[2..].chunks_mut(2).zip(fields) {
            place.copy_from_slice(&field.to_le_bytes());
        }
        bytes
    }

    /// The header of a packet and its frame. None if it is too short, or asks for what is not known.
    pub fn split(packet: &[u8]) -> Option<(PacketHeader, &[u8])> {
        let (bytes, frame) = packet.split_first_chunk::<HEADER_LEN>()?;
        let field = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let header = PacketHeader {
            needs_checksum: bytes[0] & NEEDS_CHECKSUM != 0,
            checksum_is_valid: bytes[0] & CHECKSUM_IS_VALID != 0,
            gso: match bytes[1] & !ECN {
                0 => Gso::None,
                1 => Gso::Tcp4,
                4 => Gso::Tcp6,
                _ => return None,
            },
            headers_len: field(2),
            segment_len: field(4),
            checksum_start: field(6),
            checksum_offset: field(8),
        };
        Some((header, frame))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_survives_its_bytes() {
        let header = PacketHeader {
            needs_checksum: true,
            checksum_is_valid: false,
            gso: Gso::Tcp4,
            headers_len: 54,
            segment_len: 1460,
            checksum_start: 34,
            checksum_offset: 16,
        };
        let mut packet = header.to_bytes().to_vec();
        assert_eq!(packet, [1, 1, 54, 0, 0xb4, 5, 34, 0, 16, 0, 1, 0]);
        packet.extend(b"frame");
        assert_eq!(PacketHeader::split(&packet), Some((header, &b"frame"[..])));
    }

    #[test]
    fn what_is_short_or_unknown_is_refused() {
        assert_eq!(PacketHeader::split(&[0; 11]), None);
        assert_eq!(
            PacketHeader::split(&[0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
            None
        );
    }
}
