//! What a request costs by HTTP/3, and beside it by HTTP/2 over TLS: CPU of a whole litegate, told by
//! the kernel, while a client in this process asks a node in this process for 128 bytes.
//!
//! `cargo bench --features http3 --bench http3`

use std::{
    error::Error,
    future::poll_fn,
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use bytes::{Buf as _, Bytes};
use http::Request;
use quinn::{ClientConfig, Endpoint, crypto::rustls::QuicClientConfig};
use rcgen::{CertificateParams, KeyPair};
use rustls::{RootCertStore, pki_types::ServerName};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    time::{Instant, sleep},
};
use tokio_rustls::TlsConnector;

/// Connections, and requests at once on each.
const CONNECTIONS: usize = 8;
const STREAMS: usize = 16;
const WARM_UP: Duration = Duration::from_secs(2);
const MEASURED: Duration = Duration::from_secs(8);

type Failure = Box<dyn Error + Send + Sync>;

/// The measured process, ended when dropped.
struct Litegate(Child);

impl Drop for Litegate {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Litegate {
    /// Seconds of CPU so far: `utime` and `stime` of proc(5), in the usual hundredths.
    fn cpu(&self) -> Result<f64, Failure> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.0.id()))?;
        let (_, rest) = stat.rsplit_once(')').ok_or("no stat")?;
        let ticks = rest.split_whitespace().skip(11).take(2).map(str::parse::<u32>);
        Ok(f64::from(ticks.sum::<Result<u32, _>>()?) / 100.0)
    }

    fn resident_kib(&self) -> Result<u64, Failure> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.0.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).ok_or("no RSS")?;
        Ok(line.trim().trim_end_matches(" kB").parse()?)
    }
}

async fn node(listener: TcpListener) {
    while let Ok((mut socket, _)) = listener.accept().await {
        tokio::spawn(async move {
            let _ = socket.set_nodelay(true);
            let answer =
                [&b"HTTP/1.1 200 OK\r\ncontent-length: 128\r\n\r\n"[..], &[b'x'; 128]].concat();
            let (mut read, mut buffer) = (Vec::new(), vec![0; 4096]);
            while let Ok(n @ 1..) = socket.read(&mut buffer).await {
                read.extend_from_slice(&buffer[..n]);
                while let Some(end) = read.windows(4).position(|w| w == b"\r\n\r\n") {
                    read.drain(..end + 4);
                    if socket.write_all(&answer).await.is_err() {
                        return;
                    }
                }
            }
        });
    }
}

/// Starts litegate before the node. Returns where it listens, and whom a client believes.
async fn start(
    directory: &Path,
    node: SocketAddr,
) -> Result<(Litegate, SocketAddr, RootCertStore), Failure> {
    let key = KeyPair::generate()?;
    let certificate = CertificateParams::new(vec!["a.test".to_owned()])?.self_signed(&key)?;
    let (crt, pem, file) =
        (directory.join("a.crt"), directory.join("a.key"), directory.join("litegate.toml"));
    std::fs::write(&crt, certificate.pem())?;
    std::fs::write(&pem, key.serialize_pem())?;
    let free = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
    std::fs::write(
        &file,
        format!(
            "[server]\nworkers = 1\n[[listener]]\naddress = \"{free}\"\nhttp3 = true\n\
             tls = {{ certificates = [{{ certificate = \"{}\", key = \"{}\" }}] }}\n[admin]\n\
             address = \"127.0.0.1:0\"\n[access_log]\nformat = \"off\"\n[cluster.app]\nport = 1\n\
             members = {{ type = \"static\", nodes = [{{ name = \"a\", address = \"{node}\" }}] }}\n\
             primary = {{ type = \"instance\", name = \"a\" }}\nreads = \"all\"\n",
            crt.display(),
            pem.display(),
        ),
    )?;
    let child = Command::new(env!("CARGO_BIN_EXE_litegate"))
        .args(["run", "--config"])
        .arg(&file)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let litegate = Litegate(child);
    let mut roots = RootCertStore::empty();
    roots.add(certificate.der().clone())?;
    let deadline = Instant::now() + Duration::from_secs(10);
    while TcpStream::connect(free).await.is_err() {
        if Instant::now() > deadline {
            return Err("litegate does not start".into());
        }
        sleep(Duration::from_millis(20)).await;
    }
    Ok((litegate, free, roots))
}

