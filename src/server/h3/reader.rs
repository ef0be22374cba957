//! What a request's stream consists of (RFC 9114 section 4.1), in whatever pieces it comes. Pure.

use bytes::{Buf as _, Bytes, BytesMut};

use super::frames::{self, Code, FrameHead};

/// What the next frames of a request may be.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Stage {
    /// Its head.
    Head,
    /// Its body, or trailers.
    Body,
    /// Nothing that has a meaning.
    Over,
    /// RFC 9114 section 4.4: bytes.
    Tunnel,
}

/// What a frame's payload is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Kind {
    Data,
    Section,
    /// Of no meaning here.
    Skipped,
}

/// The next thing of a request.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Event {
    Data(Bytes),
    /// A field section.
    Section(Bytes),
}

/// Why nothing more can be read.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Wrong {
    /// The connection is over.
    Connection(Code, &'static str),
    /// A field section over the limit.
    TooLarge,
    /// The stream ended before its head.
    NoHead,
}

/// Reads one request's stream.
#[derive(Debug)]
pub(crate) struct Reader {
    stage: Stage,
    /// The most bytes of a field section. No more is kept of anything.
    most: usize,
    head: FrameHead,
    /// The frame that is being read, and how much of its payload is to come.
    frame: Option<(Kind, u64)>,
    section: BytesMut,
}

impl Reader {
    pub(crate) fn new(most: usize) -> Self {
        let (head, section) = (FrameHead::default(), BytesMut::new());
        Self { stage: Stage::Head, most, head, frame: None, section }
    }

    /// From now on the stream carries bytes.
    pub(crate) fn tunnel(&mut self) {
        self.stage = Stage::Tunnel;
    }

    /// Whether all that began has ended.
    pub(crate) fn is_between(&self) -> bool {
        self.frame.is_none() && !self.head.has_begun()
    }

    /// How much is kept of a section that is not whole.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn kept(&self) -> usize {
        self.section.len()
    }

    /// The next thing in `chunk`, of which it takes what it has looked at. `None`: more has to come.
    /// Tells `came` of each frame that begins, and whether it asks for something.
    pub(crate) fn next(
        &mut self,
        chunk: &mut Bytes,
        mut came: impl FnMut(bool),
    ) -> Result<Option<Event>, Wrong> {
        loop {
            if let Some((Kind::Section, 0)) = self.frame {
                self.frame = None;
                let section = self.section.split().freeze();
                return Ok(Some(self.section(section)));
            }
            if chunk.is_empty() {
                return Ok(None);
            }
            let Some((kind, left)) = self.frame else {
                let byte = chunk.get_u8();
                if let Some((kind, length)) = self.head.push(byte) {
                    self.frame = self.begin(kind, length, &mut came)?;
                }
                continue;
            };
            let most = usize::try_from(left).unwrap_or(usize::MAX).min(chunk.len());
            let payload = chunk.split_to(most);
            let left = left - payload.len() as u64;
            self.frame = (left > 0).then_some((kind, left));
            match kind {
                Kind::Skipped => {}
                Kind::Data => return Ok(Some(Event::Data(payload))),
                Kind::Section if left == 0 && self.section.is_empty() => {
                    return Ok(Some(self.section(payload)));
                }
                Kind::Section => {
                    self.section.extend_from_slice(&payload);
                    self.frame = Some((kind, left));
                }
            }
        }
    }

    /// The stream ends here.
    pub(crate) fn end(&self) -> Result<(), Wrong> {
        if !self.is_between() {
            // RFC 9114 section 7.1.
            return Err(Wrong::Connection(Code::Frame, "a frame without its end"));
        }
        if self.stage == Stage::Head { Err(Wrong::NoHead) } else { Ok(()) }
    }

    fn section(&mut self, section: Bytes) -> Event {
        self.stage = if self.stage == Stage::Head { Stage::Body } else { Stage::Over };
        Event::Section(section)
    }

    /// A frame begins. `None`: it is over, too.
    fn begin(
        &self,
        kind: u64,
        length: u64,
        came: &mut impl FnMut(bool),
    ) -> Result<Option<(Kind, u64)>, Wrong> {
        let frame = match (kind, self.stage) {
            (frames::DATA, Stage::Body | Stage::Tunnel) => Kind::Data,
            (frames::HEADERS, Stage::Head | Stage::Body) => {
                if length > self.most as u64 {
                    return Err(Wrong::TooLarge);
                }
                // A section is given even if it is empty, and then makes no request.
                came(true);
                return Ok(Some((Kind::Section, length)));
            }
            (
                frames::DATA
                | frames::HEADERS
                | frames::CANCEL_PUSH
                | frames::SETTINGS
                | frames::PUSH_PROMISE
                | frames::GOAWAY
                | frames::MAX_PUSH_ID,
                _,
            ) => return Err(Wrong::Connection(Code::FrameUnexpected, "a frame out of place")),
            (kind, _) if frames::is_of_http2(kind) => {
                return Err(Wrong::Connection(Code::FrameUnexpected, "a frame of HTTP/2"));
            }
            _ => Kind::Skipped,
        };
        came(frame == Kind::Data && length > 0);
        Ok((length > 0).then_some((frame, length)))
    }
}
