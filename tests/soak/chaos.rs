//! What goes wrong, one thing after the other, in an order drawn from the seed.

use std::{
    net::SocketAddr,
    path::PathBuf,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use tokio::runtime::Handle;

use crate::{
    cluster::Cluster,
    consul::{self, Relay as ConsulRelay},
    judge::{Judge, Kind},
    litegate::{Admin, World},
    process::{Process, component, eventually, free_port},
    relay::{Relay, Way},
};

/// How long after the end of a fault everything may take to be well again: an expired lease, and a
/// machine with other things to do.
const HEAL: Duration = Duration::from_secs(90);

/// One thing that goes wrong.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Action {
    KillReplica,
    KillPrimary,
    EndReplica,
    FreezeReplica,
    FreezePrimary,
    HandOver,
    CutReplica,
    CutPrimary,
    SilentReplica,
    SilentPrimary,
    SlowReplica,
    SlowPrimary,
    LyingReplica,
    LyingPrimary,
    ClaimingReplica,
    MuteReplica,
    MutePrimary,
    Unlisted,
    RpcCut,
    RpcSilent,
    RpcKilled,
}

/// Every one of them once, those first that take little time.
pub(crate) const SHORT: [Action; 8] = [
    Action::LyingReplica,
    Action::HandOver,
    Action::KillReplica,
    Action::LyingPrimary,
    Action::RpcCut,
    Action::FreezePrimary,
    Action::ClaimingReplica,
    Action::KillPrimary,
];

pub(crate) const ALL: [Action; 25] = [
    Action::KillReplica,
    Action::KillPrimary,
    Action::EndReplica,
    Action::FreezeReplica,
    Action::FreezePrimary,
    Action::HandOver,
    Action::CutReplica,
    Action::CutPrimary,
    Action::SilentReplica,
    Action::SilentPrimary,
    Action::SlowReplica,
    Action::SlowPrimary,
    Action::LyingReplica,
    Action::LyingPrimary,
    Action::LyingReplica,
    Action::LyingPrimary,
    Action::ClaimingReplica,
    Action::MuteReplica,
    Action::MutePrimary,
    Action::Unlisted,
    Action::RpcCut,
    Action::RpcSilent,
    Action::RpcKilled,
    Action::HandOver,
    Action::HandOver,
];

/// The cluster, and all ways to it.
pub(crate) struct Chaos {
    cluster: Cluster,
    apps: Vec<Relay>,
    apis: Vec<Relay>,
    consul: ConsulRelay,
    rpc: Vec<(Option<Process>, u16, Relay)>,
    directory: PathBuf,
    judge: Arc<Judge>,
    rng: fastrand::Rng,
    /// Who has the lease, as far as we meant it.
    holder: Option<String>,
}

impl Chaos {
    pub(crate) fn start(runtime: &Handle, judge: &Arc<Judge>, seed: u64) -> Self {
        let mut rng = fastrand::Rng::with_seed(seed);
        let cluster = Cluster::start_with_consul();
        let apps = (0..3).map(|i| Relay::start(runtime, cluster.app(i), rng.u64(..))).collect();
        let apis = (0..3).map(|i| Relay::start(runtime, cluster.api(i), rng.u64(..))).collect();
        let consul = ConsulRelay::start(cluster.consul().address());
        let loopback = std::net::Ipv4Addr::LOCALHOST;
        let rpc = (0..2)
            .map(|_| {
                let port = free_port(&[loopback.into()]);
                (None, port, Relay::start(runtime, SocketAddr::from((loopback, port)), rng.u64(..)))
            })
            .collect();
        let directory = cluster.directory().to_owned();
        let holder = cluster.consul().holder();
        let judge = Arc::clone(judge);
        let mut chaos = Self { cluster, apps, apis, consul, rpc, directory, judge, rng, holder };
        for node in 0..2 {
            chaos.start_rpc(node);
        }
        chaos
    }

    pub(crate) fn directory(&self) -> &std::path::Path {
        &self.directory
    }

    pub(crate) fn cluster(&self) -> &Cluster {
        &self.cluster
    }

