//! A Consul agent for the lease, and a way to it for each node that can be cut.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    path::Path,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use crate::{
    http,
    process::{Process, component, eventually, free_port},
};

/// Where LiteFS keeps the lease.
const KEY: &str = "litegate-e2e/primary";

/// How long an agent may take until it has elected itself.
const START: Duration = Duration::from_secs(30);

/// `consul agent -dev`: one server, which keeps everything in memory.
#[derive(Debug)]
pub(crate) struct Consul {
    #[expect(dead_code, reason = "it ends with this")]
    process: Process,
    address: SocketAddr,
}

impl Consul {
    /// Starts it, and waits until it takes writes.
    pub(crate) fn start(directory: &Path) -> Self {
        let port = || free_port(&[Ipv4Addr::LOCALHOST.into()]);
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port()));
        // What is -1 is not listened on.
        let ports = format!(
            "ports {{ http = {}, server = {}, serf_lan = {}, serf_wan = -1, dns = -1, grpc = -1, \
             grpc_tls = -1 }}",
            address.port(),
            port(),
            port(),
        );
        let args = [
            "agent",
            "-dev",
            "-node=e2e",
            "-bind=127.0.0.1",
            "-client=127.0.0.1",
            "-log-level=warn",
            "-hcl=disable_update_check = true, connect { enabled = false }",
            "-hcl",
            &ports,
        ];
        let log = directory.join("consul.log");
        let mut process = Process::start("consul", &component("consul"), &args, &log);
        eventually("Consul takes writes", START, || {
            assert!(process.is_running(), "Consul has ended:\n{}", process.log());
            let put = http::send(address, "PUT", "/v1/kv/litegate-e2e/ready", http::Body::EMPTY);
            match put {
                Ok(answer) if answer.status == 200 && answer.text().trim() == "true" => Ok(()),
                Ok(answer) => Err(format!("{} {}", answer.status, answer.text())),
                Err(error) => Err(error.to_string()),
            }
        });
        Self { process, address }
    }

    /// Its HTTP API, with nothing in between.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// The lease's key.
    pub(crate) fn key(&self) -> &'static str {
        KEY
    }

    /// Who holds the lease; `None` where nobody does.
    pub(crate) fn holder(&self) -> Option<String> {
        let answer = http::get(self.address, &format!("/v1/kv/{KEY}?raw")).ok()?;
        Some(answer.json().ok()?["hostname"].as_str()?.to_owned())
    }
}

/// What becomes of the bytes on their way.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Way {
    /// They pass.
    Open,
    /// Connections are closed, those that are there and those that come: calls fail at once.
    Cut,
    /// Nothing passes and nobody is told: calls hang. What is under way arrives when it is open
    /// again.
    Silent,
}

/// A TCP relay of ours to Consul.
#[derive(Debug)]
pub(crate) struct Relay {
    address: SocketAddr,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    way: Way,
    /// The relay is gone.
    over: bool,
    /// Both ends of each connection; those that ended are taken out when the next one comes.
    streams: Vec<(TcpStream, TcpStream)>,
}

impl Relay {
    /// Listens on a port of its own.
    pub(crate) fn start(to: SocketAddr) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("bind to loopback");
        let address = listener.local_addr().expect("a bound socket has an address");
        let state = Mutex::new(State { way: Way::Open, over: false, streams: Vec::new() });
        let shared = Arc::new(Shared { state, changed: Condvar::new() });
        let relay = Self { address, shared: Arc::clone(&shared) };
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                if shared.lock().over {
                    return;
                }
                // A node whose connection can't be carried on sees it close, as if it were cut.
                let _ = shared.join(client, to);
            }
        });
        relay
    }

    /// Where the node finds Consul.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// From now on.
    pub(crate) fn set(&self, way: Way) {
        let mut state = self.shared.lock();
        state.way = way;
        if way == Way::Cut {
            state.close();
        }
        self.shared.changed.notify_all();
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.shared.lock().over = true;
        self.set(Way::Cut);
        // The loop sees it when the next connection comes.
        let _ = TcpStream::connect(self.address);
    }
}

impl State {
    fn close(&mut self) {
        for (client, server) in self.streams.drain(..) {
            let _ = client.shutdown(Shutdown::Both);
            let _ = server.shutdown(Shutdown::Both);
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn join(self: &Arc<Self>, client: TcpStream, to: SocketAddr) -> std::io::Result<()> {
        let server = TcpStream::connect(to)?;
        let ends = (client.try_clone()?, server.try_clone()?);
        let mut state = self.lock();
        state.streams.retain(|(client, _)| client.peer_addr().is_ok());
        state.streams.push(ends);
        if state.way == Way::Cut {
            state.close();
        }
        drop(state);
        for (mut from, mut into) in [(client.try_clone()?, server.try_clone()?), (server, client)] {
            let shared = Arc::clone(self);
            thread::spawn(move || shared.carry(&mut from, &mut into));
        }
        Ok(())
    }

    fn carry(&self, from: &mut TcpStream, into: &mut TcpStream) {
        let mut buffer = [0; 16 * 1024];
        while let Ok(read) = from.read(&mut buffer) {
            drop(self.changed.wait_while(self.lock(), |state| state.way == Way::Silent));
            if read == 0 || into.write_all(&buffer[..read]).is_err() {
                break;
            }
        }
        let _ = from.shutdown(Shutdown::Both);
        let _ = into.shutdown(Shutdown::Both);
    }
}
