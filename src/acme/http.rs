//! HTTPS for the ACME client: one connection a request, an answer read whole under a bound, within
//! a time limit, and with the directory's own host alone, whatever URLs its answers name.

use std::{pin::Pin, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderValue, Request, Response, Uri, header, uri::Scheme};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use instant_acme::{BodyWrapper, BytesResponse, Error, HttpClient};
use rustls::pki_types::ServerName;
use tokio::{net::TcpStream, task::JoinSet, time::timeout};
use tokio_rustls::TlsConnector;

use crate::{
    config::listener::Acme,
    net::{self, pem::FileError},
};

/// How long a request may take.
const LIMIT: Duration = Duration::from_secs(30);
/// The largest answer: a chain of certificates is a few KiB.
const ANSWER: usize = 1 << 20;

type Fault = Box<dyn std::error::Error + Send + Sync>;

/// A way to the directory.
#[derive(Clone)]
pub struct Client {
    tls: TlsConnector,
    directory: Uri,
}

impl Client {
    /// To this directory, believing whom the configuration says.
    ///
    /// # Errors
    /// What is wrong with `ca`.
    pub fn new(config: &Acme) -> Result<Self, FileError> {
        let here = std::path::Path::new("acme.directory");
        let mut tls = net::tls::client(config.ca.iter().cloned().collect(), false)?;
        tls.alpn_protocols = vec![b"http/1.1".to_vec()];
        let directory = config.directory.parse().map_err(|error| FileError::new(here, error))?;
        Ok(Self { tls: TlsConnector::from(Arc::new(tls)), directory })
    }

    async fn send(self, mut request: Request<BodyWrapper<Bytes>>) -> Result<BytesResponse, Fault> {
        let uri = std::mem::take(request.uri_mut());
        let authority = target(&self.directory, &uri)?;
        let host = authority.host().trim_matches(['[', ']']).to_owned();
        let port = authority.port_u16().unwrap_or(443);
        let value = HeaderValue::from_str(authority.as_str())?;
        request.headers_mut().insert(header::HOST, value);
        let path = uri.path_and_query().map_or("/", |path| path.as_str());
        *request.uri_mut() = Uri::try_from(path)?;
        let stream = TcpStream::connect((&*host, port)).await?;
        let stream = self.tls.connect(ServerName::try_from(host)?, stream).await?;
        let (mut sender, driver) = http1::handshake(TokioIo::new(stream)).await?;
        // The connection ends with this call.
        let mut connection = JoinSet::new();
        connection.spawn(driver);
        let response = sender.send_request(request).await?;
        let (head, body) = response.into_parts();
        let body = Limited::new(body, ANSWER).collect().await?.to_bytes();
        Ok(BytesResponse::from(Response::from_parts(head, Full::new(body))))
    }
}

/// Whom a URL leads to, if that is the directory's own host.
fn target<'a>(directory: &Uri, uri: &'a Uri) -> Result<&'a http::uri::Authority, String> {
    match uri.authority() {
        Some(authority)
            if uri.scheme() == Some(&Scheme::HTTPS)
                && directory.host() == Some(authority.host())
                && directory.port_u16().unwrap_or(443) == authority.port_u16().unwrap_or(443) =>
        {
            Ok(authority)
        }
        _ => Err(format!("the directory names a URL that is not its own host's: {uri}")),
    }
}

impl HttpClient for Client {
    fn request(
        &self,
        request: Request<BodyWrapper<Bytes>>,
    ) -> Pin<Box<dyn Future<Output = Result<BytesResponse, Error>> + Send>> {
        let sent = timeout(LIMIT, self.clone().send(request));
        Box::pin(async move {
            let late = || Error::Other(format!("no answer within {LIMIT:?}").into());
            sent.await.map_err(|_| late())?.map_err(Error::Other)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_directory_s_host_is_asked() {
        let directory = Uri::from_static("https://acme.test/directory");
        for (uri, want) in [
            ("https://acme.test/new-order", true),
            ("https://acme.test:443/new-order", true),
            ("http://acme.test/new-order", false),
            ("https://acme.test:8443/new-order", false),
            ("https://127.0.0.1/new-order", false),
            ("https://acme.test.elsewhere.test/", false),
            ("https://acme.test@elsewhere.test/", false),
            ("/new-order", false),
        ] {
            assert_eq!(target(&directory, &Uri::from_static(uri)).is_ok(), want, "{uri}");
        }
    }
}
