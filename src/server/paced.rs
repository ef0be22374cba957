//! A response body at its client's pace.
//!
//! hyper takes frames from a body until it has as much as its buffer may hold, and only then looks
//! whether the socket takes any of it. A frame is as large as what a node had sent at once: a client
//! that does not read would have several of them waiting for it.

use std::{
    pin::Pin,
    rc::Rc,
    task::{Context, Poll},
};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};

use super::{Abort, conn::Conn};

/// While so much waits for the socket, there is no further frame. Small frames go out together; a
/// large one keeps the buffer that it was read into, and there shall be one of those.
const AHEAD: usize = 8 << 10;

/// The body of a response over HTTP/1.1.
pub(super) struct Paced<B> {
    inner: B,
    conn: Rc<Conn>,
}

impl<B> Paced<B> {
    pub(super) fn new(inner: B, conn: Rc<Conn>) -> Self {
        Self { inner, conn }
    }
}

impl<B> Body for Paced<B>
where
    B: Body<Data = Bytes, Error = Abort> + Unpin,
{
    type Data = Bytes;
    type Error = Abort;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Abort>>> {
        if self.conn.is_blocked() {
            // hyper asks again when it has written all.
            return Poll::Pending;
        }
        if self.conn.unsent() >= AHEAD {
            // hyper writes now, and might not ask again.
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let polled = Pin::new(&mut self.inner).poll_frame(cx);
        if let Poll::Ready(Some(Ok(frame))) = &polled
            && let Some(data) = frame.data_ref()
        {
            self.conn.queue(data.len());
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}
