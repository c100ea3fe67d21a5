//! Stream sockets of AF_VSOCK: vsock(7).

use std::io;
use std::os::fd::OwnedFd;

use rustix::net::addr::{SocketAddrArg, SocketAddrLen, SocketAddrOpaque};
use rustix::net::{
    AddressFamily, SocketAddrAny, SocketFlags, SocketType, accept_with, bind, getpeername,
    listen as listen_at, socket_with,
};

/// Any address of this machine.
const ANY: u32 = u32::MAX;
/// The host's address.
const HOST: u32 = 2;
/// Connections that wait to be taken.
const BACKLOG: i32 = 128;

/// `struct sockaddr_vm`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Address {
    family: u16,
    reserved: u16,
    port: u32,
    cid: u32,
    flags: u8,
    zero: [u8; 3],
}

// SAFETY: the pointer is to a whole `sockaddr_vm`, which lives during the call.
unsafe impl SocketAddrArg for Address {
    unsafe fn with_sockaddr<R>(
        &self,
        f: impl FnOnce(*const SocketAddrOpaque, SocketAddrLen) -> R,
    ) -> R {
        let len = size_of::<Address>() as SocketAddrLen;
        f((&raw const *self).cast(), len)
    }
}

/// Listens at this port.
pub fn listen(port: u32) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::VSOCK, SocketType::STREAM, flags, None)?;
    let address = Address {
        family: AddressFamily::VSOCK.as_raw(),
        reserved: 0,
        port,
        cid: ANY,
        flags: 0,
        zero: [0; 3],
    };
    bind(&socket, &address)?;
    listen_at(&socket, BACKLOG)?;
    Ok(socket)
}

/// The next connection, if it is one of the host's: the guest's own programs must not get at what root may do.
pub fn accept(listener: &OwnedFd) -> io::Result<Option<OwnedFd>> {
    let connection = accept_with(listener, SocketFlags::CLOEXEC)?;
    let peer = getpeername(&connection)?;
    Ok((peer.and_then(|peer| cid(&peer)) == Some(HOST)).then_some(connection))
}

fn cid(address: &SocketAddrAny) -> Option<u32> {
    let whole = address.addr_len() as usize >= size_of::<Address>();
    if !whole || address.address_family() != AddressFamily::VSOCK {
        return None;
    }
    // SAFETY: it has been looked at that a whole `sockaddr_vm` is there; any bytes are one.
    let address = unsafe { address.as_ptr().cast::<Address>().read_unaligned() };
    Some(address.cid)
}
