//! Binds listening sockets that several workers can accept from side by side.

use std::{io, net::SocketAddr};

use socket2::{Domain, Protocol, Socket, Type};

/// The kernel's queue of connections that nobody has accepted yet.
const BACKLOG: i32 = 4096;

/// What waits in the kernel for a UDP socket's reader, or for the network.
const UDP_BUFFER: usize = 2 << 20;

/// Binds `count` sockets to one address by `SO_REUSEPORT`: the kernel spreads new connections
/// over them by a hash of the peer, so no accept lock is shared between cores.
///
/// All or nothing: with port 0 the first one picks the port for all.
///
/// # Errors
/// Whatever the system says: the address is in use, not ours, or needs privileges.
pub fn bind(address: SocketAddr, count: usize) -> io::Result<Vec<std::net::TcpListener>> {
    let first = one(address)?;
    let address = first.local_addr()?;
    let mut sockets = vec![first];
    while sockets.len() < count {
        sockets.push(one(address)?);
    }
    Ok(sockets)
}

/// Binds `count` UDP sockets to one address, likewise: a client's packets come to the same one for
/// as long as its address stays.
///
/// # Errors
/// As for [`bind`].
pub fn bind_udp(address: SocketAddr, count: usize) -> io::Result<Vec<std::net::UdpSocket>> {
    let one = || {
        let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
        socket.set_reuse_port(true)?;
        if address.is_ipv6() {
            let _ = socket.set_only_v6(false);
        }
        // A burst of one client must not push out what others sent. The kernel gives what it may.
        let _ = socket.set_recv_buffer_size(UDP_BUFFER);
        let _ = socket.set_send_buffer_size(UDP_BUFFER);
        socket.set_nonblocking(true)?;
        socket.bind(&address.into())?;
        Ok(socket.into())
    };
    (0..count).map(|_| one()).collect()
}

/// Binds one socket to an address that nobody else listens on. `replaces`: one of ours may, which
/// was bound here too and is about to be closed.
///
/// # Errors
/// As for [`bind`].
pub fn bind_alone(address: SocketAddr, replaces: bool) -> io::Result<std::net::TcpListener> {
    let socket = socket(address, replaces)?;
    // For the one that replaces this one. Set after binding, it lets nobody in beside us that
    // does not ask for it.
    socket.set_reuse_port(true)?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

fn one(address: SocketAddr) -> io::Result<std::net::TcpListener> {
    let socket = socket(address, true)?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

fn socket(address: SocketAddr, shared: bool) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(shared)?;
    if address.is_ipv6() {
        // `[::]` means every address of either family, as operators expect; a kernel that is
        // built without it still serves IPv6.
        let _ = socket.set_only_v6(false);
    }
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    Ok(socket)
}

/// From now on `listener` takes part in no new handshake: the kernel drops a client's SYN as if
/// it had been lost, so that the client tries again a second later and is refused then, rather
/// than connected and reset. Handshakes under way go on.
///
/// # Errors
/// Whatever the system says; systems without socket filters say that they have none.
#[cfg(target_os = "linux")]
pub(super) fn refuse_handshakes(listener: &impl std::os::fd::AsFd) -> io::Result<()> {
    use socket2::SockFilter;
    // A filter on a TCP socket sees the segment from its TCP header on (tcp(7), socket(7)
    // SO_ATTACH_FILTER). Byte 13 holds the flags: with SYN (0x02) and without ACK (0x10) it opens
    // a connection. The numbers are classic BPF: load byte, and, jump if equal, return.
    const OPENS: [SockFilter; 5] = [
        SockFilter::new(0x30, 0, 0, 13),
        SockFilter::new(0x54, 0, 0, 0x12),
        SockFilter::new(0x15, 0, 1, 0x02),
        SockFilter::new(0x06, 0, 0, 0),
        SockFilter::new(0x06, 0, 0, u32::MAX),
    ];
    socket2::SockRef::from(listener).attach_filter(&OPENS)
}

/// Nothing like it here.
#[cfg(not(target_os = "linux"))]
pub(super) fn refuse_handshakes(_listener: &impl std::os::fd::AsFd) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(target_os = "linux")]
    #[test]
    fn a_listener_that_refuses_handshakes_keeps_whom_it_has() {
        use std::{io::Read as _, net::TcpStream, time::Duration};

        let listener = bind("127.0.0.1:0".parse().unwrap(), 1).unwrap().remove(0);
        let address = listener.local_addr().unwrap();
        let mut before = TcpStream::connect(address).unwrap();
        refuse_handshakes(&listener).unwrap();
        let after = TcpStream::connect_timeout(&address, Duration::from_millis(100));
        assert_eq!(after.unwrap_err().kind(), io::ErrorKind::TimedOut);
        let (mut accepted, _) = listener.accept().unwrap();
        drop(listener);
        io::Write::write_all(&mut accepted, b"x").unwrap();
        before.read_exact(&mut [0]).unwrap();
    }

    #[test]
    fn all_sockets_share_one_port() {
        let sockets = bind("127.0.0.1:0".parse().unwrap(), 3).unwrap();
        let ports: Vec<_> = sockets.iter().map(|s| s.local_addr().unwrap().port()).collect();
        assert_ne!(ports[0], 0);
        assert!(ports.iter().all(|port| *port == ports[0]), "{ports:?}");
    }
}