    pub(crate) fn world(&self) -> World {
        let nodes: Vec<String> = (0..3)
            .map(|i| {
                format!(
                    r#"{{ name = "{}", address = "{}", api = "{}" }}"#,
                    self.cluster.name(i),
                    self.apps[i].address(),
                    self.apis[i].address(),
                )
            })
            .collect();
        let rpc: Vec<String> = (0..2)
            .map(|i| format!(r#"{{ name = "rpc-{i}", address = "{}" }}"#, self.rpc[i].2.address()))
            .collect();
        let listed = |nodes: Vec<String>| {
            format!(r#"{{ type = "static", nodes = [{}] }}"#, nodes.join(", "))
        };
        World {
            members: listed(nodes),
            consul: self.consul.address(),
            key: self.cluster.consul().key(),
            rpc: listed(rpc),
        }
    }

    /// Requests that were lied to.
    pub(crate) fn lies(&self) -> usize {
        self.apps.iter().chain(&self.apis).map(Relay::lies).sum()
    }

    fn start_rpc(&mut self, node: usize) {
        let log = self.directory.join(format!("rpc-{node}.log"));
        let (process, port, _) = &mut self.rpc[node];
        let args = ["-port", &port.to_string()];
        *process = Some(Process::start("the gRPC server", &component("grpc-server"), &args, &log));
        eventually("the gRPC server listens", Duration::from_secs(30), || {
            std::net::TcpStream::connect(("127.0.0.1", *port)).map_err(|error| error.to_string())
        });
    }

    /// Lets it be for so long, and looks whether LiteFS has ideas of its own.
    pub(crate) fn stay(&mut self, pause: Duration) {
        let end = Instant::now() + pause;
        loop {
            self.look();
            let now = Instant::now();
            if now >= end {
                return;
            }
            thread::sleep((end - now).min(Duration::from_millis(200)));
        }
    }

    /// LiteFS may lose its lease on a busy machine, and it may end over it.
    fn look(&mut self) {
        let since =
            Instant::now().checked_sub(Duration::from_secs(12)).unwrap_or_else(Instant::now);
        for node in self.cluster.ended() {
            let name = self.cluster.name(node).to_owned();
            println!("        {name} has ended by itself");
            self.judge.fault_since(Kind::Deposed, &name, true, since);
            self.down(node, Way::Down);
            self.cluster.kill(node);
            self.restart(node);
        }
        let holder = self.cluster.consul().holder();
        if holder != self.holder {
            let (from, to) = (self.holder.take(), &holder);
            println!("        the lease went from {from:?} to {to:?} by itself");
            for name in [&from, to].into_iter().flatten() {
                self.judge.fault_since(Kind::Deposed, name, true, since);
            }
            self.holder = holder;
        }
    }

    fn down(&self, node: usize, way: Way) {
        self.apps[node].set(way);
        self.apis[node].set(way);
    }

    fn restart(&mut self, node: usize) {
        self.cluster.spawn(node);
        self.cluster.wait_for(node);
        self.down(node, Way::Open);
    }

    /// A primary, and one of its replicas.
    fn roles(&mut self) -> (usize, usize) {
        let primary = self.cluster.primary();
        (primary, (primary + self.rng.usize(1..3)) % 3)
    }

    fn some(&mut self, from: u64, to: u64) -> Duration {
        Duration::from_millis(self.rng.u64(from..to))
    }

    /// Does it, undoes it, and waits until all is well.
    pub(crate) fn act(&mut self, action: Action, admin: Admin) -> Result<(), String> {
        use Action as A;
        let (primary, replica) = self.roles();
        let is_primary = matches!(
            action,
            A::KillPrimary
                | A::FreezePrimary
                | A::CutPrimary
                | A::SilentPrimary
                | A::SlowPrimary
                | A::LyingPrimary
                | A::MutePrimary
        );
        let node = if is_primary { primary } else { replica };
        let name = self.cluster.name(node).to_owned();
        let fault = |kind| self.judge.fault(kind, &name, is_primary);
        let app = |way| self.apps[node].set(way);
        match action {
            A::KillReplica | A::KillPrimary => {
                fault(Kind::Killed);
                self.down(node, Way::Down);
                self.cluster.kill(node);
                if is_primary {
                    let cluster = &self.cluster;
                    self.holder = Some(eventually("the lease moves", HEAL, || {
                        let holder = cluster.consul().holder();
                        holder.filter(|holder| *holder != name).ok_or_else(|| "nobody".to_owned())
                    }));
                } else {
                    let pause = self.some(200, 3000);
                    self.stay(pause);
                }
                self.restart(node);
            }
            A::EndReplica => {
                fault(Kind::Ended);
                self.cluster.terminate(node);
                self.down(node, Way::Down);
                let pause = self.some(200, 3000);
                self.stay(pause);
                self.restart(node);
            }
            A::FreezeReplica | A::FreezePrimary => {
                fault(Kind::Frozen);
                self.cluster.freeze(node);
                // Shorter than the lease.
                let pause = self.some(1000, 6000);
                thread::sleep(pause);
                self.cluster.thaw(node);
            }
            A::HandOver => {
                let old = self.cluster.name(primary).to_owned();
                self.judge.fault(Kind::HandedOver, &old, true);
                let done = admin.hand_over(&name)?;
                let outcome = done["outcome"].as_str().unwrap_or_default();
                if outcome != "done" {
                    println!("        handed over: {done}");
                }
                self.holder = self.cluster.consul().holder();
            }
            A::CutReplica | A::CutPrimary => {
                fault(Kind::Cut);
                app(Way::Cut);
                let pause = self.some(500, 5000);
                self.stay(pause);
            }
            A::SilentReplica | A::SilentPrimary => {
                fault(Kind::Silent);
                app(Way::Silent);
                let pause = self.some(500, 5000);
                self.stay(pause);
            }
            A::SlowReplica | A::SlowPrimary => {
                fault(Kind::Slow);
                app(Way::Slow);
                let pause = self.some(2000, 5000);
                self.stay(pause);
            }
            A::LyingReplica | A::LyingPrimary => {
                fault(Kind::Lying);
                app(Way::Lying);
                let pause = self.some(3000, 6000);
                self.stay(pause);
            }
            A::ClaimingReplica => {
                fault(Kind::Claiming);
                self.apis[node].set(Way::Claiming);
                let pause = self.some(3000, 5000);
                self.stay(pause);
            }
            A::MuteReplica | A::MutePrimary => {
                fault(Kind::Mute);
                let way = if self.rng.bool() { Way::Silent } else { Way::Cut };
                self.apis[node].set(way);
                let pause = self.some(1000, 6000);
                self.stay(pause);
            }
            A::Unlisted => {
                fault(Kind::Unlisted);
                let way = if self.rng.bool() { consul::Way::Silent } else { consul::Way::Cut };
                self.consul.set(way);
                let pause = self.some(2000, 5000);
                self.stay(pause);
            }
            A::RpcCut | A::RpcSilent | A::RpcKilled => {
                let node = self.rng.usize(..2);
                self.judge.fault(Kind::Rpc, &format!("rpc-{node}"), node == 0);
                match action {
                    A::RpcCut => self.rpc[node].2.set(Way::Cut),
                    A::RpcSilent => self.rpc[node].2.set(Way::Silent),
                    _ => {
                        self.rpc[node].2.set(Way::Down);
                        self.rpc[node].0 = None;
                    }
                }
                let pause = self.some(500, 4000);
                self.stay(pause);
                if self.rpc[node].0.is_none() {
                    self.start_rpc(node);
                }
            }
        }
        self.heal(admin)
    }

    /// Nothing is wrong any more; waits until litegate knows, and says how long that took.
    fn heal(&mut self, admin: Admin) -> Result<(), String> {
        for relay in self.apps.iter().chain(&self.apis).chain(self.rpc.iter().map(|rpc| &rpc.2)) {
            relay.set(Way::Open);
        }
        self.consul.set(consul::Way::Open);
        let deadline = Instant::now() + HEAL;
        loop {
            self.look();
            let claimants = self.cluster.claimants();
            let whole = if claimants.len() == 1 {
                admin.is_whole()
            } else {
                Err(format!("primary are {claimants:?}"))
            };
            match whole {
                Ok(()) => break,
                Err(why) if Instant::now() > deadline => {
                    return Err(format!("not well again after {HEAL:?}: {why}"));
                }
                Err(_) => thread::sleep(Duration::from_millis(100)),
            }
        }
        self.judge.healed();
        Ok(())
    }
}