fn tls(roots: &RootCertStore, protocol: &str) -> Result<rustls::ClientConfig, Failure> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots.clone())
        .with_no_client_auth();
    config.alpn_protocols = vec![protocol.as_bytes().to_vec()];
    Ok(config)
}

fn get() -> Result<Request<()>, Failure> {
    Ok(Request::get("https://a.test/").body(())?)
}

/// How the requests go.
#[derive(Clone)]
struct Load {
    to: SocketAddr,
    roots: RootCertStore,
    done: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
}

impl Load {
    async fn http2(self) -> Result<(), Failure> {
        let socket = TcpStream::connect(self.to).await?;
        socket.set_nodelay(true)?;
        let connector = TlsConnector::from(Arc::new(tls(&self.roots, "h2")?));
        let session = connector.connect(ServerName::try_from("a.test")?, socket).await?;
        let (sender, driver) = h2::client::handshake(session).await?;
        tokio::spawn(driver);
        let each = (0..STREAMS).map(|_| {
            let (this, mut sender) = (self.clone(), sender.clone());
            async move {
                while !this.stop.load(Relaxed) {
                    sender = sender.ready().await?;
                    let (response, _) = sender.send_request(get()?, true)?;
                    let mut body = response.await?.into_body();
                    let mut length = 0;
                    while let Some(data) = body.data().await {
                        let data = data?;
                        length += data.len();
                        body.flow_control().release_capacity(data.len())?;
                    }
                    this.answered(length)?;
                }
                Ok::<_, Failure>(())
            }
        });
        futures_util::future::try_join_all(each).await.map(|_| ())
    }

    async fn http3(self) -> Result<(), Failure> {
        let crypto = QuicClientConfig::try_from(tls(&self.roots, "h3")?)?;
        let endpoint = Endpoint::client((Ipv4Addr::LOCALHOST, 0).into())?;
        let config = ClientConfig::new(Arc::new(crypto));
        let connection = endpoint.connect_with(config, self.to, "a.test")?.await?;
        let connection = h3_quinn::Connection::new(connection);
        let (mut driver, sender) = h3::client::new(connection).await?;
        tokio::spawn(async move { poll_fn(|cx| driver.poll_close(cx)).await });
        let each = (0..STREAMS).map(|_| {
            let (this, mut sender) = (self.clone(), sender.clone());
            async move {
                while !this.stop.load(Relaxed) {
                    let mut stream = sender.send_request(get()?).await?;
                    stream.finish().await?;
                    stream.recv_response().await?;
                    let mut length = 0;
                    while let Some(data) = stream.recv_data().await? {
                        length += Bytes::copy_from_slice(data.chunk()).len();
                    }
                    this.answered(length)?;
                }
                Ok::<_, Failure>(())
            }
        });
        futures_util::future::try_join_all(each).await.map(|_| ())
    }

    fn answered(&self, length: usize) -> Result<(), Failure> {
        if length != 128 {
            return Err(format!("{length} bytes").into());
        }
        self.done.fetch_add(1, Relaxed);
        Ok(())
    }
}

#[expect(clippy::print_stdout, reason = "what it is for")]
async fn measure(protocol: &str) -> Result<(), Failure> {
    let directory = tempfile::tempdir()?;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let address = listener.local_addr()?;
    tokio::spawn(node(listener));
    let (litegate, to, roots) = start(directory.path(), address).await?;
    let load = Load { to, roots, done: Arc::default(), stop: Arc::default() };
    let tasks: Vec<_> = (0..CONNECTIONS)
        .map(|_| match protocol {
            "h2" => tokio::spawn(load.clone().http2()),
            _ => tokio::spawn(load.clone().http3()),
        })
        .collect();
    sleep(WARM_UP).await;
    let (cpu, done, began) = (litegate.cpu()?, load.done.load(Relaxed), Instant::now());
    sleep(MEASURED).await;
    let (cpu, done, took) =
        (litegate.cpu()? - cpu, load.done.load(Relaxed) - done, began.elapsed().as_secs_f64());
    let resident = litegate.resident_kib()?;
    load.stop.store(true, Relaxed);
    for task in tasks {
        task.await??;
    }
    println!(
        "{protocol}: {:.1} µs of CPU a request, {:.0} requests a second, {resident} KiB resident",
        cpu * 1e6 / done as f64,
        done as f64 / took,
    );
    Ok(())
}

fn main() -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    // In turn, so that what the machine does besides shows.
    for protocol in ["h2", "h3", "h2", "h3"] {
        runtime.block_on(measure(protocol))?;
    }
    Ok(())
}
