//! The terminal: keys in, pages out, and put back in order when dropped.

use std::{
    io::{self, Write as _},
    time::Duration,
};

use crossterm::{cursor, event, execute, queue, terminal};

use super::view::{Moment, Paint};

/// A terminal that shows one page after the other, beside what stood there before.
#[derive(Debug)]
pub(super) struct Screen {}

impl Screen {
    pub(super) fn open() -> io::Result<Self> {
        terminal::enable_raw_mode()?;
        // From here on dropping it puts things right.
        let screen = Self {};
        execute!(io::stdout(), terminal::EnterAlternateScreen, cursor::Hide)?;
        Ok(screen)
    }

    /// Draws over the page before it, so that nothing flickers.
    pub(super) fn draw(&mut self, moment: &Moment, paint: Paint) -> io::Result<()> {
        let (width, height) = terminal::size().unwrap_or((80, 24));
        let page = moment.page(width.into(), height.into(), paint);
        let mut out = io::stdout().lock();
        queue!(out, cursor::MoveTo(0, 0))?;
        for (n, line) in page.iter().enumerate() {
            if n > 0 {
                // In raw mode a line feed does not go back to the first column.
                out.write_all(b"\r\n")?;
            }
            out.write_all(line.as_bytes())?;
            queue!(out, terminal::Clear(terminal::ClearType::UntilNewLine))?;
        }
        queue!(out, terminal::Clear(terminal::ClearType::FromCursorDown))?;
        out.flush()
    }

    /// A key that was pressed since the last look. Control-C is `q`.
    pub(super) fn key(&self) -> Option<char> {
        while event::poll(Duration::ZERO).unwrap_or(false) {
            let event::Event::Key(key) = event::read().ok()? else { continue };
            let event::KeyCode::Char(letter) = key.code else { continue };
            let is_control = key.modifiers.contains(event::KeyModifiers::CONTROL);
            return Some(if is_control && letter == 'c' { 'q' } else { letter });
        }
        None
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        let _ = execute!(io::stdout(), cursor::Show, terminal::LeaveAlternateScreen);
        let _ = terminal::disable_raw_mode();
    }
}
