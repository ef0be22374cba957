//! Clients that go away in the middle, never finish, and send what is no HTTP. Nobody looks at what
//! they are told: only that others notice nothing, and that nothing of them stays behind.

use std::time::Duration;

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    time::{sleep, timeout},
};

use crate::{
    clients::Client,
    judge::{Class, End},
    wire::Via,
};

/// The id of writes none of which is whole, so that none may run.
pub(crate) const NEVER: &str = "abused";

/// The beginnings of what they send, and what some go on with.
const BEGINNINGS: [&[u8]; 16] = [
    b"",
    b"GE",
    b"GET /whoami HTTP/1.1\r\nhost: app.test\r\nx-half: ",
    b"GET /bytes/30000000 HTTP/1.1\r\nhost: app.test\r\n\r\n",
    b"GET /ticks?n=1000&every=20ms HTTP/1.1\r\nhost: app.test\r\n\r\n",
    b"POST /w/abused HTTP/1.1\r\nhost: app.test\r\ncontent-length: 900000\r\n\r\nonly this",
    b"POST /w/abused HTTP/1.1\r\nhost: app.test\r\ntransfer-encoding: chunked\r\n\r\n40\r\nhalf",
    b"POST /w/abused HTTP/1.1\r\nhost: app.test\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    b"POST /nothing HTTP/1.1\r\nhost: app.test\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\n\r\n",
    b"GET /w/x HTTP/1.1\r\nhost: app.test\r\nhost: other.test\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\x08\x06\0\0\0\0\x01garbage!",
    b"GET /socket HTTP/1.1\r\nhost: app.test\r\nconnection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n\x82\xfe\xff",
    b"POST /grpc.testing.TestService/UnaryCall HTTP/1.1\r\nhost: grpc.test\r\ncontent-length: 50\r\n\r\n",
    b"GET /whoami HTTP/1.1\r\nhost: app.test\r\n\r\nGET /whoami HTTP/1.1\r\nhost: app.test\r\n\r\n",
];

pub(crate) async fn run(client: Client) {
    let mut rng = client.rng();
    while client.goes_on() {
        let asked = client.asked("ill-behaved", Class::Read, "anything".to_owned());
        let via = if rng.u8(..) < 80 { Via::H1Tls } else { Via::H1 };
        let is_over_h2 = rng.u8(..) < 60;
        if is_over_h2 {
            resets(&client, &mut rng, if via.is_tls() { Via::H2Tls } else { Via::H2 }).await;
        } else if rng.u8(..) < 30 {
            // Without TLS where TLS is spoken.
            if let Ok(mut socket) = tokio::net::TcpStream::connect(client.doors.tls).await {
                let _ = socket.write_all(BEGINNINGS[3]).await;
                abort(&socket, &mut rng);
            }
        } else {
            match client.doors.open(via).await {
                Ok(mut stream) => {
                    let beginning = BEGINNINGS[rng.usize(..BEGINNINGS.len())];
                    let slowly = rng.u8(..) < 60;
                    if slowly {
                        for byte in beginning.iter().take(30) {
                            if stream.write_all(&[*byte]).await.is_err() || !client.goes_on() {
                                break;
                            }
                            sleep(Duration::from_millis(100)).await;
                        }
                    } else {
                        let _ = stream.write_all(beginning).await;
                    }
                    let _ = stream.flush().await;
                    let mut taken = vec![0; rng.usize(1..30_000)];
                    let patience = Duration::from_millis(rng.u64(..1500));
                    let _ = timeout(patience, stream.read_exact(&mut taken)).await;
                }
                Err(end) => {
                    // Even they are let in.
                    client.say(asked, end);
                    continue;
                }
            }
        }
        client.say(asked, End::Fine);
        client.think(&mut rng, 150).await;
    }
}

/// The connection ends by a reset.
fn abort(socket: &tokio::net::TcpStream, rng: &mut fastrand::Rng) {
    if rng.bool() {
        let _ = socket2::SockRef::from(socket).set_linger(Some(Duration::ZERO));
    }
}

/// Streams that are taken back at any moment, and a connection that goes without a word.
async fn resets(client: &Client, rng: &mut fastrand::Rng, via: Via) {
    let Ok(stream) = client.doors.open(via).await else { return };
    let Ok((mut sender, connection)) = h2::client::handshake(stream).await else { return };
    let driver = tokio::spawn(async move { drop(connection.await) });
    let mut answers = Vec::new();
    for _ in 0..rng.usize(1..12) {
        let Ok(mut ready) = sender.ready().await else { break };
        let (method, target) = match rng.u8(..4) {
            0 => ("GET", "/bytes/3000000"),
            1 => ("POST", "/w/abused"),
            2 => ("GET", "/ticks?n=100&every=20ms"),
            _ => ("GET", "/whoami"),
        };
        let uri = format!("http://app.test{target}");
        let request =
            ::http::Request::builder().method(method).uri(uri).body(()).expect("a request");
        let Ok((answer, mut up)) = ready.send_request(request, method == "GET") else { break };
        if method == "POST" {
            let _ = up.send_data("half".into(), false);
        }
        sleep(Duration::from_millis(rng.u64(..40))).await;
        if rng.bool() {
            up.send_reset(h2::Reason::CANCEL);
        } else {
            answers.push(answer);
        }
        sender = ready;
    }
    sleep(Duration::from_millis(rng.u64(..300))).await;
    driver.abort();
}
