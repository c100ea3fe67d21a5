//! TAP network interfaces. Linux: Documentation/networking/tuntap.rst, linux/if_tun.h.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::fs::{Mode, OFlags};

/// Bytes of the header in front of each frame: `struct virtio_net_hdr_v1` of linux/virtio_net.h.
pub const HEADER_LEN: usize = 12;

/// Attaches to the interface `name`. It must exist unless the caller may make interfaces. Each read gives a frame, each write takes one,
/// behind its header; neither waits.
pub fn open(name: &str) -> io::Result<OwnedFd> {
    // SAFETY: zero is a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The name ends with a zero.
    if name.is_empty() || name.len() >= request.ifr_name.len() || name.contains('\0') {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (place, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *place = byte as libc::c_char;
    }
    request.ifr_ifru.ifru_flags =
        (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let tap = rustix::fs::open("/dev/net/tun", flags, Mode::empty())?;
    // SAFETY: TUNSETIFF takes an `ifreq`, which outlives the call.
    check(unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })?;
    let len = HEADER_LEN as libc::c_int;
    // SAFETY: TUNSETVNETHDRSZ takes an int, which outlives the call.
    check(unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const len) })?;
    Ok(tap)
}

/// What whoever reads frames takes: those without checksum, and long TCP segments over IPv4.
pub fn set_offloads(tap: &OwnedFd, checksum: bool, tso4: bool) -> io::Result<()> {
    let mut bits = 0;
    if checksum {
        bits |= libc::TUN_F_CSUM;
        if tso4 {
            bits |= libc::TUN_F_TSO4;
        }
    }
    let bits = libc::c_ulong::from(bits);
    // SAFETY: TUNSETOFFLOAD takes a number.
    check(unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETOFFLOAD, bits) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    match result {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}
