//! The body of a client's request, whichever protocol brings it.

use std::{
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use h2::{Reason, RecvStream};
use http::{HeaderMap, header};
use http_body::{Body, Frame, SizeHint};

use super::conn::Conn;
#[cfg(feature = "http3")]
use super::h3::{Broken, RequestStream};

/// `100 Continue`, in the form in which interim answers are kept.
const CONTINUE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

/// A request body.
#[derive(Debug)]
pub struct Incoming(Source);

#[derive(Debug)]
enum Source {
    Empty,
    Http1(hyper::body::Incoming),
    H2 {
        stream: RecvStream,
        /// What is still to come, where the client said how much there is.
        rest: Option<u64>,
        data_ended: bool,
        /// Whom to tell that the body is wanted now: the client waits for it.
        expects: Option<Rc<Conn>>,
    },
    #[cfg(feature = "http3")]
    H3 {
        stream: Box<RequestStream>,
        /// As above; nobody else holds the body to it.
        rest: Option<u64>,
        expects: Option<Rc<Conn>>,
    },
}

/// Why a request body broke off.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// On HTTP/1.1.
    #[error(transparent)]
    Http1(#[from] hyper::Error),
    /// On HTTP/2.
    #[error(transparent)]
    H2(#[from] h2::Error),
    /// On HTTP/3.
    #[cfg(feature = "http3")]
    #[error(transparent)]
    H3(#[from] Broken),
}

impl From<hyper::body::Incoming> for Incoming {
    fn from(body: hyper::body::Incoming) -> Self {
        Self(Source::Http1(body))
    }
}

impl Incoming {
    /// Nothing.
    pub(super) fn empty() -> Self {
        Self(Source::Empty)
    }

    /// One that comes by HTTP/2, behind this head. `expects`: its client waits for `100 Continue`,
    /// which is sent when somebody asks for the body.
    pub(super) fn h2(stream: RecvStream, head: &HeaderMap, expects: Option<Rc<Conn>>) -> Self {
        let ended = stream.is_end_stream();
        let rest = if ended { Some(0) } else { length(head) };
        Self(Source::H2 { stream, rest, data_ended: false, expects: expects.filter(|_| !ended) })
    }
}

#[cfg(feature = "http3")]
impl Incoming {
    /// One that comes by HTTP/3, as [`Incoming::h2`].
    pub(super) fn h3(stream: RequestStream, head: &HeaderMap, expects: Option<Rc<Conn>>) -> Self {
        let ended = stream.has_ended();
        let rest = length(head).or(ended.then_some(0));
        let expects = expects.filter(|_| !ended);
        Self(Source::H3 { stream: Box::new(stream), rest, expects })
    }

    /// RFC 9114 section 4.1.2: the frames of a body hold as much as its head said.
    fn poll_h3(
        stream: &mut RequestStream,
        rest: &mut Option<u64>,
        expects: &mut Option<Rc<Conn>>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        let polled = stream.poll_body(cx);
        if let Some(conn) = expects.take()
            && polled.is_pending()
        {
            conn.send_interim(Bytes::from_static(CONTINUE));
        }
        let next = ready!(polled).transpose()?;
        if let Some(missing) = rest {
            let came = next.as_ref().and_then(Frame::data_ref).map(|data| data.len() as u64);
            let left = missing.checked_sub(came.unwrap_or_default());
            match left {
                Some(left) if came.is_some() || left == 0 => *missing = left,
                _ => {
                    return Poll::Ready(Some(Err(stream.malformed("not as long as it said"))));
                }
            }
        }
        Poll::Ready(next.map(Ok))
    }
}

/// The length that a head tells, where it tells one and no other.
fn length(head: &HeaderMap) -> Option<u64> {
    let mut all = head.get_all(header::CONTENT_LENGTH).iter();
    let first = all.next()?.to_str().ok()?;
    let is_length = first.bytes().all(|byte| byte.is_ascii_digit());
    first.parse().ok().filter(|_| is_length && all.all(|other| other == first))
}

impl Body for Incoming {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let (stream, rest, data_ended, expects) = match &mut self.0 {
            Source::Empty => return Poll::Ready(None),
            Source::Http1(body) => {
                return Pin::new(body).poll_frame(cx).map_err(BodyError::from);
            }
            Source::H2 { stream, rest, data_ended, expects } => (stream, rest, data_ended, expects),
            #[cfg(feature = "http3")]
            Source::H3 { stream, rest, expects } => {
                return Self::poll_h3(stream, rest, expects, cx).map_err(BodyError::from);
            }
        };
        if !*data_ended {
            let polled = stream.poll_data(cx);
            if let Some(conn) = expects.take()
                && polled.is_pending()
            {
                conn.send_interim(Bytes::from_static(CONTINUE));
            }
            match ready!(polled) {
                Some(Ok(data)) => {
                    let _ = stream.flow_control().release_capacity(data.len());
                    if let Some(rest) = rest {
                        *rest = rest.saturating_sub(data.len() as u64);
                    }
                    return Poll::Ready(Some(Ok(Frame::data(data))));
                }
                // Whatever its reason: only a server may reset a stream with NO_ERROR and mean that
                // all is well (RFC 9113 section 8.1). Half an upload must not look whole to a node.
                Some(Err(error)) => return Poll::Ready(Some(Err(error.into()))),
                None => *data_ended = true,
            }
        }
        match ready!(stream.poll_trailers(cx)) {
            Ok(Some(trailers)) if !super::are_tokens(&trailers) => {
                Poll::Ready(Some(Err(h2::Error::from(Reason::PROTOCOL_ERROR).into())))
            }
            Ok(trailers) => Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(trailers)))),
            Err(error) => Poll::Ready(Some(Err(error.into()))),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.0 {
            Source::Empty => true,
            Source::Http1(body) => body.is_end_stream(),
            Source::H2 { stream, .. } => stream.is_end_stream(),
            // Short of what was said, it is still to be found out.
            #[cfg(feature = "http3")]
            Source::H3 { stream, rest, .. } => {
                stream.has_ended() && rest.is_none_or(|rest| rest == 0)
            }
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.0 {
            Source::Empty => SizeHint::with_exact(0),
            Source::Http1(body) => body.size_hint(),
            Source::H2 { rest, .. } => rest.map_or_else(SizeHint::default, SizeHint::with_exact),
            #[cfg(feature = "http3")]
            Source::H3 { rest, .. } => rest.map_or_else(SizeHint::default, SizeHint::with_exact),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_length_is_one_number_however_often_it_is_said() {
        for (lines, want) in [
            (&[][..], None),
            (&["5"][..], Some(5)),
            (&["5", "5"][..], Some(5)),
            (&["5", "6"][..], None),
            (&["+5"][..], None),
            (&["5, 5"][..], None),
            (&[""][..], None),
        ] {
            let mut head = HeaderMap::new();
            for line in lines {
                head.append(header::CONTENT_LENGTH, line.parse().unwrap());
            }
            assert_eq!(length(&head), want, "{lines:?}");
        }
    }
}
