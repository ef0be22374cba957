//! A client's connection: a socket, in clear text or below TLS.

use std::{
    io::{self, ErrorKind, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    sync::Arc,
};

use rustls::{ClientConfig, ClientConnection, HandshakeKind, pki_types::ServerName};

use super::tls::HOST;
use crate::{Failure, message::Fault};

/// A connected socket that does not block, and what waits to be sent on it.
pub(super) struct Wire {
    pub(super) stream: TcpStream,
    tls: Option<Box<ClientConnection>>,
    /// In clear text.
    pub(super) out: Vec<u8>,
    /// How much of it the socket has taken.
    taken: usize,
}

/// Why a connection can't be used on.
#[derive(Debug)]
pub(super) struct Broken;

impl From<Fault> for Broken {
    fn from(_: Fault) -> Self {
        Self
    }
}

impl Wire {
    pub(super) fn connect(
        address: SocketAddr,
        tls: Option<&Arc<ClientConfig>>,
    ) -> Result<Self, Failure> {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        let tls = tls.cloned().map(|config| {
            let name = ServerName::try_from(HOST)?;
            Ok::<_, Failure>(Box::new(ClientConnection::new(config, name)?))
        });
        Ok(Self { stream, tls: tls.transpose()?, out: Vec::new(), taken: 0 })
    }

    /// Whether the session was resumed; `None` without one, or after a detour.
    pub(super) fn is_resumed(&self) -> Option<bool> {
        match self.tls.as_ref()?.handshake_kind()? {
            HandshakeKind::Full => Some(false),
            HandshakeKind::Resumed => Some(true),
            HandshakeKind::FullWithHelloRetryRequest => None,
        }
    }

    /// Reads once, at most `most` bytes of the socket. Calls `each` with the text and with where
    /// replies go.
    pub(super) fn read(
        &mut self,
        buffer: &mut [u8],
        most: usize,
        mut each: impl FnMut(&[u8], &mut Vec<u8>) -> Result<(), Fault>,
    ) -> Result<(), Broken> {
        let Some(tls) = &mut self.tls else {
            let most = most.min(buffer.len());
            let read = match self.stream.read(buffer.get_mut(..most).unwrap_or_default()) {
                Ok(0) => return Err(Broken),
                Ok(read) => read,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(_) => return Err(Broken),
            };
            return Ok(each(buffer.get(..read).unwrap_or_default(), &mut self.out)?);
        };
        match tls.read_tls(&mut (&self.stream).take(most as u64)) {
            Ok(0) => return Err(Broken),
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
            Err(_) => return Err(Broken),
        }
        tls.process_new_packets().map_err(|_| Broken)?;
        loop {
            match tls.reader().read(buffer) {
                Ok(0) => return Err(Broken),
                Ok(read) => each(buffer.get(..read).unwrap_or_default(), &mut self.out)?,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(_) => return Err(Broken),
            }
        }
    }

    /// Hands the socket what it takes. Whether that is all.
    pub(super) fn flush(&mut self) -> Result<bool, Broken> {
        let done = match &mut self.tls {
            None => Self::send(&mut self.stream, &mut self.out, &mut self.taken),
            Some(tls) => {
                if !self.out.is_empty() {
                    tls.writer().write_all(&self.out).map_err(|_| Broken)?;
                    self.out.clear();
                }
                loop {
                    if !tls.wants_write() {
                        break Ok(true);
                    }
                    match tls.write_tls(&mut self.stream) {
                        Ok(_) => {}
                        Err(error) if error.kind() == ErrorKind::WouldBlock => break Ok(false),
                        Err(error) => break Err(error),
                    }
                }
            }
        };
        done.map_err(|_| Broken)
    }

    fn send(stream: &mut TcpStream, out: &mut Vec<u8>, taken: &mut usize) -> io::Result<bool> {
        while *taken < out.len() {
            match stream.write(out.get(*taken..).unwrap_or_default()) {
                Ok(more) => *taken += more,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        out.clear();
        *taken = 0;
        Ok(true)
    }

    /// Says goodbye as a client does that has what it wanted.
    pub(super) fn close(mut self) {
        if let Some(tls) = &mut self.tls {
            tls.send_close_notify();
            let _ = self.flush();
        }
    }
}
