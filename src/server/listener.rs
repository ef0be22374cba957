//! Binds listening sockets that several workers can accept from side by side.

use std::{io, net::SocketAddr};

use socket2::{Domain, Protocol, Socket, Type};

/// The kernel's queue of connections that nobody has accepted yet.
const BACKLOG: i32 = 4096;

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

fn one(address: SocketAddr) -> io::Result<std::net::TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    if address.is_ipv6() {
        // `[::]` means every address of either family, as operators expect; a kernel that is
        // built without it still serves IPv6.
        let _ = socket.set_only_v6(false);
    }
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_sockets_share_one_port() {
        let sockets = bind("127.0.0.1:0".parse().unwrap(), 3).unwrap();
        let ports: Vec<_> = sockets.iter().map(|s| s.local_addr().unwrap().port()).collect();
        assert_ne!(ports[0], 0);
        assert!(ports.iter().all(|port| *port == ports[0]), "{ports:?}");
    }
}
